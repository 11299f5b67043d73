"""The lock of an output folder: one run at a time, and none after its process has ended."""

from __future__ import annotations

import subprocess
import sys

import pytest
from repository import ROOT

from lowrank.errors import Refused
from lowrank.files import only_writer

HOLD = """
import sys, time
from pathlib import Path
from lowrank.files import only_writer
with only_writer(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_output_folder_lock_of_a_killed_process_is_free(tmp_path):
    """While another process holds the folder a run is refused; SIGKILL leaves the lock file, and no lock."""
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(Refused, match="another run is writing to"), only_writer(tmp_path):
            pass
    finally:
        other.kill()
        other.communicate()
    assert (tmp_path / ".lock").exists()
    for _ in range(2):  # released at the end of the block, so that a second run in one process is possible
        with only_writer(tmp_path):
            pass


def test_output_folder_that_cannot_be_locked_is_refused(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(Refused, match="cannot be locked"), only_writer(tmp_path):
        pass
