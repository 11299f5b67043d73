"""Base weights with an adapter merged into them, written again.

A tensor is read, changed and written some rows at a time, so that merging needs little more memory than the
adapter itself. Only a layer that is no pair of factors is whole in memory.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lowrank.errors import Refused
from lowrank.files import atomic_folder
from lowrank.formats.base_checkpoint import BaseCheckpoint, Rows, refuse_packed
from lowrank.formats.delta import Delta, swapped
from lowrank.formats.foreign import ForeignLayer
from lowrank.naming.places import LayerPath
from lowrank.tensors import CONTENT_HASHES, TensorFile, stream_pieces

PIECE = 1 << 20  # elements of a tensor in memory at a time
Change: TypeAlias = Delta | ForeignLayer | Tensor  # a tensor is added to a bias


class Merged(NamedTuple):
    """What a merge lost by rounding, and the tensors that kept their precision because they overflow."""

    lost: float
    kept: list[str]


def check_target(base: BaseCheckpoint, target: str | Path) -> None:
    """Raise `Refused` for a target that is of another kind than the base, in the base, or exists."""
    if not base.path.is_dir():
        if Path(target).suffix not in (".safetensors", ".sft"):
            raise Refused(f"{base.path} is one file and {target} is no .safetensors name; give one")
        _refuse_same(base.path, target)
        return
    if Path(target).suffix == ".safetensors":
        raise Refused(f"{base.path} is a folder and {target} names a file; give a folder to write to")
    if base.path.resolve() in Path(target).resolve().parents:
        raise Refused(f"{target} is inside the base model, which is never written; give a folder elsewhere")
    if Path(target).exists() and (not Path(target).is_dir() or any(Path(target).iterdir())):
        raise Refused(f"{target} exists already and would be replaced as a whole; give a new folder")


def merge(
    base: BaseCheckpoint,
    layers: Mapping[LayerPath, Delta],
    target: str | Path,
    metadata: Mapping[str, str],
    strength: float = 1.0,
    dtype: torch.dtype | None = None,
    foreign: Mapping[LayerPath, ForeignLayer] = {},
) -> Merged:
    """Write `base` with W ← W + strength·(W′ − W) to `target`: a folder like the base's, or a file.

    `foreign` are layers that are no pair of factors; they may change biases and norm layers too.
    The sum is in fp32 and rounded once, to the tensor's dtype in the base or to `dtype`. Tensors without an
    adapter that overflow in `dtype` keep the base's. The loss by rounding is ‖W_written − W′‖/‖W′ − W‖ over
    all merged layers. Raises `Refused` before anything is written.
    """
    base.check(layers)
    changes = _changes(base, layers, foreign)
    check_target(base, target)
    lost, kept = _Lost(), []
    if base.path.is_dir():
        with atomic_folder(target) as part:
            shutil.copytree(base.path, part, dirs_exist_ok=True, ignore=_not_copied(base, changes))
            for path in {path for path, _ in changes}:
                place = part / path.relative_to(base.path)
                facts = fresh_metadata(base.files[path].metadata)
                kept += _rewrite(base.files[path], changes, place, facts, strength, dtype, lost)
    else:
        file = base.files[base.path]
        facts = fresh_metadata(file.metadata, Path(target).stem)
        kept = _rewrite(file, changes, Path(target), {**facts, **metadata}, strength, dtype, lost)
    return Merged(lost.share(), kept)


_HASH_IN_NAME = re.compile(r"hash|sha256|autov[23]", re.IGNORECASE)
_OF_THE_BASE = ("modelspec.title", "modelspec.date", "modelspec.thumbnail", "modelspec.description")


def fresh_metadata(metadata: Mapping[str, str], title: str = "") -> dict[str, str]:
    """The base's metadata without the facts that another file has: hashes, title, date, picture.

    The hashes that the base had and that are of the tensors alone are computed again while writing
    (`tensors.stream_pieces`); others are left out.
    """
    kept = {k: v for k, v in metadata.items() if not _HASH_IN_NAME.search(k) and k not in _OF_THE_BASE}
    if title and "modelspec.title" in metadata:
        kept |= {
            "modelspec.title": title,
            "modelspec.merged_from": metadata["modelspec.title"],
        }
    return kept | {name: "" for name in CONTENT_HASHES if name in metadata}


def _changes(
    base: BaseCheckpoint, layers: Mapping[LayerPath, Delta], foreign: Mapping[LayerPath, ForeignLayer]
) -> dict[tuple[Path, str], list[tuple[Change, Rows]]]:
    """What changes in each tensor of each file. Raises `Refused` for layers that are not in this base."""
    changes: dict[tuple[Path, str], list[tuple[Change, Rows]]] = {}

    def add(change: Change, rows: Rows) -> None:
        refuse_packed(rows.file, rows.name)
        changes.setdefault((rows.file.path, rows.name), []).append((change, rows))

    for place, layer in layers.items():
        add(layer, base.rows(place))
    for place, other in foreign.items():
        if other.kind.change is not None:
            add(other, base.rows(place))
        if (bias := other.bias()) is not None:
            add(bias, base.bias_rows(place))
    return changes


def _refuse_same(base: Path, target: str | Path) -> None:
    if Path(target).resolve() == base.resolve():
        raise Refused(f"{target} is the base model itself, which is never written; give another name")


def _not_copied(
    base: BaseCheckpoint, changed: Iterable[tuple[Path, str]]
) -> Callable[[str, list[str]], list[str]]:
    """A filter of `copytree`: skip files that are rewritten, and other variants of them."""
    written = {path for path, _ in changed}
    folders = {path.parent for path in written}

    def ignored(folder: str, names: list[str]) -> list[str]:
        weights = [n for n in names if Path(n).suffix in (".safetensors", ".bin", ".msgpack")]
        kept = set(base.files) - written
        return [n for n in weights if Path(folder) in folders and Path(folder) / n not in kept]

    return ignored


class _Lost:
    """Sums of squares of the rounding error and of the change."""

    def __init__(self) -> None:
        self.error = self.change = 0.0

    def add(self, written: Tensor, wanted: Tensor, before: Tensor) -> None:
        self.error += float((written.float() - wanted).double().square().sum())
        self.change += float((wanted - before).double().square().sum())

    def share(self) -> float:
        return math.sqrt(self.error / self.change) if self.change else 0.0


def _rewrite(
    file: TensorFile,
    changes: Mapping[tuple[Path, str], list[tuple[Change, Rows]]],
    target: Path,
    metadata: Mapping[str, str],
    strength: float,
    dtype: torch.dtype | None,
    lost: _Lost,
) -> list[str]:
    """Write a file with its changes; returns the tensors that overflow in `dtype` and keep theirs."""
    overflowing = [] if dtype is None else list(_overflowing(file, changes, dtype))

    def kept(name: str) -> torch.dtype:
        stored = file.entries[name].dtype
        return stored if dtype is None or not stored.is_floating_point or name in overflowing else dtype

    def pieces(name: str) -> Iterator[Tensor]:
        entry = file.entries[name]
        owners = sorted(changes.get((file.path, name), ()), key=lambda owner: owner[1].start)
        count = entry.shape[0] if entry.shape else 1
        step = max(1, PIECE // max(1, math.prod(entry.shape[1:])))
        bounds = sorted({0, count, *(edge for owner in owners for edge in _edges(*owner))})
        for low, high in pairwise(bounds):
            owner = next((o for o in owners if o[1].range()[0] <= low < o[1].range()[1]), None)
            whole = owner is not None and _is_whole(*owner)
            for start in range(low, high, high - low if whole else step):
                value = file.rows(name, start, high if whole else min(start + step, high))
                if owner is not None:
                    value = _changed(value, owner, start, strength, kept(name), lost)
                yield value

    entries = {name: (kept(name), entry.shape) for name, entry in file.entries.items()}
    stream_pieces(target, entries, pieces, metadata)
    return overflowing


def _is_whole(change: Change, rows: Rows) -> bool:
    """Whether a layer is changed as a whole, because its change or a length depends on all its rows."""
    return not isinstance(change, Delta) or change.by_input or rows.transposed


def _overflowing(
    file: TensorFile, changes: Mapping[tuple[Path, str], object], dtype: torch.dtype
) -> Iterator[str]:
    """The tensors without an adapter whose values are finite, and not finite in `dtype`."""
    largest = torch.finfo(dtype).max
    for name, entry in file.entries.items():
        if not entry.dtype.is_floating_point or (file.path, name) in changes:
            continue
        if torch.finfo(entry.dtype).max <= largest:
            continue
        count, step = (
            entry.shape[0] if entry.shape else 1,
            max(1, PIECE // max(1, math.prod(entry.shape[1:]))),
        )
        for start in range(0, count, step):
            value = file.rows(name, start, start + step).float()
            if (value.isfinite() & ~value.to(dtype).isfinite()).any():
                yield name
                break


def _edges(change: Change, rows: Rows) -> tuple[int, ...]:
    start, stop = rows.range()
    divided = rows.swapped and not _is_whole(change, rows)
    return (start, (start + stop) // 2, stop) if divided else (start, stop)


def _changed(
    value: Tensor, owner: tuple[Change, Rows], start: int, strength: float, dtype: torch.dtype, lost: _Lost
) -> Tensor:
    change, rows = owner
    value = value.T if rows.transposed else value
    if isinstance(change, Delta):
        first, last = rows.range()
        row = start - first  # in the layer's weight
        if rows.swapped and change.by_input:
            change = swapped(change)
        elif rows.swapped:
            half = (last - first) // 2
            row = row + half if row < half else row - half
        W = value.float().flatten(1)
        wanted = change.changed(W, row, row + len(W))
        if strength != 1.0:
            wanted = W + strength * (wanted - W)
    else:
        W = value.float()
        ordered = torch.cat(W.chunk(2)[::-1]) if rows.swapped else W
        added = change.change(ordered) if isinstance(change, ForeignLayer) else change.float()
        assert added is not None  # a layer that changes only its bias is a tensor here
        if added.shape != W.shape:
            raise Refused(
                f"{rows.name} is {tuple(W.shape)} in {rows.file.path} and its change is "
                f"{tuple(added.shape)}; the adapter is for another base"
            )
        wanted = W + strength * (torch.cat(added.chunk(2)[::-1]) if rows.swapped else added)
    written = wanted.to(dtype)
    if not torch.isfinite(written.float()).all():
        raise Refused(
            f"{rows.name} merged at strength {strength:g} is not finite in "
            f"{str(dtype).removeprefix('torch.')}; "
            "merge in bf16 or fp32 (--dtype)"
        )
    lost.add(written, wanted, W)
    written = written.reshape(value.shape)
    return written.T if rows.transposed else written
