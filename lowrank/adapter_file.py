"""The one reader of adapter files: a file of any program, or a PEFT folder, as layers of tensors by role.

A key such as `lora_unet_…_to_q.lora_up.weight` is a module and a role (`up`, see `naming.keys`). The alpha of
a layer is in a key, in diffusers' metadata `lora_adapter_metadata`, or in PEFT's `adapter_config.json`. Keys
of other kinds of adapters are listed, not dropped.
This module does not know any method: `formats.read` computes ΔW, `adapters.dialect` finds the model's layers.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank.errors import Refused
from lowrank.naming import keys
from lowrank.tensors import read_tensors

Roles = dict[str, Tensor]

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
HEADER = "lora_adapter_metadata"  # diffusers writes PEFT's configuration of each component here
BIAS, CORE = "bias", "core"
# What is not read, by the ends of the keys: other kinds of adapters (LyCORIS, PEFT, kohya), and tensors of
# this program's methods in a file that does not name its method
_FOREIGN = {
    r"(core|core_up|core_down|(basis|null|norm|free)_(up|down))": CORE,
    r"hada_\w+": "LoHa",
    r"lokr_\w+": "LoKr",
    r"(oft_\w+(\.weight)?|rescale)": "OFT",
    r"on_input": "IA3",
    r"[ab][12]\.weight": "GLoRA",
    r"diff": "full difference",
    r"set_weight": "set_weight",
    r"(diff_b|lora_[AB]\.bias|lora_up\.bias)": BIAS,
    r"[wb]_norm": "norm",
    r"scalar": "LoRA with a scalar",
    r"lora_embedding_[AB]": "embedding",
}
_PLAIN_PATTERN = re.compile(r"\^?[\w.]+")

logger = logging.getLogger(__name__)


class ForeignKey(NamedTuple):
    """A key that is not read: the module it belongs to, and the kind of adapter that writes such keys.

    The kind is `unknown (suffix)` where no program is known; `certain` is False where the key need not be an
    adapter's at all.
    """

    key: str
    module: str
    kind: str
    certain: bool = True


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file: {module: {role: tensor}}; modules as the file names them, without the prefix."""

    source: str
    layers: Mapping[str, Roles]
    metadata: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # {module: {role: key in the file}}
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
    """The tensors and metadata of an adapter file, and PEFT's configuration of each component."""

    state: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    source: str
    config: Mapping[str, Mapping[str, Any]] = MappingProxyType({})


def open_adapter_file(path: str | Path) -> RawFile:
    """The contents of a file of any dialect, or of a folder that PEFT saved. Raises `Refused`."""
    if os.path.isdir(path):  # Path.is_dir raises where a name is too long
        return _open_peft_folder(Path(path))
    state, metadata = read_tensors(path)
    config = _header_config(metadata, str(path))
    beside = Path(path).with_name(PEFT_CONFIG)
    if Path(path).name == PEFT_FILE and beside.is_file():
        config = {"": _peft_config(beside)}
    return RawFile(state, metadata, str(path), config)


def read_adapter_file(
    file: str | Path | RawFile, roles: Collection[str] = (), strict: bool = True
) -> AdapterFile:
    """The layers of an adapter file.

    Reads native, PEFT/diffusers, kohya, LyCORIS and official QR-LoRA keys. float8 becomes fp32, the middle of
    a LyCORIS convolution is folded into its down. `roles` are the names of tensors that only one method's
    files have. Raises `Refused` for a file that cannot be read, and for one layer twice, NaN and tensors that
    are no floating-point numbers; with `strict` off, the latter become `problems`.
    """
    state, metadata, source, config = file if isinstance(file, RawFile) else open_adapter_file(file)
    layers: dict[str, Roles] = {}
    names: dict[str, dict[str, str]] = {}
    foreign: list[ForeignKey] = []
    problems: dict[str, str] = {}
    spelled: dict[str, str] = {}  # a module's first spelling, by the name that all dialects share
    for key, value in state.items():
        module, _, last = key.rpartition(".")
        split = keys.role_of(key) or ((module, last) if module and last in roles else None)
        if split is None:
            foreign.append(_foreign(key))
            continue
        path, role = keys.module_path(split[0]), split[1]
        module = spelled.setdefault(keys.flat(path), path)
        try:
            if role in names.setdefault(module, {}):
                raise Refused(_twice(source, module, path, role, key))
            names[module][role] = key
            value = checked_tensor(value, key, source)
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
    _resolve_alpha(layers, names, config, source)
    return AdapterFile(source, layers, metadata, names, tuple(foreign), problems, len(state))


def _twice(source: str, module: str, path: str, role: str, key: str) -> str:
    also = "" if module == path else f" (also named {module})"
    return (
        f"{source} gives the {role} of {path}{also} twice, once as {key}; it holds the adapters of two "
        "models or two dialects at once, take one of them out"
    )


def _foreign(key: str) -> ForeignKey:
    for pattern, kind in _FOREIGN.items():
        if match := re.search(rf"\.{pattern}$", key):
            return ForeignKey(key, key[: match.start()], kind)
    if "lora" in key:
        module = key.partition("." if key.startswith("lora_") else ".lora")[0]
        return ForeignKey(key, module, f"unknown ({key[len(module) + 1 :]})")
    module, _, suffix = key.rpartition(".")
    return ForeignKey(key, module, f"unknown ({suffix})", certain=False)


def checked_tensor(value: Tensor, key: str, source: str) -> Tensor:
    """A tensor of an adapter file as one that can be computed with: float8 becomes fp32.

    Raises `Refused` for whole numbers, sparse tensors, NaN and infinities.
    """
    if str(value.dtype).startswith("torch.float8"):
        value = value.float()  # float8 has no arithmetic
    usable = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if value.layout != torch.strided or (value.dtype not in usable and not key.endswith("alpha")):
        raise Refused(
            f"{key} in {source} is {str(value.dtype).removeprefix('torch.')}, which is no plain "
            "floating-point tensor; save the adapter in fp32, fp16 or bf16"
        )
    if not torch.isfinite(value).all():
        raise Refused(f"{source} holds NaN or infinite values in {key}; use an earlier checkpoint")
    return value


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


# ---------- alpha


def _resolve_alpha(
    layers: Mapping[str, Roles],
    names: Mapping[str, Mapping[str, str]],
    config: Mapping[str, Mapping[str, Any]],
    source: str,
) -> None:
    """Add the alpha of PEFT's configuration to the layers without an alpha."""
    for module, roles in layers.items():
        if "alpha" in roles or "down" not in roles or not config:
            continue
        key = names[module]["down"].removeprefix("base_model.model.")
        component, _, path = key.partition(".")
        settings = config.get(component, config.get(""))
        path = path if component in config else key
        if settings and "lora_alpha" in settings:
            split = keys.role_of(path)
            alpha = _alpha_of(settings, split[0] if split else path, len(roles["down"]), source)
            roles["alpha"] = torch.tensor(alpha, dtype=torch.float64)


def _alpha_of(config: Mapping[str, Any], path: str, rank: int, source: str) -> float:
    """The alpha of `alpha / rank`; PEFT compares `alpha_pattern` with the end of a layer's path."""
    try:
        patterns = dict(config.get("alpha_pattern") or {})
        alpha = float(config["lora_alpha"])
        for name, value in patterns.items():
            if not _PLAIN_PATTERN.fullmatch(name):  # a regular expression from a file is not run
                raise Refused(
                    f"{source} has the alpha pattern {name!r}, which is no plain name; name the layers"
                )
            if _matches(path, name):
                alpha = float(value)
                break
    except (TypeError, ValueError) as error:
        raise Refused(
            f"{source} has a damaged PEFT configuration ({error}); save the adapter again"
        ) from error
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _matches(path: str, name: str) -> bool:
    return path == name.removeprefix("^") or (not name.startswith("^") and path.endswith(f".{name}"))


def _header_config(metadata: Mapping[str, str], source: str) -> dict[str, dict[str, Any]]:
    """PEFT's configuration by component, from diffusers' metadata."""
    config: dict[str, dict[str, Any]] = {}
    try:
        for key, value in json.loads(metadata.get(HEADER, "{}")).items():
            component, _, name = key.partition(".")
            config.setdefault(component, {})[name] = value
    except (ValueError, AttributeError, RecursionError) as error:
        raise Refused(
            f"the alpha of {source} cannot be read: its PEFT configuration is no JSON object ({error}); "
            "save the adapter again"
        ) from error
    return config


# ---------- PEFT's folders


def _open_peft_folder(folder: Path) -> RawFile:
    """A folder that PEFT saved, or one folder for each model in it."""
    components = [name for name in PEFT_COMPONENTS if (folder / name / PEFT_CONFIG).is_file()]
    if not components and (folder / PEFT_CONFIG).is_file():
        components = [""]
    if not components:
        raise Refused(
            f"{folder} has no {PEFT_CONFIG}, in it or in a folder named {', '.join(PEFT_COMPONENTS)}; give "
            "an adapter that PEFT saved, or a file"
        )
    state: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    config: dict[str, Mapping[str, Any]] = {}
    for name in components:
        path = folder / name / PEFT_FILE
        component = name or (folder.name if folder.name in PEFT_COMPONENTS else "")
        config[component] = _peft_config(folder / name / PEFT_CONFIG)
        if "lora_alpha" not in config[component]:
            raise Refused(f"the alpha of {folder / name} cannot be read: its {PEFT_CONFIG} has no lora_alpha")
        tensors, header = read_tensors(path)
        prefix = f"{component}." if component else ""
        state |= {prefix + key.removeprefix("base_model.model."): value for key, value in tensors.items()}
        metadata |= header
    return RawFile(state, metadata, str(folder), config)


def _peft_config(path: Path) -> dict[str, Any]:
    """PEFT's configuration. Raises `Refused` for another kind of adapter than LoRA."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("peft_type", "LORA")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise Refused(
            f"the PEFT configuration {path} cannot be read ({error}); save the adapter again"
        ) from error
    if kind != "LORA":
        raise Refused(f"{path} is of {kind}, and only LORA is read here; convert the adapter with PEFT")
    return config
