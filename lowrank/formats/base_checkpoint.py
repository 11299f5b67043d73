"""Base weights on disk by layer path, read by rows.

A base is a diffusers folder, or one file in the original layout (SD, SDXL, FLUX). Nothing is loaded as a
model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.errors import Refused
from lowrank.formats.delta import Delta
from lowrank.naming import flux as flux_names
from lowrank.naming import unet as unet_names
from lowrank.naming.places import LayerPath
from lowrank.tensors import TensorFile

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
    "ln_1.weight": "layer_norm1",
    "ln_2.weight": "layer_norm2",
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
        self._biases: dict[LayerPath, Rows] = {}
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
            table = self._biases if name.endswith("bias") else self._rows
            for place, rows in _owners(file, name, part, layers):
                table.setdefault(place, rows)

    def __contains__(self, place: object) -> bool:
        return place in self._rows

    def places(self) -> Iterable[LayerPath]:
        return self._rows

    def shape(self, place: LayerPath) -> tuple[int, ...]:
        """(O, I) or (O, I, k, k). Raises `Refused` for a layer that the base does not have."""
        rows = self.rows(place)
        start, stop = rows.range()
        return (stop - start, *rows.file.entries[rows.name].shape[1:])

    def stored(self, place: LayerPath, precision: torch.dtype | None = None) -> Tensor:
        """W (O, I·k·k) in `precision`, by default in the dtype of the file; float8 becomes fp32."""
        rows = self.rows(place)
        refuse_packed(rows.file, rows.name)
        value = rows.file.rows(rows.name, *rows.range())
        value = value.flatten(1) if value.dim() > 1 else value  # of a norm layer it is a vector
        value = value.to(precision) if precision else value.float() if value.dtype.itemsize == 1 else value
        return torch.cat(value.chunk(2)[::-1]) if rows.swapped else value

    def weight(self, place: LayerPath) -> Tensor:
        """W (O, I·k·k) in fp32."""
        return self.stored(place, torch.float32)

    def rows(self, place: LayerPath) -> Rows:
        """Where a layer's weight is. Raises `Refused` for a layer that the base does not have."""
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

    def original(self, place: LayerPath) -> Tensor:
        """W in fp32 and in its own shape."""
        return self.weight(place).reshape(self.shape(place))

    def has_bias(self, place: LayerPath) -> bool:
        """Whether a layer has a bias."""
        return place in self._biases

    def bias(self, place: LayerPath) -> Tensor:
        """A layer's bias (O,) in fp32."""
        rows = self.bias_rows(place)
        value = rows.file.rows(rows.name, *rows.range()).float()
        return torch.cat(value.chunk(2)[::-1]) if rows.swapped else value

    def bias_rows(self, place: LayerPath) -> Rows:
        """Where a layer's bias is. Raises `Refused` for a layer without one."""
        if place not in self._biases:
            raise Refused(
                f"the adapter changes the bias of {place.path}, and {self.path} has none there; the adapter "
                "is for another base"
            )
        return self._biases[place]


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
    if not name.endswith(("weight", "bias", "_norm.scale")):  # the last: FLUX's norms of queries and keys
        return
    module = name.removesuffix(".weight").removesuffix(".bias").removesuffix(".scale")
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
    tensor = re.sub("bias$", "weight", match[2])  # biases are named alike
    if tensor == "attn.in_proj_weight":
        for third, which in enumerate("qkv"):
            yield LayerPath(part, f"{layer}.self_attn.{which}_proj"), Rows(file, name, third, third + 1, 3)
    elif tensor in _OPEN_CLIP_PARTS:
        yield LayerPath(part, f"{layer}.{_OPEN_CLIP_PARTS[tensor]}"), Rows(file, name)
