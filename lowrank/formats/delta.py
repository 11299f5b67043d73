"""ΔW of one layer of an adapter file, computed by the layer of the method that the file is of.

The method is the one that the file names, else the one whose tensors it has, so that no method needs a line
here. Shapes: O out, I in with a convolution's kernel flattened into it, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank.adapters.clock import Clock
from lowrank.adapters.layer import AdaptedLayer
from lowrank.adapters.method import LORA_FACTOR, Method
from lowrank.adapters.network_module import network_named
from lowrank.adapters.targets import Layer
from lowrank.errors import Refused
from lowrank.naming import keys
from lowrank.naming.flux_join import strength

LORA = Method(keys.LORA, LORA_FACTOR)


class Delta(NamedTuple):
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


def distance(first: Delta, second: Delta) -> float:
    """‖ΔW − ΔW′‖_F of two layers, without forming either and without cancelling: QR of the joined factors."""
    up = torch.cat([first.scale * first.up.double(), -second.scale * second.up.double()], 1)
    down = torch.cat([first.down.double(), second.down.double()])
    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        return float(torch.linalg.norm(up @ down))
    left = torch.linalg.qr(up, mode="r")[1] if up.shape[0] > up.shape[1] else up
    right = torch.linalg.qr(down.T, mode="r")[1] if down.shape[1] > down.shape[0] else down.T
    return float(torch.linalg.norm(left @ right.T))


def swapped(layer: Delta) -> Delta:
    """The layer with the halves of its rows exchanged."""
    up = torch.cat(layer.up.chunk(2)[::-1])
    magnitude = None if layer.magnitude is None else torch.cat(layer.magnitude.chunk(2)[::-1])
    return layer._replace(up=up, magnitude=magnitude)


# ---------- from the tensors of a file


def method_for(roles: Mapping[str, Tensor], made_by: Method | None) -> Method:
    """The method that computes a layer: the one the file names, if the tensors fit, else by the tensors."""
    if made_by is not None and roles.keys() & set(made_by.require_factor().trained):
        return made_by
    name = next((name for role, name in keys.METHOD_OF.items() if role in roles), None)
    module = network_named(name) if name else None
    return module.made({}) if module else LORA


def is_orthogonal(roles: Mapping[str, Tensor]) -> bool:
    """Whether a layer is of the orthogonal T-LoRA: P·Λ·Q instead of an up and a down."""
    return any(keys.METHOD_OF.get(role) == "tlora" for role in roles)


def missing_roles(roles: Mapping[str, Tensor], method: Method) -> list[str]:
    """The factors that a layer lacks for its ΔW."""
    factor = method.require_factor()
    needed = [role for role in (*factor.trained, *method.file_roles()) if role not in factor.saved_only]
    return [role for role in dict.fromkeys(needed) if role not in roles]


def missing_from(roles: Mapping[str, Tensor], made_by: Method | None) -> str | None:
    """What a layer was saved without: its "basis", its "initial copy", or other factors; None where whole."""
    method = method_for(roles, made_by)
    absent, factor = set(missing_roles(roles, method)), method.require_factor()
    if not absent:
        return None
    if absent <= set(factor.copies):
        return "initial copy"
    return "basis" if absent <= factor.frozen else "factors"


def delta_of(
    module: str,
    roles: Mapping[str, Tensor],
    source: str = "the file",
    made_by: Method | None = None,
    precision: torch.dtype | None = None,
) -> Delta:
    """ΔW of one layer of a file, as the method's own layer computes it.

    The layer is put on a host of the file's shapes whose weight is one number, so that it needs no model.
    Raises `Refused` where ΔW depends on the input, a factor is absent or does not fit.
    """
    experts = roles[keys.ROUTER].shape[0] if keys.ROUTER in roles else 1
    if experts > 1:
        raise Refused(
            f"{module} in {source} has {experts} experts and a router: its ΔW depends on the input, so no "
            "file with one ΔW can hold it; use it live, or let tools/export_lora.py write the nearest one "
            "with --model BASE --calibrate PROMPTS"
        )
    method = method_for(roles, made_by)
    factor = method.require_factor()
    check_shapes(module, roles, source, method)
    if absent := missing_roles(roles, method):
        _refuse_absent(module, roles, source, method, absent)
    chain = factor.chains[0]
    up, down = roles[chain.up[0]], roles[chain.down[-1]]
    rank, kernel = factor.rank_in(chain.down[-1], down.shape) or 1, tuple(down.shape[2:])
    scale = strength(roles, rank)
    if factor == LORA_FACTOR and up.dim() == down.dim() and math.prod(up.shape[2:]) == 1:
        U, D = up.flatten(1), down.flatten(1)  # a plain pair needs no layer
        return Delta(U, D, scale, _magnitude(module, roles, U, source), kernel)
    host = weightless_host(up.shape[-4 if kernel else -2], down.shape[1], kernel)
    layer = AdaptedLayer(module, host, method, rank, scale * rank, Clock(method))
    stored = torch.promote_types(up.dtype, down.dtype)
    if torch.float64 in (stored, precision):
        layer.to(torch.float64)
    used = {role: value for role, value in roles.items() if role in method.file_roles()}
    layer.load(used, source)
    with torch.no_grad():
        U, D = (factor.detach() for factor in layer.factors())
    U, D = (U[0] if method.experts else U).flatten(1), D.flatten(1)
    if method.gate is not None and factor.copy is not None:  # so that the leading ranks are still a prefix
        U = U.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
        D = D.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
    if factor.copy is None and len(factor.chains) == len(chain.up) == len(chain.down) == 1:
        U, D = U.to(up.dtype), D.to(down.dtype)  # no product: the file's own numbers
    elif precision is None:
        U, D = U.to(stored), D.to(stored)
    return Delta(U, D, scale, _magnitude(module, roles, U, source), kernel)


def _magnitude(module: str, roles: Mapping[str, Tensor], up: Tensor, source: str) -> Tensor | None:
    magnitude = roles.get("magnitude")
    if magnitude is None:
        return None
    if magnitude.numel() != up.shape[0] or (magnitude.dim() > 1 and magnitude.shape[0] != up.shape[0]):
        raise Refused(
            f"{module}.dora_scale in {source} is {tuple(magnitude.shape)} and the layer has {up.shape[0]} "
            "outputs; a length for each input (LyCORIS' wd_on_output=False) is another method, use it there"
        )
    return magnitude.flatten()


def _refuse_absent(
    module: str, roles: Mapping[str, Tensor], source: str, method: Method, absent: Sequence[str]
) -> None:
    factor = method.require_factor()
    way_out = "the file is not whole, use another"
    if set(absent) <= factor.frozen:
        way_out = "train with --save_basis full to keep it"
        if method.gate is not None:
            way_out = "put it in with tools/import_lora.py --model BASE, as LyCORIS' files leave it out"
    raise Refused(
        f"{module} in {source} has no {', '.join(absent)}, only {', '.join(sorted(roles))}; {way_out}"
    )


def check_shapes(
    module: str, roles: Mapping[str, Tensor], source: str, method: Method | None = None
) -> dict[str, int]:
    """`outputs` O, `rank` R and `inputs` I of a layer, as far as its factors tell; kernels are part of I.

    Raises `Refused`, naming module, role and shapes, for a factor that is no matrix, for factors that do not
    belong together, and for an alpha that is not one number.
    """
    method = method or method_for(roles, None)
    sizes: dict[str, int] = {}
    for role, sides in method.require_factor().sides().items():
        if role not in roles:
            continue
        value, shape = roles[role], tuple(roles[role].shape)
        if method.experts and role == method.experts.role and value.dim() in (3, 5):
            value = value[0]
        if len(sides) == 1:
            value = value.flatten()
        elif value.dim() not in (2, 4) or 0 in shape:
            raise Refused(
                f"{source}: {module}.{role} is {shape}, which is neither a matrix nor a convolution's kernel "
                "(4 sizes) of rank 1 or more; export the adapter again"
            )
        for side, size in zip(sides, value.shape if len(sides) == 1 else value.flatten(1).shape, strict=True):
            if sizes.setdefault(side, size) != size:
                raise Refused(
                    f"{source}: {module} has {side} {sizes[side]}, {size} in {role!r} {shape}; "
                    "its factors do not belong together, export the adapter again"
                )
    if "alpha" in roles and roles["alpha"].numel() != 1:
        raise Refused(
            f"{source}: {module}.alpha is {tuple(roles['alpha'].shape)} and must be one number; export the "
            "adapter again"
        )
    return sizes


def weightless_host(outs: int, ins: int, kernel: tuple[int, ...], value: Tensor | None = None) -> Layer:
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
