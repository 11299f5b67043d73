"""The table of other programs' file formats; adapters are cut, resized and written here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.errors import Refused
from lowrank.files import atomic, writable_folder
from lowrank.formats import writers
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


def only(adapter: Adapter, parts: str) -> Adapter:
    """The layers of the denoiser ("unet") or of the text encoders ("text"), or "all". `Refused` if none."""

    def kept(place: LayerPath) -> bool:
        return parts == "all" or (place.part == "unet") == (parts == "unet")

    layers = {place: layer for place, layer in adapter.layers.items() if kept(place)}
    foreign = {place: layer for place, layer in adapter.foreign.items() if kept(place)}
    raw = {place: roles for place, roles in adapter.raw.items() if kept(place)}
    if not layers and not foreign:
        raise Refused(f"{adapter.source} has no layer of the {parts} part; leave --parts out")
    return replace(adapter, layers=layers, foreign=foreign, raw=raw)


def write(adapter: Adapter, to: str, target: str | Path, choices: Choices) -> list[Path]:
    """Write an adapter in a format of `FORMATS`; returns the files. Raises `Refused`."""
    form, target = FORMATS[to], Path(target)
    if target.resolve() == Path(adapter.source).resolve():
        raise Refused(f"{target} is the adapter itself, which is not overwritten; give another name")
    check_target(to, target)
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


def readers_of(adapter: Adapter, to: str) -> str:
    """The programs that read a format, and what one of them drops of this adapter."""
    dora = any(layer.magnitude is not None for layer in adapter.layers.values())
    if to == "diffusers" and dora:
        return "diffusers (ComfyUI drops the lengths of a DoRA here; --to kohya --dora_norm base has them)"
    return FORMATS[to].readers


def check_target(to: str, target: Path) -> None:
    """Raise `Refused` for a file where a format is a folder, and for the name of no safetensors file."""
    folder = FORMATS[to].folder
    if not folder and target.suffix != ".safetensors":
        raise Refused(f"{target} is no .safetensors name, and --to {to} writes one such file; give one")
    if folder and (target.suffix == ".safetensors" or target.is_file()):
        raise Refused(f"{target} is a file, and --to {to} writes a folder for each model; give a folder")


def _in_dtype(key: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in the dtype of the export; an alpha stays exact. Raises `Refused` where a value overflows."""
    converted = value if dtype is None or value.dim() == 0 else value.to(dtype)
    if not torch.isfinite(converted).all():
        raise Refused(
            f"{key} is not finite in {str(converted.dtype).removeprefix('torch.')}; export in bf16 or fp32 "
            "(--dtype)"
        )
    return converted
