"""An adapter file on the command line: the method it was made by, and its layers."""

from __future__ import annotations

from pathlib import Path

from lowrank.adapters.method import Method
from lowrank.formats import static
from lowrank.formats.static import Plain
from lowrank.tensors import read_metadata


def made_by(path: str | Path) -> Method | None:
    """The method that a file says it was made by, with its options; None where it says none of ours."""
    return static.made_by(read_metadata(path), str(path))


def read(path: str | Path, family: str | None = None) -> Plain:
    """An adapter file of any dialect and method, place by place; says which keys were left out."""
    adapter = static.read(path, family, made_by(path))
    warn_skipped(adapter.source, adapter.skipped)
    return adapter


def warn_skipped(source: str, skipped: tuple[str, ...] | list[str]) -> None:
    """Name keys that are no adapter's."""
    if skipped:
        few = ", ".join(sorted(skipped)[:5])
        print(f"{source}: {len(skipped)} keys are no adapter's this program reads and are left out: {few}")
