"""The one reader of adapters: any program's file as an `Adapter`, with ΔW = scale·U·D by layer of a model."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.adapter_file import (
    AdapterFile,
    RawFile,
    Roles,
    open_adapter_file,
    read_adapter_file,
    warn_zero_alpha,
)
from lowrank.adapters.gate import Schedule
from lowrank.adapters.method import Method
from lowrank.adapters.network_module import method_made_by
from lowrank.errors import Refused
from lowrank.formats import tlora
from lowrank.formats.delta import LORA, Delta, delta_of, is_orthogonal, method_for, swapped
from lowrank.formats.foreign import ForeignLayer, Split, refuse_foreign, split
from lowrank.naming import flux as flux_names
from lowrank.naming.families import Model, layers_of, layers_per_block, model_of
from lowrank.naming.places import LayerPath, places
from lowrank.unused_keys import CORE, ForeignKey, refuse_unused, usage

# layers that the T-LoRA authors' FLUX processors make for single blocks, and never run
UNREACHED = "layer that is never run"
_DEAD = re.compile(r"^single_transformer_blocks\.\d+\.attn\.(to_out\.0|add_[qkv]_proj)$")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapter:
    """An adapter: its layers by layer path, and the facts of its file."""

    source: str
    family: str  # "sd15", "sdxl", "flux"; empty where the file fits several
    layers: Mapping[LayerPath, Delta]
    metadata: Mapping[str, str] = field(default_factory=dict)
    raw: Mapping[LayerPath, Mapping[str, Tensor]] = field(default_factory=dict)  # the file's tensors by role
    modules: Mapping[LayerPath, str] = field(default_factory=dict)  # the names of the layers in the file
    method: Method | None = None  # that the file names, if networks/ has it
    schedule: Schedule | None = None  # of the open ranks of a T-LoRA
    not_understood: Sequence[ForeignKey] = ()  # keys that are not used
    refusals: Mapping[LayerPath, str] = field(default_factory=dict)  # why a layer has no ΔW, where not strict
    tensors: int = 0  # in the file
    known: Collection[LayerPath] = ()  # layers of the model that the file was held against
    per_block: int = 2  # layers in a block of the U-Net, which SDXL's names in kohya's files depend on
    foreign: Mapping[LayerPath, ForeignLayer] = field(default_factory=dict)  # that are no pair, if read

    def fact(self, name: str) -> str | None:
        """A fact of `lowrank.*` metadata, or None."""
        value = self.metadata.get(f"lowrank.{name}")
        return None if value in (None, "None") else value

    @property
    def model_layers(self) -> Collection[LayerPath]:
        """The layers of the base model in use, else of the family's published model."""
        return self.known or layers_of(self.family, self.per_block)

    @property
    def usage(self) -> str:
        """One line: how many tensors of the file are used, and what is left out by kind and count."""
        return usage(self.source, self.tensors, self.not_understood)

    def refuse_unused(self) -> None:
        """Raise `Refused` where tensors of the file are not used, for --strict."""
        refuse_unused(self.source, self.tensors, self.not_understood)

    def without_foreign(self) -> Adapter:
        """The adapter without layers that are no pair of factors; their tensors are listed as not used."""
        left_out = [
            ForeignKey(f"{layer.module}.{name}", layer.module, layer.kind.name)
            for layer in self.foreign.values()
            for name in layer.tensors
        ]
        return replace(self, foreign={}, not_understood=[*self.not_understood, *left_out])

    @property
    def path(self) -> Path:
        return Path(self.source)

    def name(self, place: LayerPath) -> str:
        """A layer's name in the file; its path in diffusers' model where the file has it in a joined one."""
        module = self.modules.get(place, place.path)
        return module if places(module)[0][1] is None else place.path

    def has_magnitude(self) -> bool:
        """Whether a layer has lengths of its rows (DoRA)."""
        return any("magnitude" in roles for roles in self.raw.values())

    def require_deltas(self) -> None:
        """Raise `Refused` where a layer has no ΔW of its own."""
        for refusal in self.refusals.values():
            raise Refused(refusal)


def layout_facts(adapter: Adapter) -> dict[str, str]:
    """Metadata on the U-Net's blocks, which SDXL's original names depend on, where they are not SDXL's."""
    return {} if adapter.per_block == 2 else {"lowrank.layers_per_block": str(adapter.per_block)}


def read_adapter(
    file: str | Path | RawFile,
    family: str | None = None,
    *,
    base: Collection[LayerPath] = (),
    at: float | None = None,
    schedule: Mapping[str, Any] | None = None,
    start: Callable[[str], Tensor] | None = None,
    precision: torch.dtype | None = None,
    strict: bool = True,
    foreign: bool = False,
) -> Adapter:
    """Read an adapter file of any dialect and method by layer; FLUX's joined layers are split, exactly.

    `family` is the kind of model, for files that fit several, and `base` has the layers of the model in use;
    without it the layers are held against the family's published model. `at`, in 0..1000, bakes a T-LoRA at a
    timestep, `schedule` is SimpleTuner's `_tlora_config`, `start(module)` gives W (O, I) of the base where a
    T-LoRA leaves out its start. Products of factors are computed in `precision` at least, and stored in the
    file's own without one. With `foreign`, layers that are no pair of factors are read too (`foreign`);
    without it their keys are in `not_understood`. Raises `Refused` for what has no ΔW of its own; with
    `strict` off, the reasons are in `refusals`, layers that change nothing stay, and the family may be
    unknown.
    """
    raw = file if isinstance(file, RawFile) else open_adapter_file(file)
    method = method_made_by(raw.metadata, raw.source)
    contents = read_adapter_file(raw, method.file_roles() if method else ())
    whole = _split(contents, raw, foreign)
    every, contents = contents, replace(contents, layers=whole.pairs)
    if contents.may_be_official_qr:
        logger.warning(
            "%s is read as a plain LoRA; if it is an official QR-LoRA file, which has the same keys and no "
            "initial copy, it needs the residual it was trained on and is not what it adds",
            raw.source,
        )
    warn_zero_alpha(raw.source, contents.layers)
    layers = {module: roles for module, roles in contents.layers.items() if not _DEAD.match(module)}
    unused = [*(whole if foreign else contents).not_understood, *_unreached(contents)]
    gate = None
    may_be_tlora = schedule is not None or any(key in raw.metadata for key in tlora.SCHEDULE_KEYS)
    if may_be_tlora or any(map(is_orthogonal, layers.values())):
        gate = tlora.schedule_of(raw.source, layers, raw.metadata, schedule)
    if start is not None:
        layers = tlora.with_copies(layers, start, raw.metadata, raw.source)
    names = [*layers, *(whole.modules.values() if foreign else ())]
    if strict or base:
        model = model_of(names, raw.metadata, raw.source, family, base, sizes_of(layers))
    else:
        model = Model(family or "", layers_per_block(names, raw.metadata, sizes_of(layers)))
    if foreign and model.per_block != 2:
        whole = _split(every, raw, foreign, model.per_block)
    wide = torch.float32 if at is not None and precision is None else precision
    adapter = Adapter(
        raw.source, model.family, {}, raw.metadata, method=method, schedule=gate,
        not_understood=unused, per_block=model.per_block, tensors=contents.tensors,
        known=base, foreign=whole.foreign if foreign else {},
    )  # fmt: skip
    adapter = _by_place(adapter, replace(contents, layers=layers), wide, strict)
    if foreign:
        adapter = replace(adapter, modules={**whole.modules, **adapter.modules})
    return adapter if at is None or gate is None else baked(adapter, at)


def _unreached(contents: AdapterFile) -> Iterator[ForeignKey]:
    """The keys of layers that are never run."""
    for module in filter(_DEAD.match, contents.layers):
        yield from (ForeignKey(key, module, UNREACHED) for key in contents.keys[module].values())


def sizes_of(layers: Mapping[str, Roles]) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the layers that are plain pairs of factors."""
    return {
        module: (roles["up"].shape[0], roles["down"].shape[1])
        for module, roles in layers.items()
        if all(roles[role].dim() in (2, 4) for role in ("up", "down") if role in roles)
        and {"up", "down"} <= roles.keys()
    }


def _split(contents: AdapterFile, raw: RawFile, foreign: bool, per_block: int = 2) -> Split:
    """The file's layers by kind. Raises `Refused` where none of them can be used."""
    if contents.layers and not contents.not_understood:
        return Split(dict(contents.layers), {}, {}, ())
    damaged: dict[str, str] = {}
    whole = split(contents, raw.state, None if foreign else damaged, per_block)
    if not whole.pairs and not (foreign and whole.foreign):
        if damaged:
            raise Refused(next(iter(damaged.values())))
        if whole.foreign:
            refuse_foreign(whole.foreign.values(), raw.source)
        _refuse_no_adapter(contents)
    return whole


def _refuse_no_adapter(contents: AdapterFile) -> None:
    made_by = contents.fact("method")
    if made_by and any(key.kind == CORE for key in contents.not_understood):
        raise Refused(
            f"{contents.source} was made by networks.{made_by}, which does not exist; use the release "
            "that made it"
        )
    examples = ", ".join(key.key for key in contents.not_understood[:3]) or "nothing at all"
    raise Refused(
        f"{contents.source} has no adapter that is known here: its tensors are named like {examples}; "
        "give a LoRA, ΔR or QR-LoRA file"
    )


def _by_place(
    adapter: Adapter, contents: AdapterFile, precision: torch.dtype | None, strict: bool
) -> Adapter:
    deltas: dict[LayerPath, Delta] = {}
    raw: dict[LayerPath, Mapping[str, Tensor]] = {}
    modules: dict[LayerPath, str] = {}
    refusals: dict[LayerPath, str] = {}
    for module, roles in contents.layers.items():
        owners = places(module, adapter.per_block)
        delta, refusal = None, ""
        try:
            delta = delta_of(module, roles, adapter.source, adapter.method, precision)
        except Refused as refused:
            if strict:
                raise
            refusal = str(refused)
        for place, piece in owners:
            if place in modules:
                raise Refused(
                    f"{adapter.source} names {place.path} twice, as {modules[place]} and as {module}; it "
                    "holds two adapters at once, take one of them out"
                )
            modules[place] = module
            if delta is None:
                refusals[place], raw[place] = refusal, roles
                continue
            part, ranks = _cut(delta, piece, module, adapter.source)
            if strict and part.scale == 0:  # an alpha of 0 in another file would be read in two ways
                part = part._replace(up=torch.zeros_like(part.up), scale=1.0)
            empty = (piece is not None or delta.scale == 0) and not part.up.any() and part.magnitude is None
            if strict and empty:
                continue  # zero rows of a joined layer stand for one that was not adapted
            deltas[place] = part
            raw[place] = roles if piece is None else _cut_roles(roles, piece, ranks, adapter.method)
    if strict and not deltas and not adapter.foreign:
        raise Refused(f"{adapter.source} holds only layers whose change is zero; it has nothing to convert")
    return replace(adapter, layers=deltas, raw=raw, modules=modules, refusals=refusals)


# ---------- FLUX's joined layers


def _cut(
    whole: Delta, piece: flux_names.Piece | None, module: str, source: str
) -> tuple[Delta, Tensor | None]:
    """The rows of a joined layer that belong to one of its layers, and which ranks they use (None: all).

    Where the up is block diagonal, as kohya's split_qkv and our export write it, each block takes its own
    ranks; else all share the down.
    """
    if "adaLN" in module:  # shift, scale there; scale, shift in diffusers
        return swapped(whole), None
    if piece is None:
        return whole, None
    outs = whole.up.shape[0]
    if outs % piece.total:
        raise Refused(f"{module} in {source} has {outs} rows, which are not {piece.total} equal shares")
    if whole.by_input:
        raise Refused(
            f"{module} in {source} is several layers in one, with a common length for each input, and cannot "
            "be split; use the file with the program that made it"
        )
    start, stop = piece.start * outs // piece.total, piece.stop * outs // piece.total
    up = whole.up[start:stop]
    inside = up.ne(0).any(0)
    outside = whole.up[:start].ne(0).any(0) | whole.up[stop:].ne(0).any(0)
    used = inside if not bool((inside & outside).any()) else torch.ones_like(inside)
    magnitude = None if whole.magnitude is None else whole.magnitude[start:stop]
    if bool(used.all()) or not bool(used.any()):
        return Delta(up, whole.down, whole.scale, magnitude), None
    return Delta(up[:, used], whole.down[used], whole.scale, magnitude), used


def _cut_roles(
    roles: Mapping[str, Tensor], piece: flux_names.Piece, ranks: Tensor | None, made_by: Method | None
) -> Roles:
    """The tensors of one part of a joined layer; none where ranks were taken out of a product."""
    sides = method_for(roles, made_by).require_factor().sides()
    halves = [role for role, sizes in sides.items() if sizes[0] == "rank" and role in roles]
    if ranks is not None and any(len(roles[role]) != len(ranks) for role in halves):
        return {}
    part: Roles = {}
    for role, value in roles.items():
        sizes = sides.get(role, ("outputs",) if role == "magnitude" else ())
        if sizes[:1] == ("outputs",):
            value = value[piece.start * len(value) // piece.total : piece.stop * len(value) // piece.total]
        if ranks is not None and "rank" in sizes:
            value = value[ranks] if sizes[0] == "rank" else value[:, ranks]
        if ranks is not None and role == "alpha":
            value = value * int(ranks.sum()) / len(ranks)
        part[role] = value
    return part


# ---------- T-LoRA at one timestep


def baked(adapter: Adapter, at: float) -> Adapter:
    """The plain LoRA that a T-LoRA is at one timestep in 0..1000; text encoders have all ranks open."""
    schedule = adapter.schedule
    if schedule is None:
        raise Refused(
            f"{adapter.source} is no T-LoRA and has one ΔW for all timesteps; leave --at-timestep out"
        )
    if not 0 <= at <= schedule.horizon:
        raise Refused(f"timestep {at:g} is not between 0 (picture) and {schedule.horizon} (noise)")
    adapter.require_deltas()
    layers: dict[LayerPath, Delta] = {}
    for place, layer in adapter.layers.items():
        count = layer.rank
        if place.part == "unet":
            count = int(schedule.open(torch.tensor([float(at)]), layer.rank))
        alpha = float(torch.tensor(layer.scale * count))  # as a file holds it
        layers[place] = layer._replace(up=layer.up[:, :count], down=layer.down[:count], scale=alpha / count)
    kept = ("ss_", "modelspec.", "lowrank.base")
    metadata = {key: value for key, value in adapter.metadata.items() if key.startswith(kept)}
    metadata |= {
        "lowrank.method": LORA.name,
        "lowrank.exported_from": adapter.metadata.get("lowrank.method", "unknown"),
        "tlora_baked_at": f"{at:g}",
    }
    return replace(adapter, layers=layers, raw={}, metadata=metadata, method=LORA, schedule=None)


def masked(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The T-LoRAs among the adapters that are not baked at one timestep."""
    return [adapter for adapter in adapters if adapter.schedule is not None]


def refuse_masked(adapters: Sequence[Adapter]) -> None:
    """Raise `Refused` for a T-LoRA that is not baked at one timestep: it has no one ΔW."""
    if gated := masked(adapters):
        raise Refused(
            f"{gated[0].source} is a T-LoRA, whose ΔW depends on the timestep, and a merged file has one "
            "ΔW; choose a timestep with --at_timestep"
        )
