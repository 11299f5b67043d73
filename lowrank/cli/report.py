"""tools/report_run.py: write the report of runs as one HTML file."""

from __future__ import annotations

import webbrowser
from pathlib import Path

from lowrank.config.report import REPORT_RUN
from lowrank.report.write import NAME, write_report


def main(argv: list[str] | None = None) -> int:
    """Write the page and print where it is. Raises `Refused` for a folder that is no run's."""
    options = REPORT_RUN.parse(argv).options
    folders = [Path(folder) for folder in options.runs]
    target = write_report(folders, Path(options.output) if options.output else folders[0] / NAME)
    print(f"{target}: {len(folders)} run{'s' * (len(folders) > 1)}, {target.stat().st_size / 1e6:.2f} MB")
    if options.open:
        webbrowser.open(target.resolve().as_uri())
    return 0
