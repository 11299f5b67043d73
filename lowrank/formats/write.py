"""Adapters as files of other programs: read, converted place by place, written, and read back by their
readers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from lowrank.errors import Refused
from lowrank.files import atomic, writable_folder
from lowrank.formats.delta import Delta
from lowrank.formats.formats import FORMATS, Choices, prepared
from lowrank.formats.read import Adapter
from lowrank.naming.places import LayerPath
from lowrank.tensors import write_tensors

PARTS = ("all", "unet", "text")


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
    files = prepared(form.write(adapter, choices), choices.dtype)
    written = []
    for file in files:
        path = target / file.name if file.name else target
        writable_folder(path.parent, "the folder of the export")
        write_tensors(path, file.state, file.metadata)
        written.append(path)
        if file.beside:
            _write_json(target / file.beside[0], file.beside[1])
            written.append(target / file.beside[0])
    return written


def _write_json(path: Path, facts: Mapping) -> None:
    with atomic(path) as part:
        part.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
