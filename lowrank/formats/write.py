"""The table of other programs' file formats; adapters are cut, resized and written here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.errors import Refused
from lowrank.files import atomic, writable_folder
from lowrank.formats import writers
from lowrank.formats.delta import Delta
from lowrank.formats.read import Adapter
from lowrank.formats.writers import Choices, Written
from lowrank.naming.places import LayerPath
from lowrank.tensors import write_tensors


class Format(NamedTuple):
    """A file format: its writer, whether the target is a folder, and the programs that read it."""

    write: Callable[[Adapter, Choices], list[Written]]
    folder: bool
    readers: str


FORMATS: Mapping[str, Format] = {
    "kohya": Format(
        writers.write_kohya, False, "kohya sd-scripts, ComfyUI, A1111, Forge, Civitai, diffusers"
    ),
    "diffusers": Format(writers.write_diffusers, False, "diffusers, ComfyUI (FLUX)"),
    "peft": Format(writers.write_peft, True, "PEFT"),
    "lycoris": Format(writers.write_lycoris, False, "LyCORIS, SimpleTuner, ComfyUI"),
    "qrlora": Format(writers.write_qrlora, False, "the official QR-LoRA code"),
}


class Loss(NamedTuple):
    """What a smaller rank leaves out, as shares of ‖ΔW‖: of all layers together, and of the worst one."""

    together: float
    worst: float
    layer: str


def only(adapter: Adapter, parts: str) -> Adapter:
    """The layers of the denoiser ("unet") or of the text encoders ("text"), or "all". `Refused` if none."""
    kept = {
        place: layer
        for place, layer in adapter.layers.items()
        if parts == "all" or (place.part == "unet") == (parts == "unet")
    }
    if not kept:
        raise Refused(f"{adapter.source} has no layer of the {parts} part; leave --parts out")
    return replace(adapter, layers=kept)


def resize(adapter: Adapter, rank: int) -> tuple[Adapter, Loss]:
    """The nearest adapter whose layers have at most `rank`, by SVD, and what that loses."""
    layers: dict[LayerPath, Delta] = {}
    lost = total = 0.0
    worst, where = 0.0, ""
    for place, layer in adapter.layers.items():
        layers[place], left, whole = _resize_layer(layer, rank)
        lost, total = lost + left, total + whole
        share = math.sqrt(left / whole) if whole else 0.0
        if share >= worst:
            worst, where = share, place.path
    raw = {place: roles for place, roles in adapter.raw.items() if layers[place] is adapter.layers[place]}
    together = math.sqrt(lost / total) if total else 0.0
    return replace(adapter, layers=layers, raw=raw), Loss(together, worst, where)


def _resize_layer(layer: Delta, rank: int) -> tuple[Delta, float, float]:
    """The nearest layer of at most `rank`, the squared ‖ΔW‖ that is lost, and the squared ‖ΔW‖ there was.

    A thin SVD: of the R×R product of both factors' triangles, in float64.
    """
    if layer.rank <= rank:
        whole = layer.norm() ** 2
        return layer, 0.0, whole
    Q, left = torch.linalg.qr(layer.up.double())  # (O, R'), (R', R)
    P, right = torch.linalg.qr(layer.down.double().T)  # (I, R''), (R'', R)
    u, s, vh = torch.linalg.svd(layer.scale * left @ right.T)
    root = s[:rank].sqrt()
    up, down = Q @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ P.T
    energy = s.square()
    made = layer._replace(up=up.to(layer.up.dtype), down=down.to(layer.down.dtype), scale=1.0)
    return made, float(energy[rank:].sum()), float(energy.sum())


def write(adapter: Adapter, to: str, target: str | Path, choices: Choices) -> list[Path]:
    """Write an adapter in a format of `FORMATS`; returns the files. Raises `Refused`."""
    form, target = FORMATS[to], Path(target)
    if target.resolve() == Path(adapter.source).resolve():
        raise Refused(f"{target} is the adapter itself, which is not overwritten; give another name")
    if not form.folder and target.suffix != ".safetensors":
        raise Refused(f"{target} is no .safetensors name, and --to {to} writes one such file; give one")
    if form.folder and (target.suffix == ".safetensors" or target.is_file()):
        raise Refused(f"{target} is a file, and --to {to} writes a folder for each model; give a folder")
    files = form.write(adapter, choices)
    states = [
        {key: _in_dtype(key, value, choices.dtype) for key, value in file.state.items()} for file in files
    ]
    written = []
    for file, state in zip(files, states, strict=True):
        path = target / file.name if file.name else target
        writable_folder(path.parent, "the folder of the export")
        write_tensors(path, state, file.metadata)
        written.append(path)
        if file.beside:
            name, config = file.beside
            with atomic(target / name) as part:
                part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            written.append(target / name)
    return written


def _in_dtype(key: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in the dtype of the export; an alpha stays exact. Raises `Refused` where a value overflows."""
    converted = value if dtype is None or value.dim() == 0 else value.to(dtype)
    if not torch.isfinite(converted).all():
        raise Refused(
            f"{key} is not finite in {str(converted.dtype).removeprefix('torch.')}; export in bf16 or fp32 "
            "(--dtype)"
        )
    return converted
