"""An adapter file on the command line: read, and a line about the keys that are not used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lowrank.adapter_file import ForeignKey, RawFile
from lowrank.formats.read import Adapter, read_adapter


def read(file: str | Path | RawFile, family: str | None = None, **how) -> Adapter:
    """An adapter file of any dialect and method, layer by layer; prints which keys are not used."""
    adapter = read_adapter(file, family, **how)
    print_not_used(adapter.source, adapter.not_understood)
    return adapter


def print_not_used(source: str, unread: Sequence[ForeignKey]) -> None:
    """Print how many keys of a file are not used, of what kinds."""
    if unread:
        kinds = Counter(one.kind for one in unread if not one.kind.startswith("unknown"))
        told = f" ({', '.join(f'{kind} × {count}' for kind, count in kinds.items())})" if kinds else ""
        few = ", ".join(sorted(one.key for one in unread)[:5])
        print(f"{source}: {len(unread)} keys are not read by this program and not used{told}: {few}")
