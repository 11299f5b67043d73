"""What a run left in its output folder, read for a report."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from lowrank.config.flag import parse_text
from lowrank.config.flux import FLUX_TRAIN
from lowrank.config.sd import SD_TRAIN, SDXL_TRAIN
from lowrank.errors import Refused
from lowrank.files import parse_toml, read_json, read_text
from lowrank.formats.delta import Delta
from lowrank.formats.read import read_adapter
from lowrank.report import tables

TABLE = 1 << 28  # bytes of a table of numbers that are read at most
COMMANDS = MappingProxyType({line.prog: line for line in (SD_TRAIN, SDXL_TRAIN, FLUX_TRAIN)})
_PICTURE = re.compile(
    r"(?:(?P<name>.*)_)?(?P<step>e?\d+|final)_(?P<prompt>\d{2,})_(?P<time>\d{14})(_(?P<seed>\d+))?\.png$"
)
_OF_STEP = re.compile(r"-(step)?(\d{6,})\.safetensors$")  # without "step": of an epoch


class Picture(NamedTuple):
    """A sample: its prompt's number, the step (or epoch) it was drawn after, and the file."""

    prompt: int
    step: str
    path: Path


class Layer(NamedTuple):
    """The size of a layer's change and how many directions carry it."""

    name: str
    norm: float  # ‖ΔW‖_F
    rank: int
    effective: float  # (Σσ²)² / Σσ⁴: 1 for one direction, `rank` for equal ones


@dataclass
class Run:
    """A run; empty parts are not in its folder."""

    folder: Path
    name: str  # in the page, different for each run
    command: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)  # (value, default) by flag
    versions: list[str] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)  # columns of loss.csv, NaN where empty
    validation: dict[str, list[float]] = field(default_factory=dict)
    norms: dict[str, list[float]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    adapters: list[tuple[float, Path]] = field(default_factory=list)  # (step, file), the last one last
    layers: list[Layer] = field(default_factory=list)


def read_run(folder: Path) -> Run:
    """Read an output folder, or the record of an earlier run in its `runs/`. `Refused` if it is none."""
    if not (folder / tables.LOSSES).is_file():
        raise Refused(
            f"{folder} has no {tables.LOSSES}; give the output folder of a run, or a folder of its runs/"
        )
    run = Run(folder, folder.name, losses=read_table(folder / tables.LOSSES))
    if (folder / "config.toml").is_file():
        text = read_text(folder / "config.toml", "settings")
        sections = parse_toml(text, folder / "config.toml")
        run.settings = {
            k: v for table in sections.values() if isinstance(table, dict) for k, v in table.items()
        }
        first, second, *_ = [*(line[2:] for line in text.splitlines()[:2]), "", ""]
        run.command = second
        run.changed = _changed(first.partition(":")[0], run.settings)
        run.name = str(run.settings.get("output_name") or folder.name)
    if (folder / "versions.txt").is_file():
        run.versions = read_text(folder / "versions.txt", "versions").splitlines()
    for part, name in (("validation", tables.VALIDATION), ("norms", tables.NORMS)):
        if (folder / name).is_file():
            setattr(run, part, read_table(folder / name))
    if (folder / tables.SUMMARY).is_file():
        summary = read_json(folder / tables.SUMMARY, "summary")
        run.summary = summary if isinstance(summary, dict) else {}
    if folder.parent.name == "runs":  # pictures and adapters of its name are those of the newest run
        return run
    run.pictures = _pictures(folder / "sample", str(run.settings.get("output_name") or ""))
    run.adapters = _adapters(run)
    if run.adapters:
        run.layers = _layers(run.adapters[-1][1])
    return run


def read_table(path: Path) -> dict[str, list[float]]:
    """The columns of a CSV file of numbers; NaN where a cell is empty. A row that a kill cut is left out."""
    columns: dict[str, list[float]] = {}
    for row in csv.DictReader(read_text(path, "numbers", TABLE).splitlines()):
        if None in row or not tables.is_whole(row):
            continue
        for name, text in row.items():
            value = parse_text(float, text or "")
            columns.setdefault(name, []).append(math.nan if value is None else value)
    return columns


def _changed(script: str, settings: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ from the defaults of the script, with the default."""
    if script not in COMMANDS:
        return {name: (value, None) for name, value in settings.items()}
    specs = COMMANDS[script].specs
    changed = {}
    for name, value in settings.items():
        spec = specs.get(name)
        default = None if spec is None else spec.default
        written = None if default is None or default == () or spec is None else spec.to_toml(default)
        ours = (
            value
            if spec is None
            else spec.to_toml(spec.from_text(value) if isinstance(value, str) else value)
        )
        if written != ours:
            changed[name] = (value, default)
    return changed


def _pictures(folder: Path, name: str) -> list[Picture]:
    pictures = []
    for path in sorted(folder.glob("*.png")) if folder.is_dir() else ():
        match = _PICTURE.match(path.name)
        if match and (match["name"] or "") == name:
            pictures.append(Picture(int(match["prompt"]), match["step"], path))
    return pictures


def step_order(step: str) -> float:
    """Where a picture's step stands among the others; the final pictures are last."""
    return math.inf if step == "final" else float(step.lstrip("e"))


def _adapters(run: Run) -> list[tuple[float, Path]]:
    """The adapter files of a run with their steps, in order; an epoch's file is of its last step."""
    name = str(run.settings.get("output_name") or "")
    steps, epochs = run.losses.get("step", []), run.losses.get("epoch", [])
    last_of = dict(zip(epochs, steps, strict=True)) if len(steps) == len(epochs) else {}
    files = []
    for path in run.folder.glob("*.safetensors"):
        match = _OF_STEP.search(path.name)
        if match and path.name[: match.start()] == name:
            number = float(match[2])
            files.append((number if match[1] else last_of.get(number, math.inf), path))
    whole = [run.folder / f"{name}.safetensors", run.folder / "pytorch_lora_weights.safetensors"]
    end = steps[-1] if steps else math.inf
    return [*sorted(files), *((end, path) for path in whole if path.is_file())]


def _layers(path: Path) -> list[Layer]:
    """The layers of an adapter that have one ΔW."""
    adapter = read_adapter(path, strict=False, foreign=True)
    return [_layer(adapter.name(place), delta) for place, delta in adapter.layers.items()]


def _layer(name: str, delta: Delta) -> Layer:
    with torch.no_grad():
        left = torch.linalg.qr(delta.up.double())[1]
        right = torch.linalg.qr(delta.down.double().T)[1]
        energies = torch.linalg.svdvals(delta.scale * left @ right.T).square()
    total = float(energies.sum())
    effective = total**2 / float(energies.square().sum()) if total else 0.0
    return Layer(name, math.sqrt(total), delta.rank, effective)


def smooth(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and the `width` − 1 before it, without NaNs."""
    out, window, total = [], [], 0.0
    for value in values:
        if not math.isnan(value):
            window.append(value)
            total += value
            if len(window) > width:
                total -= window.pop(0)
        out.append(total / len(window) if window else math.nan)
    return out
