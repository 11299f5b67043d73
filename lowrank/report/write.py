"""Write the report of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank.files import atomic
from lowrank.report.page import page
from lowrank.report.run_folder import read_run

NAME = "report.html"


def write_report(folders: Sequence[Path], target: Path) -> Path:
    """Read the folders of runs and write their page. Raises `Refused` for a folder that is no run's."""
    text = page([read_run(folder) for folder in folders])
    with atomic(target) as part:
        part.write_text(text, encoding="utf-8")
    return target
