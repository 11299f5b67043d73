"""Compare the output folders of one recipe from two trees: what differs first in each file, and by how much.

Everything that a recipe writes is compared except the names below, each with its reason.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy
import torch
from PIL import Image
from safetensors import safe_open

# Metadata of adapter files and pictures that two equal runs write differently.
VOLATILE = MappingProxyType(
    {
        "ss_session_id": "random",
        "ss_training_started_at": "time",
        "ss_training_finished_at": "time",
        "modelspec.date": "time",
        "lowrank.version": "version of the package",
        "ss_sd_scripts_commit_hash": "version of the package",
        "seconds": "time, in run.json",
    }
)
# Files by the end of their name that say nothing about numbers, or say it in words.
IGNORED = MappingProxyType(
    {
        "output.txt": "what the script printed: wording is not a number",
        "versions.txt": "versions of packages",
        ".lock": "empty",
        "summary_statistics.txt": "the numbers of all_statistics.json in words",
        "_scale_line.png": "plot of a JSON file that is compared, with words in it",
        "_distribution.png": "plot of a JSON file that is compared, with words in it",
        ".md": "words",
        ".bin": "state of a checkpoint: the resumed run shows whether it is right",
        ".pkl": "state of a checkpoint: the resumed run shows whether it is right",
        ".pt": "state of a checkpoint: the resumed run shows whether it is right",
    }
)


class Difference(NamedTuple):
    """One file that differs."""

    file: str
    where: str
    """first step, tensor or key that differs"""
    largest: float | None = None
    """largest absolute difference of a number, where there is one"""


def compare(old: Path, new: Path) -> list[Difference]:
    """What differs between two output folders."""
    return list(_compare(old, new))


def _compare(old: Path, new: Path) -> Iterator[Difference]:
    before, after = _files(old), _files(new)
    for name in sorted(before | after):
        if name not in after or name not in before:
            yield Difference(name, f"only in the {'new' if name in after else 'old'} tree")
            continue
        end = Path(name).suffix
        differ = _READERS.get("loss.csv" if Path(name).name == "loss.csv" else end, _compare_bytes)
        for where, largest in differ(old / name, new / name):
            yield Difference(name, where, largest)


def _files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file()
        and not path.name.endswith(tuple(IGNORED))
        and "events.out.tfevents" not in path.name
    }


Found = Iterator[tuple[str, float | None]]


def _compare_bytes(old: Path, new: Path) -> Found:
    if old.read_bytes() != new.read_bytes():
        yield "bytes", None


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _compare_losses(old: Path, new: Path) -> Found:
    before, after = (list(csv.DictReader(path.open(newline=""))) for path in (old, new))
    if len(before) != len(after):
        yield f"{len(before)} steps, then {len(after)}", None
    first, largest = None, None
    for row, other in zip(before, after, strict=False):
        for column in dict.fromkeys((*row, *other)):
            if row.get(column) == other.get(column):
                continue
            first = first or f"step {row.get('step')}, {column}"
            one, two = _number(row.get(column)), _number(other.get(column))
            if one is not None and two is not None:
                largest = max(largest or 0.0, abs(one - two))
    if first:
        yield first, largest


def _compare_tensors(old: Path, new: Path) -> Found:
    with safe_open(old, framework="pt") as before, safe_open(new, framework="pt") as after:
        yield from _compare_values(before.metadata() or {}, after.metadata() or {}, "metadata ")
        names, others = set(before.keys()), set(after.keys())
        for name in sorted(names ^ others)[:1]:
            yield f"{len(names ^ others)} tensors in one file only: {name}", None
        first, largest = None, None
        for name in sorted(names & others):
            one, two = before.get_tensor(name), after.get_tensor(name)
            if one.dtype != two.dtype or one.shape != two.shape:
                first = first or f"{name}: {one.dtype} {list(one.shape)}, then {two.dtype} {list(two.shape)}"
            elif _bits(one) != _bits(two):
                first = first or name
                largest = max(largest or 0.0, (one.double() - two.double()).abs().max().item())
        if first:
            yield first, largest


def _bits(tensor: torch.Tensor) -> bytes:
    return (
        tensor.contiguous().view(torch.uint8).numpy().tobytes()
        if tensor.ndim
        else str(tensor.item()).encode()
    )


def _compare_values(before: Any, after: Any, where: str = "") -> Found:
    """Nested dictionaries and lists of a JSON or TOML file, or metadata; the first difference of each key."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys((*before, *after)):
            if key in VOLATILE:
                continue
            if key not in before or key not in after:
                yield f"{where}{key}: only in the {'new' if key in after else 'old'} tree", None
            else:
                yield from _compare_values(before[key], after[key], f"{where}{key} ")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, two) in enumerate(zip(before, after, strict=True)):
            yield from _compare_values(one, two, f"{where}[{index}] ")
    elif before != after:
        numbers = [float(value) for value in (before, after) if isinstance(value, (int, float))]
        yield where.strip() or "value", abs(numbers[0] - numbers[1]) if len(numbers) == 2 else None


def _compare_json(old: Path, new: Path) -> Found:
    before, after = (json.loads(path.read_text(encoding="utf-8")) for path in (old, new))
    yield from _compare_values(before, after)


def _compare_options(old: Path, new: Path) -> Found:
    """config.toml without its tables: an option may move to another table."""
    import toml

    flat = []
    for path in (old, new):
        values = toml.loads(path.read_text(encoding="utf-8"))
        flat.append(
            {
                key: value
                for table in values.values()
                if isinstance(table, dict)
                for key, value in table.items()
            }
        )
    yield from _compare_values(flat[0], flat[1])


def _compare_pictures(old: Path, new: Path) -> Found:
    with Image.open(old) as before, Image.open(new) as after:
        text = [{k: str(v) for k, v in image.info.items() if k != "parameters"} for image in (before, after)]
        one, two = (numpy.asarray(image.convert("RGBA")).astype(int) for image in (before, after))
    if one.shape != two.shape:
        yield f"size {one.shape}, then {two.shape}", None
    elif (one != two).any():
        yield "pixels", float(numpy.abs(one - two).max())
    yield from _compare_values(text[0], text[1], "text ")


_READERS = MappingProxyType(
    {
        "loss.csv": _compare_losses,
        ".safetensors": _compare_tensors,
        ".json": _compare_json,
        ".toml": _compare_options,
        ".png": _compare_pictures,
    }
)
