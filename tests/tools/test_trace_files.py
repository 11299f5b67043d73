"""The number of files that answer a question of tools/trace_files.py does not grow."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tools.trace_files import LIMITS, ROOT


@pytest.fixture(scope="module")
def table() -> str:
    """What the tool prints, run in a process of its own because an audit hook cannot be removed."""
    command = [sys.executable, "tools/trace_files.py", "--show"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode in (0, 1), result.stderr[-4000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("question", LIMITS)
def test_traced_files_do_not_grow(question, table):
    answer = re.search(rf"^{question} +(\d+) files .*\n((?: {{4}}.*\n)*)", table, re.MULTILINE)
    assert answer, table
    count, limit = int(answer[1]), LIMITS[question].present
    assert count == len(answer[2].splitlines())
    assert count <= limit, f"{question}: {count} files, above {limit} of tools/trace_files.py:\n{answer[2]}"
