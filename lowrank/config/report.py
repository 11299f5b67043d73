"""The command line of the tool that writes the report of runs."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.config.command_line import CommandLine
from lowrank.config.flag import option, path


@dataclass(frozen=True)
class Report:
    """Report of runs"""

    runs: tuple[str, ...] = path(
        (), "output folders of runs, or folders of earlier runs in their runs/", required=True
    )
    output: str | None = path(None, "HTML file to write (unset: report.html in the first folder)")
    open: bool = option(False, "open the report in the browser")


REPORT_RUN = CommandLine(
    "tools/report_run.py",
    "Write the report of one or several runs as one HTML file.",
    Report,
    positional=("runs",),
)
