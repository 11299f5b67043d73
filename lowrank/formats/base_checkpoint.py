"""Base weights on disk by layer path: read by rows, and written again with an adapter merged into them.

A base is a diffusers folder, or one file in the original layout (SD, SDXL, FLUX). Nothing is loaded as a
model: a tensor is read, changed and written some rows at a time, so that merging needs little more memory
than the adapter itself.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.errors import Refused
from lowrank.files import atomic_folder
from lowrank.formats.delta import Delta
from lowrank.naming import flux as flux_names
from lowrank.naming import unet as unet_names
from lowrank.naming.places import LayerPath
from lowrank.tensors import TensorFile, stream_pieces

PIECE = 1 << 20  # elements of a tensor in memory at a time
FOLDERS = {"unet": "unet", "transformer": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}
_DENOISER = "model.diffusion_model."
# where original files keep their text encoders: prefix -> part and whether it has OpenCLIP's names
_ENCODERS = {
    "cond_stage_model.transformer.": ("te1", False),
    "cond_stage_model.model.": ("te1", True),
    "conditioner.embedders.0.transformer.": ("te1", False),
    "conditioner.embedders.1.model.": ("te2", True),
}
_OPEN_CLIP = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)$")
_OPEN_CLIP_PARTS = {
    "attn.out_proj.weight": "self_attn.out_proj",
    "mlp.c_fc.weight": "mlp.fc1",
    "mlp.c_proj.weight": "mlp.fc2",
}
# tensors beside a weight that is quantised
_SCALED = re.compile(r"(scale_weight|weight_scale|scaled_fp8|quant_state|absmax|weight_format|qweight)")


class Rows(NamedTuple):
    """Where a layer's weight is: rows start/total … stop/total of a tensor, its halves exchanged or not."""

    file: TensorFile
    name: str
    start: int = 0
    stop: int = 1
    total: int = 1
    swapped: bool = False

    def range(self) -> tuple[int, int]:
        """[start, stop) in rows."""
        count = self.file.entries[self.name].shape[0]
        return self.start * count // self.total, self.stop * count // self.total


class BaseCheckpoint:
    """The weights of a base model by layer path."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files: dict[Path, TensorFile] = {}
        self._rows: dict[LayerPath, Rows] = {}
        if self.path.is_dir():
            for folder, part in FOLDERS.items():
                for file in _weights(self.path / folder):
                    self._index(TensorFile(file), part)
        elif self.path.suffix.lower() in (".safetensors", ".sft"):
            self._index(TensorFile(self.path), None)
        else:
            raise Refused(
                f"the base model {path} is neither a folder of a diffusers model nor a .safetensors file; "
                "pickled checkpoints are not opened here, convert it"
            )
        if not self._rows:
            raise Refused(
                f"{path} has no layer of SD, SDXL or FLUX; give the folder of a diffusers model or a "
                "checkpoint in the original layout"
            )

    def _index(self, file: TensorFile, part: str | None) -> None:
        self.files[file.path] = file
        layers = unet_names.layers_of(file.entries)
        for name in file.entries:
            for place, rows in _owners(file, name, part, layers):
                self._rows.setdefault(place, rows)

    def __contains__(self, place: object) -> bool:
        return place in self._rows

    def places(self) -> Iterable[LayerPath]:
        return self._rows

    def shape(self, place: LayerPath) -> tuple[int, ...]:
        """(O, I) or (O, I, k, k). Raises `Refused` for a layer that the base does not have."""
        rows = self._find(place)
        start, stop = rows.range()
        return (stop - start, *rows.file.entries[rows.name].shape[1:])

    def stored(self, place: LayerPath, precision: torch.dtype | None = None) -> Tensor:
        """W (O, I·k·k) in `precision`, by default in the dtype of the file; float8 becomes fp32."""
        rows = self._find(place)
        refuse_packed(rows.file, rows.name)
        value = rows.file.rows(rows.name, *rows.range()).flatten(1)
        value = value.to(precision) if precision else value.float() if value.dtype.itemsize == 1 else value
        return torch.cat(value.chunk(2)[::-1]) if rows.swapped else value

    def weight(self, place: LayerPath) -> Tensor:
        """W (O, I·k·k) in fp32."""
        return self.stored(place, torch.float32)

    def _find(self, place: LayerPath) -> Rows:
        if place not in self._rows:
            raise Refused(
                f"{place.path} of the adapter is not in {self.path}, which has for example "
                f"{next(iter(self._rows)).path}; the adapter is for another base"
            )
        return self._rows[place]

    def check(self, layers: Mapping[LayerPath, Delta]) -> None:
        """Raise `Refused` where a layer is not in this base or of another size."""
        for place, layer in layers.items():
            outs, *rest = self.shape(place)
            ins = math.prod(rest)
            if layer.up.shape[0] != outs or layer.down.shape[1] != ins:
                raise Refused(
                    f"{place.path} is {layer.up.shape[0]}×{layer.down.shape[1]} in the adapter and "
                    f"{outs}×{ins} in {self.path}; the adapter is for another base"
                )

    def owners(self) -> dict[tuple[Path, str], list[tuple[LayerPath, Rows]]]:
        """The layers in each tensor of each file."""
        owners: dict[tuple[Path, str], list[tuple[LayerPath, Rows]]] = {}
        for place, rows in self._rows.items():
            owners.setdefault((rows.file.path, rows.name), []).append((place, rows))
        return owners


def refuse_packed(file: TensorFile, name: str) -> None:
    """Raise `Refused` for a quantised weight, whose stored numbers are not its values."""
    entry, stem = file.entries[name], name.removesuffix("weight")
    beside = next((k for k in file.entries if k.startswith(stem) and _SCALED.search(k[len(stem) :])), None)
    beside = beside or next((k for k in file.entries if "scaled_fp8" in k), None)
    if not entry.dtype.is_floating_point or beside:
        raise Refused(
            f"{name} in {file.path} is quantised ({beside or str(entry.dtype).removeprefix('torch.')}); "
            "merge into the fp32, fp16 or bf16 model and quantise that, or keep the adapter live"
        )


def _weights(folder: Path) -> list[Path]:
    """The safetensors files of a diffusers component: the plain variant where there are several."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if "." not in file.stem]
    if not files and folder.is_dir() and any(folder.glob("*.bin")):
        raise Refused(
            f"{folder} holds only pickled weights, which are not opened here; save it as safetensors"
        )
    return plain or files


def _owners(file: TensorFile, name: str, part: str | None, layers: int) -> Iterator[tuple[LayerPath, Rows]]:
    if not name.endswith("weight"):
        return
    module = name.removesuffix(".weight")
    if part == "unet":
        yield LayerPath(part, module), Rows(file, name)
    elif part:
        yield _text(part, module), Rows(file, name)
    else:
        yield from _original(file, name, module, layers)


def _text(part: str, module: str) -> LayerPath:
    if module.startswith("encoder.block."):
        return LayerPath("te3", module)
    return LayerPath(part, module if module.startswith("text_") else f"text_model.{module}")


def _original(file: TensorFile, name: str, module: str, layers: int) -> Iterator[tuple[LayerPath, Rows]]:
    for prefix, (part, open_clip) in _ENCODERS.items():
        if name.startswith(prefix):
            if open_clip:
                yield from _of_open_clip(file, name, name.removeprefix(prefix), part)
            else:
                yield _text(part, module.removeprefix(prefix)), Rows(file, name)
            return
    path = module.removeprefix(_DENOISER)
    for ours, piece in flux_names.modules(path):
        yield LayerPath("unet", ours), Rows(file, name, *piece[1:], swapped=path == flux_names.SWAPPED)
    if not flux_names.modules(path) and name.startswith(_DENOISER):
        yield LayerPath("unet", unet_names.diffusers_name(path, layers)), Rows(file, name)


def _of_open_clip(file: TensorFile, name: str, key: str, part: str) -> Iterator[tuple[LayerPath, Rows]]:
    if not (match := _OPEN_CLIP.match(key)):
        return
    layer = f"text_model.encoder.layers.{match[1]}"
    if match[2] == "attn.in_proj_weight":
        for third, which in enumerate("qkv"):
            yield LayerPath(part, f"{layer}.self_attn.{which}_proj"), Rows(file, name, third, third + 1, 3)
    elif match[2] in _OPEN_CLIP_PARTS:
        yield LayerPath(part, f"{layer}.{_OPEN_CLIP_PARTS[match[2]]}"), Rows(file, name)


# ---------- merging


def merge(
    base: BaseCheckpoint,
    layers: Mapping[LayerPath, Delta],
    target: str | Path,
    metadata: Mapping[str, str],
    strength: float = 1.0,
    dtype: torch.dtype | None = None,
) -> float:
    """Write `base` with W ← W + strength·(W′ − W) to `target`: a folder like the base's, or a file.

    The sum is in fp32 and rounded once, to the tensor's dtype in the base or to `dtype`. Returns the loss by
    rounding, ‖W_written − W′‖/‖W′ − W‖ over all merged layers. Raises `Refused` before anything is written.
    """
    base.check(layers)
    changes = {
        key: [(layers[place], rows) for place, rows in owners if place in layers]
        for key, owners in base.owners().items()
        if any(place in layers for place, _ in owners)
    }
    for path, name in changes:
        refuse_packed(base.files[path], name)
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
    changes: Mapping[tuple[Path, str], list[tuple[Delta, Rows]]],
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
        bounds = sorted({0, count, *(edge for _, rows in owners for edge in _edges(rows))})
        for low, high in pairwise(bounds):
            owner = next((o for o in owners if o[1].range()[0] <= low < o[1].range()[1]), None)
            for start in range(low, high, step):
                value = file.rows(name, start, min(start + step, high))
                if owner is not None:
                    value = _changed(value, owner, start, strength, kept(name), lost)
                yield value

    entries = {name: (kept(name), entry.shape) for name, entry in file.entries.items()}
    stream_pieces(target, entries, pieces, metadata)


def _edges(rows: Rows) -> tuple[int, ...]:
    start, stop = rows.range()
    return (start, (start + stop) // 2, stop) if rows.swapped else (start, stop)


def _changed(
    value: Tensor, owner: tuple[Delta, Rows], start: int, strength: float, dtype: torch.dtype, lost: _Lost
) -> Tensor:
    layer, rows = owner
    first, last = rows.range()
    row = start - first  # in the layer's weight
    if rows.swapped:
        half = (last - first) // 2
        row = row + half if row < half else row - half
    W = value.float().flatten(1)
    wanted = layer.changed(W, row, row + len(W))
    if strength != 1.0:
        wanted = W + strength * (wanted - W)
    written = wanted.to(dtype)
    if not torch.isfinite(written.float()).all():
        raise Refused(
            f"{rows.name} merged at strength {strength:g} is not finite in "
            f"{str(dtype).removeprefix('torch.')}; "
            "merge in bf16 or fp32 (--dtype)"
        )
    lost.add(written, wanted, W)
    return written.reshape(value.shape)
