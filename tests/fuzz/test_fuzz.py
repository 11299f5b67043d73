"""Hostile input for every reader of files and texts; `tools/soak.py fuzz` gives more of it."""

from __future__ import annotations

import logging
import os
import pickle
import time
from pathlib import Path

import pytest
from fuzzing import Evil, Reader, attack, readers, watching
from hypothesis import strategies as st

from lowrank.errors import Refused

CASES = 60  # for each of the readers


@pytest.fixture
def watch(tmp_path):
    logging.disable(logging.CRITICAL)
    with watching(tmp_path) as watch:
        yield watch
    logging.disable(logging.NOTSET)


@pytest.mark.slow
def test_readers_refuse_hostile_input(watch):
    """A traceback, a hang, a read of 1 GiB, a write outside the folder and code from data are problems."""
    problems = []
    for name, reader in readers(watch.work).items():
        problems += filter(None, [attack(name, reader, watch, round(CASES * reader.share), 0)])
    assert not problems, "\n".join(problems)
    assert watch.cases > 25 * CASES and watch.slowest < 10 and watch.memory < 1 << 30


def hang(case: str, folder: Path) -> None:
    if case:
        time.sleep(60)


def write_outside(case: str, folder: Path) -> None:
    open(folder.parents[1] / f"outside-{os.getpid()}", "w").close()


def run_pickle(case: str, folder: Path) -> None:
    pickle.loads(pickle.dumps(Evil(folder.parent / "canary")))


BAD = {
    "traceback": (lambda case, folder: int(case), "ValueError"),
    "hang": (hang, "Hang"),
    "write": (write_outside, "written outside"),
    "code": (run_pickle, "code from a file"),
    "memory": (lambda case, folder: bytearray(4 << 30), "MemoryError"),
    "exit": (lambda case, folder: exit(1), "exit code 1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_engine_finds_bad_readers(kind, watch, monkeypatch):
    monkeypatch.setattr("fuzzing.SECONDS", 0.1)
    read, words = BAD[kind]
    problem = attack(kind, Reader(st.text(max_size=3), read), watch, 5, 0)
    assert problem and words in problem


def test_engine_accepts_refusals(watch):
    def read(case: str, folder: Path) -> None:
        raise Refused("no")

    assert attack("fine", Reader(st.text(), read), watch, 5, 0) is None and watch.cases >= 5
