"""Compare the output folders of one recipe from two trees: what differs first in each file, and by how much.

Every file that a recipe writes is compared, except the names below, each with its reason.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy
import torch
from PIL import Image
from safetensors import safe_open

# Keys of metadata and JSON files that two equal runs write differently.
VOLATILE = MappingProxyType(
    {
        "ss_session_id": "random",
        "ss_training_started_at": "time",
        "ss_training_finished_at": "time",
        "training_started_at": "time, in the report of tools/inspect_lora.py",
        "training.training_started_at": "time, in the report of tools/inspect_lora.py",
        "sha256": "hash of a file with times in it, in the report of tools/inspect_lora.py",
        "modelspec.date": "time",
        "lowrank.version": "version of the package",
        "ss_sd_scripts_commit_hash": "version of the package",
        "seconds": "time, in run.json",
        "key": "hash of the recipe, in run.json",
        "pytorch_lora_weights.safetensors": "hash of a file with times in it, in train_state.json",
    }
)
# Files, by the end of their names, that hold no number of their own.
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
# Allowed between two floats of a JSON report, which are fractions and cosines in float64; tensors and losses
# have no tolerance. Equal tensors give other roundings when the header of their file has another length,
# because the tensors of a mapped file then lie elsewhere in memory and the kernels group the sums otherwise.
# Two runs of tools/extract_universal_basis.py on equal tensors differ by up to 4e-12.
REPORTED = 1e-10
ROWS = 4  # that a file has at most in the table of differences

Mismatches = Iterator[tuple[str, float | None]]  # where, and the largest absolute difference of a number


class Difference(NamedTuple):
    """One file that differs."""

    file: str
    where: str
    """first step, tensor or key that differs"""
    largest: float | None = None
    """largest absolute difference of a number, where there is one"""


def compare(old: Path, new: Path) -> list[Difference]:
    """What differs between two output folders."""
    differences: list[Difference] = []
    before, after = _files(old), _files(new)
    for name in sorted(before ^ after):
        differences.append(Difference(name, f"only in the {'new' if name in after else 'old'} tree"))
    for name in sorted(before & after):
        path = Path(name)
        compare_files = _COMPARISONS.get(path.name) or _COMPARISONS.get(path.suffix) or _compare_bytes
        differences += _rows(name, list(compare_files(old / path, new / path)))
    return differences


def _rows(name: str, mismatches: list[tuple[str, float | None]]) -> list[Difference]:
    """A row for each mismatch of a file, or one for all if they are many."""
    if len(mismatches) <= ROWS:
        return [Difference(name, *mismatch) for mismatch in mismatches]
    sizes = [largest for _, largest in mismatches if largest is not None]
    where = f"{mismatches[0][0]}, and {len(mismatches) - 1} more"
    return [Difference(name, where, max(sizes, default=None))]


def _files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file()
        and not path.name.endswith(tuple(IGNORED))
        and "events.out.tfevents" not in path.name  # TensorBoard: the numbers of loss.csv
    }


def _compare_bytes(old: Path, new: Path) -> Mismatches:
    if old.read_bytes() != new.read_bytes():
        yield "bytes", None


def _compare_losses(old: Path, new: Path) -> Mismatches:
    before, after = (list(csv.DictReader(path.read_text().splitlines())) for path in (old, new))
    if len(before) != len(after):
        yield f"{len(before)} steps, then {len(after)}", None
    first, largest = None, None
    for old_row, new_row in zip(before, after, strict=False):
        for column in dict.fromkeys((*old_row, *new_row)):
            values = old_row.get(column), new_row.get(column)
            if values[0] != values[1]:
                first = first or f"step {old_row.get('step')}, {column}"
                largest = _larger(largest, *map(_number, values))
    if first:
        yield first, largest


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _larger(largest: float | None, before: float | None, after: float | None) -> float | None:
    if before is None or after is None:
        return largest
    return max(largest or 0.0, abs(before - after))


def _compare_tensors(old: Path, new: Path) -> Mismatches:
    with safe_open(old, framework="pt") as before, safe_open(new, framework="pt") as after:
        yield from _compare_values(before.metadata() or {}, after.metadata() or {}, "metadata ")
        old_names, new_names = set(before.keys()), set(after.keys())
        for name in sorted(old_names ^ new_names)[:1]:
            yield f"{len(old_names ^ new_names)} tensors in one file only: {name}", None
        first, largest = None, None
        for name in sorted(old_names & new_names):
            left, right = before.get_tensor(name), after.get_tensor(name)
            if left.dtype != right.dtype or left.shape != right.shape:
                sizes = f"{left.dtype} {list(left.shape)}, then {right.dtype} {list(right.shape)}"
                first = first or f"{name}: {sizes}"
            elif _bits(left) != _bits(right):
                first = first or name
                largest = _larger(largest, 0.0, (left.double() - right.double()).abs().max().item())
        if first:
            yield first, largest


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _compare_values(before: Any, after: Any, where: str = "") -> Mismatches:
    """Nested dictionaries and lists of JSON, TOML or metadata; the first difference of each key."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys((*before, *after)):
            if key in VOLATILE:
                continue
            if key not in before or key not in after:
                yield f"{where}{key}: only in the {'new' if key in after else 'old'} tree", None
            else:
                yield from _compare_values(before[key], after[key], f"{where}{key} ")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, values in enumerate(zip(before, after, strict=True)):
            yield from _compare_values(*values, f"{where}[{index}] ")
    elif not _is_equal(before, after):
        numbers = [float(value) for value in (before, after) if isinstance(value, (int, float))]
        yield where.strip() or "value", abs(numbers[0] - numbers[1]) if len(numbers) == 2 else None


def _is_equal(before: Any, after: Any) -> bool:
    if isinstance(before, float) and isinstance(after, float):
        return math.isclose(before, after, rel_tol=REPORTED, abs_tol=REPORTED) or (
            math.isnan(before) and math.isnan(after)
        )
    values = _parsed(before), _parsed(after)
    if values[0] is None or values[1] is None:
        return before == after
    return not list(_compare_values(*values))


def _parsed(value: Any) -> Any:
    """The dictionary or list in a string of metadata; None for another string or value."""
    if not isinstance(value, str) or value[:1] not in ("{", "["):
        return None
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return None


def _compare_json(old: Path, new: Path) -> Mismatches:
    yield from _compare_values(*(json.loads(path.read_text(encoding="utf-8")) for path in (old, new)))


def _compare_options(old: Path, new: Path) -> Mismatches:
    """config.toml without its tables: an option may move to another table."""
    yield from _compare_values(_options(old), _options(new))


def _options(path: Path) -> dict[str, Any]:
    import toml

    tables = toml.loads(path.read_text(encoding="utf-8")).values()
    return {key: value for table in tables if isinstance(table, dict) for key, value in table.items()}


def _compare_pictures(old: Path, new: Path) -> Mismatches:
    before, old_text = _read_picture(old)
    after, new_text = _read_picture(new)
    if before.shape != after.shape:
        yield f"size {before.shape}, then {after.shape}", None
    elif (before != after).any():
        yield "pixels", float(numpy.abs(before - after).max())
    yield from _compare_values(old_text, new_text, "text ")


def _read_picture(path: Path) -> tuple[numpy.ndarray, dict[str, str]]:
    """Pixels and text; `parameters` is the options in words."""
    with Image.open(path) as image:
        text = {key: str(value) for key, value in image.info.items() if key != "parameters"}
        return numpy.asarray(image.convert("RGBA")).astype(int), text


_COMPARISONS = MappingProxyType(
    {
        "loss.csv": _compare_losses,
        ".safetensors": _compare_tensors,
        ".json": _compare_json,
        ".toml": _compare_options,
        ".png": _compare_pictures,
    }
)
