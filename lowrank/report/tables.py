"""The files of numbers in a run's folder, by name, and which of their rows count."""

from __future__ import annotations

from collections.abc import Mapping

LOSSES, NORMS, VALIDATION, SUMMARY = "loss.csv", "norms.csv", "validation.csv", "summary.json"
TABLES = (LOSSES, NORMS, VALIDATION)


def is_whole(row: Mapping[str | None, object]) -> bool:
    """Whether csv.DictReader found a cell for each column: a kill can leave a part of a row."""
    return None not in row.values()
