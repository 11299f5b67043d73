"""The one reader of adapter files: a file of any program, or a PEFT folder, as layers of tensors by role.

A key such as `lora_unet_…_to_q.lora_up.weight` is a module and a role (`up`, see `naming.keys`). The alpha of
a layer is in one of `ALPHA_PLACES`. Keys of other kinds of adapters are listed, not dropped.
This module does not know any method: `formats.read` computes ΔW, `adapters.dialect` finds the model's layers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank import peft_config, peft_folder
from lowrank.errors import Refused
from lowrank.naming import keys, places
from lowrank.tensors import FLOATS, read_tensors
from lowrank.unused_keys import ForeignKey, foreign_key

Roles = dict[str, Tensor]

# Where programs write a layer's alpha, in the order in which the places are read; without one s is 1
ALPHA_PLACES = {
    "key": "a tensor of no or one axis beside the factors: kohya, LyCORIS, OneTrainer, diffusers' alphas",
    "config": "lora_alpha and alpha_pattern of PEFT's adapter_config.json",
    "header": "lora_alpha and alpha_pattern of each component in diffusers' lora_adapter_metadata",
    "none": "none: alpha is the rank",
}
_ROWS = ("up", "magnitude")  # roles whose rows are the outputs of a layer
NO_CONFIG: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
NO_START: Mapping[str, Tensor] = MappingProxyType({})

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file: {module: {role: tensor}}; modules as the file names them, without the prefix."""

    source: str
    layers: Mapping[str, Roles]
    metadata: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # {module: {role: key in the file}}
    alphas: Mapping[str, str] = field(default_factory=dict)  # by module: where alpha is, of `ALPHA_PLACES`
    not_understood: Sequence[ForeignKey] = ()
    problems: Mapping[str, str] = field(default_factory=dict)  # by module, where reading was not strict
    tensors: int = 0

    def fact(self, name: str) -> str | None:
        """A fact of the file's `lowrank.*` metadata, or None."""
        value = self.metadata.get(f"lowrank.{name}")
        return None if value in (None, "None") else value

    def has_suffix(self, suffix: str) -> bool:
        """Whether one of the keys ends in `.suffix`."""
        return any(key.endswith(f".{suffix}") for by_role in self.keys.values() for key in by_role.values())

    @property
    def may_be_official_qr(self) -> bool:
        """Whether the file has the keys that QR-LoRA's official code and diffusers before PEFT share."""
        return self.has_suffix(keys.OLD_UP) and not any(
            keys.QR_BASIS[0] in roles for roles in self.layers.values()
        )


class RawFile(NamedTuple):
    """The tensors and metadata of an adapter file, and PEFT's configuration of each component.

    `start` has the factors before training, by the same keys, where the base was changed by them.
    """

    state: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    source: str
    config: Mapping[str, Mapping[str, Any]] = NO_CONFIG
    start: Mapping[str, Tensor] = NO_START
    config_place: str = "config"


def open_adapter_file(path: str | Path) -> RawFile:
    """The contents of a file of any dialect, or of a folder that PEFT saved. Raises `Refused`."""
    if os.path.isdir(path):  # Path.is_dir raises where a name is too long
        return RawFile(*peft_folder.read_folder(Path(path)))
    beside = Path(path).with_name(peft_folder.CONFIG)
    if Path(path).name == peft_folder.FILE and beside.is_file():
        return RawFile(*peft_folder.read_folder(Path(path).parent, alone=True))
    state, metadata = read_tensors(path)
    config = NO_CONFIG
    if peft_config.HEADER in metadata:
        config = peft_config.header_config(metadata, str(path))
    return RawFile(state, metadata, str(path), config, config_place="header")


def read_adapter_file(
    file: str | Path | RawFile, roles: Collection[str] = (), strict: bool = True
) -> AdapterFile:
    """The layers of an adapter file.

    Reads native, PEFT/diffusers, kohya, LyCORIS and official QR-LoRA keys. float8 becomes fp32, the middle of
    a LyCORIS convolution is folded into its down. `roles` are the names of tensors that only one method's
    files have. Raises `Refused` for a file that cannot be read, and for one layer twice, NaN and tensors that
    are no floating-point numbers; with `strict` off, the latter become `problems`.
    """
    raw = file if isinstance(file, RawFile) else open_adapter_file(file)
    state, metadata, source = raw.state, raw.metadata, raw.source
    layers: dict[str, Roles] = {}
    names: dict[str, dict[str, str]] = {}
    foreign: list[ForeignKey] = []
    problems: dict[str, str] = {}
    spelled: dict[str, str] = {}  # a module's first spelling, by the name that all dialects share
    for key, value in state.items():
        module, _, last = key.rpartition(".")
        split = keys.role_of(key) or ((module, last) if module and last in roles else None)
        if split is None:
            foreign.append(foreign_key(key))
            continue
        path, role = keys.module_path(split[0]), split[1]
        module = spelled.setdefault(keys.flat(path), path)
        try:
            if role in names.setdefault(module, {}):
                if role == "alpha" and torch.equal(value.flatten(), layers[module][role].flatten()):
                    continue  # beside both factors
                raise Refused(_twice(source, module, path, role, key))
            names[module][role] = key
            value = checked_tensor(value, key, source)
            _check_axes(value, role, key, source)
        except Refused as refused:
            if strict:
                raise
            problems.setdefault(module, str(refused))
        if role == "magnitude" and not key.endswith(keys.KOHYA[role]):
            value = value.flatten()  # PEFT's has an axis in front for a convolution
        layers.setdefault(module, {})[role] = value
    for module, tensors in layers.items():
        if keys.MIDDLE in tensors:
            tensors["down"] = _without_middle(module, tensors.pop(keys.MIDDLE), tensors.get("down"), source)
    alphas = _resolve_alpha(layers, names, raw)
    if raw.start:
        _subtract_start(layers, names, raw)
    layers, names = _split_fused(layers, names, source)
    return AdapterFile(source, layers, metadata, names, alphas, tuple(foreign), problems, len(state))


def _twice(source: str, module: str, path: str, role: str, key: str) -> str:
    also = "" if module == path else f" (also named {module})"
    return (
        f"{source} gives the {role} of {path}{also} twice, once as {key}; it holds the adapters of two "
        "models or two dialects at once, take one of them out"
    )


def kind_of_key(key: str) -> ForeignKey:
    """The kind of a key that nothing uses; of a known role, it is of a layer without an adapter here."""
    split = keys.role_of(key)
    return ForeignKey(key, split[0], "layer without an adapter here") if split else foreign_key(key)


def checked_tensor(value: Tensor, key: str, source: str) -> Tensor:
    """A tensor of an adapter file as one that can be computed with: float8 becomes fp32.

    Raises `Refused` for whole numbers, sparse tensors, NaN and infinities.
    """
    if str(value.dtype).startswith("torch.float8"):
        value = value.float()  # float8 has no arithmetic
    if value.layout != torch.strided or (value.dtype not in FLOATS and not key.endswith("alpha")):
        raise Refused(
            f"{key} in {source} is {str(value.dtype).removeprefix('torch.')}, which is no plain "
            "floating-point tensor; save the adapter in fp32, fp16 or bf16"
        )
    if not torch.isfinite(value).all():
        raise Refused(f"{source} holds NaN or infinite values in {key}; use an earlier checkpoint")
    return value


def _check_axes(value: Tensor, role: str, key: str, source: str) -> None:
    """Raise `Refused` for an alpha that is not one number, and for another role that is only a number."""
    if (value.numel() != 1) if role == "alpha" else value.dim() == 0:
        needed = "one number" if role == "alpha" else "a matrix or a row of numbers"
        raise Refused(
            f"{key} in {source} has the shape {tuple(value.shape)} and must be {needed}; use another file"
        )


def _without_middle(module: str, middle: Tensor, down: Tensor | None, source: str) -> Tensor:
    """The down (R, I, k, k) of LyCORIS' three convolutions: 1×1 (R, I), k×k `middle` (R, R, k, k), 1×1 up."""
    if down is None or middle.dim() != 4 or down.flatten(1).shape[0] != middle.shape[1]:
        raise Refused(
            f"{source}: {module}.lora_mid is {tuple(middle.shape)} and does not fit its lora_down "
            f"{None if down is None else tuple(down.shape)}; export the adapter again"
        )
    return torch.einsum("rskl,si->rikl", middle.float(), down.flatten(1).float())


def warn_zero_alpha(source: str, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Warn about layers whose alpha is 0, which programs read in two ways."""
    zeros = [name for name, roles in layers.items() if "alpha" in roles and not roles["alpha"].any()]
    if zeros:
        logger.warning(
            "%s: alpha is 0 in %d of %d layers, for example %s: they add nothing, as in ComfyUI, A1111 and "
            "diffusers; kohya's and LyCORIS' networks use the rank instead. If that is meant, set alpha",
            *(source, len(zeros), len(layers), min(zeros)),
        )


def check_base(source: str, metadata: Mapping[str, str], base_hash: Callable[[], str], way_out: str) -> None:
    """Compare the base that a file was made on with the base in use, by the hashes of their denoisers.

    Raises `Refused` where the file's basis belongs to another base, and warns where it has none. `base_hash`
    is called only for a file that names its base; `way_out` ends the refusal.
    """
    made_on = metadata.get("lowrank.base_hash")
    if not made_on or made_on == "None" or made_on == (here := base_hash()):
        return
    bases = (
        f"{source} was made on {metadata.get('lowrank.base_model')} ({made_on[:12]}), and this base is "
        f"{here[:12]}"
    )
    if metadata.get("lowrank.basis_hash") not in (None, "None"):
        raise Refused(f"{bases}; its basis belongs to that base, so {way_out}")
    logger.warning("%s; the file is used all the same", bases)


# ---------- alpha, starts, fused layers


def _resolve_alpha(
    layers: Mapping[str, Roles], names: Mapping[str, Mapping[str, str]], raw: RawFile
) -> dict[str, str]:
    """Where each layer's alpha is (`ALPHA_PLACES`); that of a PEFT configuration is added to the layer."""
    alphas: dict[str, str] = {}
    for module, roles in layers.items():
        alphas[module] = "key" if "alpha" in roles else "none"
        if "alpha" in roles or "down" not in roles or not raw.config:
            continue
        part, path = places.part_and_path(module)
        component = {"te1": "text_encoder", "unet": "unet"}.get(part, "text_encoder_2")
        component = "transformer" if component == "unet" and "unet" not in raw.config else component
        settings = raw.config.get(component, raw.config.get(""))
        if settings and "lora_alpha" in settings:
            key = keys.role_of(names[module]["down"])
            path = key[0] if key else path
            path = path.removeprefix("base_model.model.").removeprefix(f"{component}.")
            alpha = peft_config.alpha_of(settings, path, len(roles["down"]), raw.source)
            roles["alpha"] = torch.tensor(alpha, dtype=torch.float64)
            alphas[module] = raw.config_place
    return alphas


def _subtract_start(
    layers: Mapping[str, Roles], names: Mapping[str, Mapping[str, str]], raw: RawFile
) -> None:
    """Make layers whose start was subtracted from the base what they add to it: [B | −B₀]·[A ; A₀]."""
    for module, roles in layers.items():
        up, down = (raw.start.get(names[module].get(role, "")) for role in ("up", "down"))
        if up is None or down is None:
            continue
        if up.shape != roles["up"].shape or down.shape != roles["down"].shape:
            raise Refused(
                f"{module} in {raw.source} has another size before training than after it; its initial "
                "adapter is of another run"
            )
        rank = len(roles["down"])
        alpha = roles.get("alpha", torch.tensor(float(rank)))
        roles["down"] = torch.cat([roles["down"], down])
        roles["up"] = torch.cat([roles["up"], -up], 1)
        roles["alpha"] = 2 * alpha.double()


def _split_fused(
    layers: dict[str, Roles], names: dict[str, dict[str, str]], source: str
) -> tuple[dict[str, Roles], dict[str, dict[str, str]]]:
    """Layers that diffusers joins (`to_qkv`) as their parts: each takes its rows of the up, and the down."""
    split: dict[str, Roles] = {}
    split_names: dict[str, dict[str, str]] = {}
    for module, roles in layers.items():
        parts = keys.fused_parts(module)
        for i, part in enumerate(parts):
            if part in layers or any(len(v) % len(parts) for r, v in roles.items() if r in _ROWS):
                raise Refused(
                    f"{module} in {source} joins {', '.join(parts)}, and its rows are no equal shares of "
                    "them or one of them is also there; export the adapter again"
                )
            split[part] = {r: v.chunk(len(parts))[i] if r in _ROWS else v for r, v in roles.items()}
            split_names[part] = names[module]
        if not parts:
            split[module], split_names[module] = roles, names[module]
    return split, split_names
