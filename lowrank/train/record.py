"""The record of a run: config.toml, versions.txt and tables; several runs in one folder each keep theirs.

The files of the newest run are in the output folder itself. When another run starts there, they move to
`runs/<output name>-<start>/`. A resumed run continues its own record, which may have moved there.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import time
from pathlib import Path

import torch

from lowrank.errors import Refused
from lowrank.files import atomic, parse_toml, read_text
from lowrank.report.tables import LOSSES, SUMMARY, TABLES
from lowrank.train.checkpoints import Names

RUNS = "runs"
FILES = ("config.toml", "versions.txt", *TABLES, SUMMARY)
_PACKAGES = (
    *("torch", "diffusers", "transformers", "accelerate"),
    *("safetensors", "bitsandbytes", "numpy", "pillow"),
)


def begin_record(names: Names, config: str, command: str, resumed: bool) -> None:
    """Write config.toml and versions.txt, after the record of another run in the folder was moved away."""
    folder, label = names.output_dir, _label(names.output_name)
    earlier = _earlier_label(folder)
    if earlier is not None and not (resumed and earlier == label):
        _move_away(folder, earlier)
        if resumed and (losses := sorted(folder.glob(f"{RUNS}/{label}-*/{LOSSES}"))):
            for name in TABLES:
                if (table := losses[-1].with_name(name)).is_file():
                    os.replace(table, folder / name)
    with atomic(folder / "config.toml") as part:
        part.write_text(config, encoding="utf-8")
    versions = [f"python=={platform.python_version()}"]
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name}=={importlib.metadata.version(name)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    with atomic(folder / "versions.txt") as part:
        text = "\n".join([*versions, f"# device: {device}", f"# command: {command}"]) + "\n"
        part.write_text(text, encoding="utf-8")


def _label(output_name: object) -> str:
    return output_name if isinstance(output_name, str) and output_name else "run"


def _earlier_label(folder: Path) -> str | None:
    """The name of the run whose record is in the folder, or None where there is none."""
    if not any((folder / name).is_file() for name in FILES):
        return None
    try:
        config = parse_toml(read_text(folder / "config.toml", "the record"), "the record")
    except Refused:  # it is missing or not ours; its files are kept under the name of any run
        return _label(None)
    tables = (table for table in config.values() if isinstance(table, dict))
    return _label(next((table["output_name"] for table in tables if "output_name" in table), None))


def _move_away(folder: Path, label: str) -> None:
    files = [folder / name for name in FILES if (folder / name).is_file()]
    start = time.strftime("%Y%m%d-%H%M%S", time.localtime(files[0].stat().st_mtime))
    place, count = folder / RUNS / f"{label}-{start}", 1
    while place.exists():
        count += 1
        place = folder / RUNS / f"{label}-{start}-{count}"
    place.mkdir(parents=True)
    for file in files:
        os.replace(file, place / file.name)
