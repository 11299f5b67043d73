"""Base weights with an adapter merged into them, written again.

A tensor is read, changed and written some rows at a time, so that merging needs little more memory than the
adapter itself. Only a layer that is no pair of factors is whole in memory.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from lowrank.errors import Refused
from lowrank.files import atomic_folder
from lowrank.formats.base_checkpoint import BaseCheckpoint, Rows, refuse_packed
from lowrank.formats.delta import Delta
from lowrank.formats.foreign import ForeignLayer
from lowrank.naming.places import LayerPath
from lowrank.tensors import TensorFile, stream_pieces

PIECE = 1 << 20  # elements of a tensor in memory at a time
Change: TypeAlias = Delta | ForeignLayer | Tensor  # a tensor is added to a bias


def merge(
    base: BaseCheckpoint,
    layers: Mapping[LayerPath, Delta],
    target: str | Path,
    metadata: Mapping[str, str],
    strength: float = 1.0,
    dtype: torch.dtype | None = None,
    foreign: Mapping[LayerPath, ForeignLayer] = {},
) -> float:
    """Write `base` with W ← W + strength·(W′ − W) to `target`: a folder like the base's, or a file.

    `foreign` are layers that are no pair of factors; they may change biases and norm layers too.
    The sum is in fp32 and rounded once, to the tensor's dtype in the base or to `dtype`. Returns the loss by
    rounding, ‖W_written − W′‖/‖W′ − W‖ over all merged layers. Raises `Refused` before anything is written.
    """
    base.check(layers)
    changes = _changes(base, layers, foreign)
    lost = _Lost()
    if base.path.is_dir():
        if Path(target).suffix == ".safetensors":
            raise Refused(f"{base.path} is a folder and {target} names a file; give a folder to write to")
        if base.path.resolve() in Path(target).resolve().parents:
            raise Refused(
                f"{target} is inside the base model, which is never written; give a folder elsewhere"
            )
        if Path(target).exists() and (not Path(target).is_dir() or any(Path(target).iterdir())):
            raise Refused(f"{target} exists already and would be replaced as a whole; give a new folder")
        with atomic_folder(target) as part:
            shutil.copytree(base.path, part, dirs_exist_ok=True, ignore=_not_copied(base, changes))
            for path in {path for path, _ in changes}:
                place = part / path.relative_to(base.path)
                _rewrite(base.files[path], changes, place, base.files[path].metadata, strength, dtype, lost)
    else:
        if Path(target).suffix not in (".safetensors", ".sft"):
            raise Refused(f"{base.path} is one file and {target} is no .safetensors name; give one")
        _refuse_same(base.path, target)
        file = base.files[base.path]
        _rewrite(file, changes, Path(target), {**file.metadata, **metadata}, strength, dtype, lost)
    return lost.share()


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
) -> None:
    def kept(name: str) -> torch.dtype:
        stored = file.entries[name].dtype
        return stored if dtype is None or not stored.is_floating_point else dtype

    def pieces(name: str) -> Iterator[Tensor]:
        entry = file.entries[name]
        owners = sorted(changes.get((file.path, name), ()), key=lambda owner: owner[1].start)
        count = entry.shape[0] if entry.shape else 1
        step = max(1, PIECE // max(1, math.prod(entry.shape[1:])))
        bounds = sorted({0, count, *(edge for owner in owners for edge in _edges(*owner))})
        for low, high in pairwise(bounds):
            owner = next((o for o in owners if o[1].range()[0] <= low < o[1].range()[1]), None)
            whole = owner is not None and not isinstance(owner[0], Delta)
            for start in range(low, high, high - low if whole else step):
                value = file.rows(name, start, high if whole else min(start + step, high))
                if owner is not None:
                    value = _changed(value, owner, start, strength, kept(name), lost)
                yield value

    entries = {name: (kept(name), entry.shape) for name, entry in file.entries.items()}
    stream_pieces(target, entries, pieces, metadata)


def _edges(change: Change, rows: Rows) -> tuple[int, ...]:
    start, stop = rows.range()
    divided = rows.swapped and isinstance(change, Delta)
    return (start, (start + stop) // 2, stop) if divided else (start, stop)


def _changed(
    value: Tensor, owner: tuple[Change, Rows], start: int, strength: float, dtype: torch.dtype, lost: _Lost
) -> Tensor:
    change, rows = owner
    if isinstance(change, Delta):
        first, last = rows.range()
        row = start - first  # in the layer's weight
        if rows.swapped:
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
    return written.reshape(value.shape)
