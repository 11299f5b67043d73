"""An adapter as what every program can hold: for each place of a model one ΔW = scale·U·D, and perhaps
lengths.

Tools work on this alone, so that a method with one ΔW (see `names.thin`) is exported, resized, merged and
compared without a line of its own. Shapes: O out, I in with a convolution's kernel flattened into it, R rank.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank.adapters.layer import AdaptedLayer, Clock
from lowrank.adapters.method import Method
from lowrank.adapters.network_module import NetworkModule
from lowrank.adapters.targets import Layer
from lowrank.errors import Refused
from lowrank.formats.names import read_contents, thin
from lowrank.naming import flux as flux_names
from lowrank.naming.flux_join import strength
from lowrank.naming.places import LayerPath, adapter_family, check_family, places


class Static(NamedTuple):
    """ΔW = scale · up @ down beside W; with a magnitude W′ = magnitude ⊙ (W + ΔW)/‖W + ΔW‖ by rows."""

    up: Tensor  # (O, R)
    down: Tensor  # (R, I)
    scale: float
    magnitude: Tensor | None = None  # (O,)
    kernel: tuple[int, ...] = ()  # of a convolution: I = channels·kernel

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of ΔW (O, I) in fp32, or fp64 where the factors are."""
        wide = torch.promote_types(self.up.dtype, torch.float32)
        return self.scale * (self.up[start:stop].to(wide) @ self.down.to(wide))

    def changed(self, weight: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of W′ for rows [start, stop) of W, `weight` (…, I), in fp32 or wider."""
        sum_ = weight + self.delta(start, stop)
        if self.magnitude is None:
            return sum_
        norm = torch.linalg.vector_norm(sum_, dim=1)
        gain = self.magnitude[start:stop].to(sum_) / norm.masked_fill(norm == 0, 1)
        return gain[:, None] * sum_

    def norm(self) -> float:
        """‖ΔW‖_F, from the thin factors."""
        return abs(self.scale) * float(_inner(self.up, self.down, self.up, self.down)) ** 0.5

    def joined_kernel(self, factor: Tensor, rows: bool) -> Tensor:
        """A factor in a convolution's shape (…, kernel), or as it is; `rows` for the down."""
        if not self.kernel:
            return factor
        ones = self.kernel if rows else (1,) * len(self.kernel)
        return factor.reshape(len(factor), -1, *ones)


def _inner(up: Tensor, down: Tensor, other_up: Tensor, other_down: Tensor) -> Tensor:
    """⟨U D, U′ D′⟩ in float64, at least 0 where both are one."""
    left, right = up.double().T @ other_up.double(), down.double() @ other_down.double().T
    return (left * right).sum().clamp_min(0)


def distance(one: Static, other: Static) -> float:
    """‖ΔW − ΔW′‖_F of two layers, without forming either and without cancelling: QR of the joined factors."""
    up = torch.cat([one.scale * one.up.double(), -other.scale * other.up.double()], 1)
    down = torch.cat([one.down.double(), other.down.double()])
    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        return float(torch.linalg.norm(up @ down))
    left = torch.linalg.qr(up, mode="r")[1] if up.shape[0] > up.shape[1] else up
    right = torch.linalg.qr(down.T, mode="r")[1] if down.shape[1] > down.shape[0] else down.T
    return float(torch.linalg.norm(left @ right.T))


@dataclass(frozen=True)
class Plain:
    """An adapter file's layers by place, and what the file says."""

    source: str
    family: str  # "sd15", "sdxl", "flux"
    layers: Mapping[LayerPath, Static]
    metadata: Mapping[str, str] = field(default_factory=dict)
    raw: Mapping[LayerPath, Mapping[str, Tensor]] = field(
        default_factory=dict
    )  # the file's own tensors by role
    skipped: tuple[str, ...] = ()  # keys that are no adapter's

    def fact(self, name: str) -> str | None:
        """A fact of `lowrank.*` metadata, or None."""
        value = self.metadata.get(f"lowrank.{name}")
        return None if value in (None, "None") else value


def read(
    path: str | Path, family: str | None = None, method: Method | None = None, inside: str = ""
) -> Plain:
    """An adapter file of any dialect. Layers that FLUX's original files join are split, exactly.

    `family` names the kind of model where the file does not tell; `method` is the one that made the file,
    where it is known; `inside` is the component of a diffusers model that the file's paths are in. Raises
    `Refused` for what has no single ΔW, naming layer and reason.
    """
    layers, metadata, skipped = read_contents(path, () if method is None else roles_of(method))
    if inside:
        layers = {f"{inside}.{module}": roles for module, roles in layers.items()}
    if family is None:
        family = adapter_family(layers, metadata, str(path))
    else:
        check_family(layers, family, str(path))
    found: dict[LayerPath, Static] = {}
    raw: dict[LayerPath, Mapping[str, Tensor]] = {}
    seen: dict[LayerPath, str] = {}
    for module, roles in layers.items():
        whole = static(module, roles, str(path), metadata.get("lowrank.method"), method)
        for place, piece in places(module):
            if place in seen:
                raise Refused(
                    f"{path} names {place.path} twice, as {seen[place]} and as {module}; it holds two "
                    "adapters at once, take one of them out"
                )
            seen[place] = module
            part = _cut(whole, piece, module, str(path))
            if part.scale == 0:  # an alpha of 0 in another file would be read in two ways
                part = part._replace(up=torch.zeros_like(part.up), scale=1.0)
            if (piece is not None or whole.scale == 0) and not part.up.any() and part.magnitude is None:
                continue  # zero rows of a joined layer stand for one that was not adapted
            found[place] = part
            if piece is None:
                raw[place] = roles
    if not found:
        raise Refused(f"{path} holds only layers whose change is zero; it has nothing to convert")
    return Plain(str(path), family, found, metadata, raw, tuple(skipped))


def made_by(metadata: Mapping[str, str], source: str) -> Method | None:
    """The method that metadata name, with its options; None where they name none of ours."""
    name = metadata.get("lowrank.method")
    if not name or not name.isidentifier() or importlib.util.find_spec(f"networks.{name}") is None:
        return None
    create = getattr(importlib.import_module(f"networks.{name}"), "create_network", None)
    facade = getattr(create, "__self__", None)
    return facade.made(metadata, source) if isinstance(facade, NetworkModule) else None


def roles_of(method: Method) -> tuple[str, ...]:
    """The names of a method's tensors in files, beside those that every file has."""
    factor = method.require_factor()
    return (*factor.trained, *factor.frozen, *factor.record, *(("router",) if method.experts else ()))


def static(
    module: str,
    roles: Mapping[str, Tensor],
    source: str,
    made_by: str | None = None,
    method: Method | None = None,
) -> Static:
    """One layer of a file. Raises `Refused` where its ΔW depends on the input or it is not whole."""
    experts = roles["router"].shape[0] if "router" in roles else 1
    if experts > 1:
        raise Refused(
            f"{module} in {source} has {experts} experts and a router: its ΔW depends on the input, so no "
            "file with one ΔW can hold it; use it live, or let tools/export_lora.py write the nearest one "
            "with --model BASE --calibrate PROMPTS"
        )
    if method is None:
        up, down, scale = thin(module, roles, source, made_by)
        kernel = next((tuple(roles[r].shape[2:]) for r in ("down", "delta_r") if r in roles), ())
    else:
        up, down, scale, kernel = _by_method(module, roles, source, method)
    magnitude = roles.get("magnitude")
    if magnitude is not None:
        if magnitude.numel() != up.shape[0] or (magnitude.dim() > 1 and magnitude.shape[0] != up.shape[0]):
            raise Refused(
                f"{module}.dora_scale in {source} is {tuple(magnitude.shape)} and the layer has "
                f"{up.shape[0]} outputs; a length for each input (LyCORIS' wd_on_output=False) is another "
                "method, use it there"
            )
        magnitude = magnitude.flatten()
    return Static(up, down, scale, magnitude, kernel)


def _by_method(
    module: str, roles: Mapping[str, Tensor], source: str, method: Method
) -> tuple[Tensor, Tensor, float, tuple[int, ...]]:
    """U (O, R), D (R, I), s and the kernel, as the method's own layer computes them.

    The layer is put on a host of the file's shapes whose weight is one number, so that it needs no model.
    """
    factor = method.require_factor()
    needed = [role for role in roles_of(method) if role not in factor.record and role not in roles]
    if needed:
        raise Refused(
            f"{module} in {source} has no {', '.join(needed)}, only {', '.join(sorted(roles))}; train with "
            "--save_basis full to keep what is frozen, or use a file that is whole"
        )
    up, down = roles[factor.chains[0].up[0]], roles[factor.chains[0].down[-1]]
    rank = factor.rank_in(factor.chains[0].down[-1], down.shape)
    kernel = tuple(down.shape[2:])
    one = 4 if kernel else 2  # dimensions of the up, without those of experts
    outs = up.shape[-one] if up.dim() >= one else 0
    if rank is None or not rank or not outs or down.dim() not in (2, 4):
        raise Refused(
            f"{source}: {module} has factors of {tuple(up.shape)} and {tuple(down.shape)}, which are neither "
            "matrices nor a convolution's kernels of rank 1 or more; export the adapter again"
        )
    scale = strength(roles, rank)
    host = phantom(outs, down.shape[1], kernel)
    layer = AdaptedLayer(module, host, method, rank, scale * rank, Clock(method))
    layer.load({role: value for role, value in roles.items() if role != "magnitude"}, source)
    with torch.no_grad():
        U, D = (factor.detach() for factor in layer.factors())
    stored = torch.promote_types(up.dtype, down.dtype)
    U = (U[0] if method.experts else U).flatten(1)
    D = D.flatten(1)
    if method.gate is not None and factor.copy is not None:  # so that the leading ranks are still a prefix
        U = U.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
        D = D.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
    return U.to(stored), D.to(stored), scale, kernel


def phantom(outs: int, ins: int, kernel: tuple[int, ...], value: Tensor | None = None) -> Layer:
    """A Linear or Conv2d of any size that takes no memory: its rows are all `value` (I[, k, k]), or zero."""
    shape = (ins, *kernel)
    if kernel:
        height, width = kernel
        padding = (height // 2, width // 2)
        host: Layer = nn.Conv2d(ins, outs, (height, width), padding=padding, bias=False, device="meta")
    else:
        host = nn.Linear(ins, outs, bias=False, device="meta")
    row = torch.zeros(1).expand(shape) if value is None else value.reshape(shape)
    host.weight = nn.Parameter(row.expand(outs, *shape), requires_grad=False)
    return host


def _cut(whole: Static, piece: flux_names.Piece | None, module: str, source: str) -> Static:
    """The rows of a joined layer that belong to one of its layers.

    Where the up is block diagonal, as kohya's split_qkv and our export write it, each block takes its own
    ranks; else all share the down.
    """
    if "adaLN" in module:  # shift, scale there; scale, shift in diffusers
        return swapped(whole)
    if piece is None:
        return whole
    outs = whole.up.shape[0]
    if outs % piece.total:
        raise Refused(f"{module} in {source} has {outs} rows, which are not {piece.total} equal shares")
    start, stop = piece.start * outs // piece.total, piece.stop * outs // piece.total
    up = whole.up[start:stop]
    own = up.ne(0).any(0)
    elsewhere = whole.up[:start].ne(0).any(0) | whole.up[stop:].ne(0).any(0)
    used = own if not bool((own & elsewhere).any()) else torch.ones_like(own)
    # a rank that nobody uses stays with the first layer, so that nothing is dropped
    magnitude = None if whole.magnitude is None else whole.magnitude[start:stop]
    if bool(used.all()) or not bool(used.any()):
        return Static(up, whole.down, whole.scale, magnitude)
    return Static(up[:, used], whole.down[used], whole.scale, magnitude)


def swapped(layer: Static) -> Static:
    """The layer with the halves of its rows exchanged."""
    up = torch.cat(layer.up.chunk(2)[::-1])
    magnitude = None if layer.magnitude is None else torch.cat(layer.magnitude.chunk(2)[::-1])
    return layer._replace(up=up, magnitude=magnitude)


# ---------- another rank


def resized(layer: Static, rank: int) -> tuple[Static, float, float]:
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
