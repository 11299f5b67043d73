"""Adapter files of any dialect, read into one shape: layers by module, tensors by role.

Roles: `up` (O×R), `down` (R×I), `q` (O×R, orthonormal basis), `base_r` and `delta_r` (R×I), `alpha` (0-d). ΔR
files hold q, base_r, delta_r; QR-LoRA files up and down with their initial copies q and base_r; plain LoRA
files up and down. T-LoRA files have up and down, or p_layer, lambda_layer, q_layer and base_*
(`tlora_files`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.adapters import dialect
from lowrank.adapters.gate import Schedule
from lowrank.errors import Refused
from lowrank.formats.tlora import COPY, ROLES, Layers, interleaved
from lowrank.naming import keys
from lowrank.naming.flux_join import split_joined, strength
from lowrank.tensors import read_tensors

_SIDES = {
    "q": ("outputs", "rank"),
    "delta_r": ("rank", "inputs"),
    "base_r": ("rank", "inputs"),
    "down": ("rank", "inputs"),
    "up": ("outputs", "rank"),
    "p_layer": ("outputs", "rank"),
    "q_layer": ("rank", "inputs"),
    "base_p": ("outputs", "rank"),
    "base_q": ("rank", "inputs"),
}
_UNET = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b")
_BASIS = ("q", "base_r")  # what files may be saved without

logger = logging.getLogger(__name__)


class Thin(NamedTuple):
    """ΔW = scale · up @ down, exactly; up (O, R'), down (R', I) with convolution kernels flattened into I."""

    up: Tensor
    down: Tensor
    scale: float


class Contents(NamedTuple):
    """An adapter file: its layers, what it says about itself, and the keys that are no adapter's."""

    layers: Layers
    metadata: dict[str, str]
    skipped: list[str]


def read_layers(path: str | Path) -> tuple[Layers, dict[str, str]]:
    """`read_contents` without the keys that are no adapter's; FLUX's joined layers come apart."""
    layers, metadata, _ = read_contents(path)
    return split_joined(layers), metadata


def read_contents(path: str | Path, roles: Collection[str] = ()) -> Contents:
    """({module: {role: tensor}}, metadata, …) of an adapter file; modules lose the `transformer.` prefix.

    Reads native, PEFT/diffusers, kohya, LyCORIS and official QR-LoRA keys, the latter with or without the
    repeated `to_out.0`; float8 becomes fp32, and the middle of a LyCORIS convolution is folded into its down.
    `roles` are further names of tensors, which a method's files have.
    Raises `Refused` when the file is not whole, holds no adapter, one layer twice, or values that are no
    finite numbers.
    """
    state, metadata = read_tensors(path)
    layers: Layers = {}
    strange = []
    for key, value in state.items():
        module, _, last = key.rpartition(".")
        found = keys.role_of(key) or ((module, last) if module and last in roles else None)
        if found is None:
            strange.append(key)
            continue
        own, role = layers.setdefault(keys.module_path(found[0]), {}), found[1]
        if role in own:
            raise Refused(
                f"{path} gives the {role} of {keys.module_path(found[0])} twice, once as {key}; it holds the "
                "adapters of two models or two dialects at once, take one of them out"
            )
        value = number(value, key, path)
        if role == "magnitude" and not key.endswith(keys.KOHYA["magnitude"]):
            value = value.flatten()  # PEFT's has an axis in front for a convolution
        own[role] = value
    if not layers:
        raise Refused(
            f"{path} holds no adapter this program knows: its tensors are named like "
            f"{', '.join(strange[:3]) or 'nothing at all'}; give a LoRA, ΔR or QR-LoRA file"
        )
    for module, own in layers.items():
        if "mid" in own:
            own["down"] = _untucked(module, own.pop("mid"), own.get("down"), path)
    if any(key.endswith(f".{keys.OLD_UP}") for key in state) and not any("q" in r for r in layers.values()):
        logger.warning(
            "%s is read as a plain LoRA; if it is an official QR-LoRA file, which has the same keys and no "
            "initial copy, it needs the residual it was trained on and is not what it adds",
            path,
        )
    dialect.warn_zero_alphas(str(path), layers)
    return Contents(layers, metadata, strange)


def _untucked(module: str, middle: Tensor, down: Tensor | None, path: str | Path) -> Tensor:
    """The down (R, I, k, k) of LyCORIS' three convolutions: 1×1 (R, I), k×k `middle` (R, R, k, k), 1×1 up."""
    if down is None or middle.dim() != 4 or down.flatten(1).shape[0] != middle.shape[1]:
        raise Refused(
            f"{path}: {module}.lora_mid is {tuple(middle.shape)} and does not fit its lora_down "
            f"{None if down is None else tuple(down.shape)}; export the adapter again"
        )
    return torch.einsum("rskl,si->rikl", middle.float(), down.flatten(1).float())


def number(value: Tensor, key: str, path: str | Path) -> Tensor:
    """A tensor of an adapter file as one that can be computed with: float8 becomes fp32.

    Raises `Refused` for whole numbers, sparse tensors, NaN and infinities.
    """
    if str(value.dtype).startswith("torch.float8"):
        value = value.float()  # float8 has no arithmetic
    usable = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if value.layout != torch.strided or (value.dtype not in usable and not key.endswith(".alpha")):
        raise Refused(
            f"{key} in {path} is {str(value.dtype).removeprefix('torch.')}, which is no plain floating-point "
            "tensor; save the adapter in fp32, fp16 or bf16"
        )
    if not torch.isfinite(value).all():
        raise Refused(f"{path} holds NaN or infinite values in {key}; use an earlier checkpoint")
    return value


def sizes(module: str, roles: Mapping[str, Tensor], source: str = "the file") -> dict[str, int]:
    """`outputs` O, `rank` R and `inputs` I of a layer, as far as its factors tell; kernels are part of I.

    Raises `Refused`, naming module, role and shapes, for a factor that is no matrix, for factors that do not
    belong together, and for an alpha that is not one number.
    """
    found: dict[str, int] = {}
    for role, sides in _SIDES.items():
        if role not in roles:
            continue
        shape = tuple(roles[role].shape)
        if len(shape) not in (2, 4) or 0 in shape:
            raise Refused(
                f"{source}: {module}.{role} is {shape}, which is neither a matrix nor a convolution's kernel "
                "(4 sizes) of rank 1 or more; export the adapter again"
            )
        for side, size in zip(sides, roles[role].flatten(1).shape, strict=True):
            if found.setdefault(side, size) != size:
                raise Refused(
                    f"{source}: {module} has {side} {found[side]}, {size} in {role!r} {shape}; "
                    "its factors do not belong together, export the adapter again"
                )
    if "alpha" in roles and roles["alpha"].numel() != 1:
        raise Refused(
            f"{source}: {module}.alpha is {tuple(roles['alpha'].shape)} and must be one number; export the "
            "adapter again"
        )
    return found


def missing(roles: Mapping[str, Tensor], method: str | None = None) -> list[str]:
    """The factors that a layer lacks for its ΔW; `method` is what the file says it was made by."""
    if "delta_r" in roles:
        needed = ("q", "delta_r")
    elif roles.keys() & set(ROLES):
        needed = ROLES
    elif "qrlora" in (method or "").split("+") or roles.keys() & set(_BASIS):
        needed = ("up", "down", *_BASIS)
    else:
        needed = ("up", "down")
    return [role for role in needed if role not in roles]


def thin(
    module: str, roles: Mapping[str, Tensor], source: str = "the file", method: str | None = None
) -> Thin:
    """One layer's ΔW as a thin pair in the dtype it is stored in.

    ΔR: [Q]·[ΔR]. QR-LoRA: [Q′ | Q₀]·[R′ ; −R₀], rank 2r. LoRA: [U]·[D]. T-LoRA with all ranks open: as LoRA,
    or of rank 2r. The scale is alpha/r, and 1 without an alpha. Raises `Refused` when a factor is absent (see
    `missing`) or does not fit (see `sizes`).
    """
    rank = sizes(module, roles, source).get("rank", 1)
    if absent := missing(roles, method):
        kept = set(absent) <= {*_BASIS, *COPY.up, *COPY.down}
        way_out = "train with --save_basis full to keep it" if kept else "the file is not whole, use another"
        if kept and "q_layer" in roles:
            way_out = "put it in with tools/import_lora.py --model BASE, as LyCORIS' files leave it out"
        raise Refused(
            f"{module} in {source} has no {', '.join(absent)}, only {', '.join(sorted(roles))}; {way_out}"
        )
    scale = strength(roles, rank)
    if "q_layer" in roles:
        return Thin(*interleaved(roles), scale)
    flat = {role: roles[role].flatten(1) for role in _SIDES if role in roles}
    if "delta_r" in flat:
        return Thin(flat["q"], flat["delta_r"], scale)
    if "q" in flat:
        return Thin(torch.cat([flat["up"], flat["q"]], 1), torch.cat([flat["down"], -flat["base_r"]]), scale)
    return Thin(flat["up"], flat["down"], scale)


def baked(layers: Layers, schedule: Schedule, at: float, source: str) -> Layers:
    """A T-LoRA as the plain LoRA that it is at one timestep in 0..1000; text encoders have all ranks open."""
    if not 0 <= at <= schedule.horizon:
        raise Refused(f"timestep {at:g} is not between 0 (picture) and {schedule.horizon} (noise)")
    found = {}
    for module, roles in layers.items():
        up, down, scale = thin(module, roles, source)
        if not keys.is_text_encoder(module):
            count = int(schedule.open(torch.tensor([float(at)]), len(down)))
            up, down = up[:, :count], down[:count]
        kernel = next((roles[role].shape[2:] for role in ("down", "q_layer") if role in roles), ())
        found[module] = {
            "up": up.reshape(*up.shape, *(1,) * len(kernel)),
            "down": down.reshape(len(down), -1, *kernel),
            "alpha": torch.tensor(scale * len(down)),
        }
    return found


def spelled(module: str, roles: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One layer's tensors under file keys, in the dialect that `module`'s name is of.

    kohya's names keep kohya's suffixes, dotted paths get PEFT's and the prefix of their model. Where the
    factors `like` are of a convolution, the flat ones given get its kernel back.
    """
    table, prefix = keys.PEFT, module
    if module.startswith("lora_"):
        table = keys.KOHYA
    elif not keys.is_text_encoder(module):
        prefix = f"{'unet' if _UNET.match(module) else 'transformer'}.{module}"
    kernel = next((like[role].shape[2:] for role in ("down", "delta_r", "q_layer") if role in like), ())
    state = {}
    for role, value in roles.items():
        if kernel and role in _SIDES:
            rows = _SIDES[role][0] == "rank"  # R×(I·k·k), else O×R
            value = value.reshape(len(value), -1, *(kernel if rows else [1] * len(kernel)))
        state[f"{prefix}.{table[role]}"] = value
    return state


def refuse_magnitudes(layers: Layers, source: str) -> None:
    """Raise `Refused` for DoRA layers: their ΔW is no thin pair, and without the magnitude another one."""
    for module, roles in layers.items():
        if "magnitude" in roles:
            raise Refused(
                f"{module} in {source} has a DoRA magnitude, which a sum of low-rank pairs cannot hold; use "
                "the adapter alone, where it was made"
            )


def shares_basis(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two layers are ΔR adapters on one and the same Q, so that adding their ΔR adds them exactly."""
    return "delta_r" in a and "delta_r" in b and "q" in a and "q" in b and torch.equal(a["q"], b["q"])
