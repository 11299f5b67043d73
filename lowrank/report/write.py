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
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if names.count(run.name) > 1:  # a name for each curve
            run.name = f"{run.name} ({folder.resolve().parent.name}/{folder.resolve().name})"
    text = page(runs)
    with atomic(target) as part:
        part.write_text(text, encoding="utf-8")
    return target
