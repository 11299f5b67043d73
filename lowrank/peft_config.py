"""PEFT's configuration of a LoRA, from its folders and from diffusers' header: what each field means here.

Every field is used, or harmless for the stated reason, or allowed only while it is off. A field that is not
listed is refused unless it is off, because a newer PEFT may change with it what an adapter computes. Facts:
`peft.LoraConfig` (github.com/huggingface/peft, src/peft/tuners/lora/config.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank.errors import Refused
from lowrank.files import parse_json, read_json

HEADER = "lora_adapter_metadata"  # metadata of diffusers' files: {"unet.r": 4, "unet.lora_alpha": 8, …}

USED = {
    "peft_type": "kind of adapter; only LORA is read",
    "lora_alpha": "alpha of the layers",
    "alpha_pattern": "alpha by regular expression over the layer's path",
    "use_rslora": "scale alpha/√r instead of alpha/r",
    "init_lora_weights": "start of the factors; some change the base, see `START`",
}
HARMLESS = {
    "r": "each layer's factors have the rank",
    "rank_pattern": "each layer's factors have the rank",
    "use_dora": "the file has a magnitude for each layer",
    "task_type": "kind of model; ΔW does not depend on it",
    "auto_mapping": "class of the model; ΔW does not depend on it",
    "peft_version": "version that saved the folder",
    "base_model_name_or_path": "name of the base; the path is not opened",
    "revision": "version of the base on the hub",
    "inference_mode": "whether the factors are trained further",
    "target_modules": "the keys name the layers",
    "exclude_modules": "the keys name the layers",
    "layers_to_transform": "the keys name the layers",
    "layers_pattern": "the keys name the layers",
    "lora_dropout": "acts in training only",
    "fan_in_fan_out": "how the base stores W; the factors act on the input in one way",
    "modules_to_save": "whole weights of other modules; their tensors are listed as not used",
    "bias": "biases of the base that were trained; their tensors are listed as not used",
    "lora_bias": "a bias of the up factor; its tensors are listed as not used",
    "megatron_core": "name of a module for parallel layers; see megatron_config",
    "loftq_config": "how LoftQ makes a start; see init_lora_weights",
    "eva_config": "how EVA makes a start; see init_lora_weights",
    "corda_config": "how CorDA makes a start; see init_lora_weights",
    "lora_ga_config": "how LoRA-GA makes a start; see init_lora_weights",
    "qalora_group_size": "see use_qalora",
    "runtime_config": "options of a run; not saved",
    "ensure_weight_tying": "ties embeddings of language models; not for these models",
    "velora_config": "compresses what the backward pass keeps; the forward pass does not depend on it",
}
OFF_ONLY = {
    "megatron_config": "layers of Megatron-LM",
    "trainable_token_indices": "trained rows of an embedding",
    "alora_invocation_tokens": "an adapter that depends on the tokens",
    "use_qalora": "inputs that are pooled in groups",
    "monteclora_config": "sampled factors",
    "layer_replication": "layers of the base that occur several times",
    "target_parameters": "adapters of parameters instead of layers",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "routing between several adapters",
    "kasa_config": "a diagonal between the factors",
}
# Starts by `init_lora_weights`. B·A is zero before training with the first ones, and the base stays as it is;
# the second ones subtract the start s·B₀·A₀ from the base; LoftQ trains on another, quantised base
ZERO_START = ("gaussian", "eva", "orthogonal", "mica")
SUBTRACTED = ("pissa", "olora", "corda", "lora_ga")
_OFF = (None, False, "", 0, [], {})
_LONGEST, _REPEATS = 300, 3  # of an alpha pattern: characters, and repeats that may match a dot or a letter


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in a PEFT folder. Raises `Refused` for another kind of adapter than LoRA."""
    config = read_json(path, "the PEFT configuration", way_out="save the adapter again")
    if not isinstance(config, dict):
        raise Refused(f"the PEFT configuration {path} is no JSON object; save the adapter again")
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise Refused(f"{path} is of {kind}, and only LORA is read here; convert the adapter with PEFT")
    return config


def header_config(metadata: Mapping[str, str], source: str) -> dict[str, dict[str, Any]]:
    """PEFT's configuration by component, from diffusers' metadata. Raises `Refused`, as `check_config`."""
    config: dict[str, dict[str, Any]] = {}
    settings = parse_json(metadata.get(HEADER, "{}"), f"the PEFT configuration in {source} ({HEADER})")
    if not isinstance(settings, dict):
        raise Refused(f"the PEFT configuration in {source} ({HEADER}) is no JSON object; save it again")
    for key, value in settings.items():
        component, _, name = key.partition(".")
        config.setdefault(component, {})[name] = value
    for component in config.values():
        check_config(component, source)
    return config


def check_config(config: Mapping[str, Any], source: str, start: bool = False) -> None:
    """Raise `Refused` for a field that changes what the adapter computes and is not read here.

    `start` states that the factors before training are present, so that they can be subtracted.
    """
    for name, value in config.items():
        if name in USED or name in HARMLESS or value in _OFF:
            continue
        if name in OFF_ONLY:
            raise Refused(
                f"{source} has {name}={_short(value)} in its PEFT configuration ({OFF_ONLY[name]}), which is "
                "not read here; merge the adapter with PEFT"
            )
        raise Refused(
            f"{source} has {name}={_short(value)} in its PEFT configuration, a field that is not known here "
            "and may change what the adapter adds; merge the adapter with PEFT"
        )
    _check_start(config.get("init_lora_weights", True), source, start)


def _check_start(init: Any, source: str, start: bool) -> None:
    if isinstance(init, bool) or init is None:
        return
    name = str(init).lower()
    if name in ZERO_START or (start and subtracts_start(init)):
        return
    if subtracts_start(init):
        raise Refused(
            f"{source} was trained with init_lora_weights={init}, which subtracts the start of the factors "
            "from the base, and the folder does not have that start; save it as a plain LoRA with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=…), or put the initial adapter into a "
            "folder named init in it"
        )
    why = "trains on a quantised base" if name == "loftq" else "is no start that is known here"
    raise Refused(
        f"{source} was trained with init_lora_weights={_short(init)}, which {why}, so its factors alone are "
        "not the change of the original base; merge the adapter with PEFT on the base that it was trained on"
    )


def subtracts_start(init: Any) -> bool:
    """Whether a start of `init_lora_weights` is subtracted from the base: pissa, pissa_niter_4, olora, …"""
    name = str(init).lower()
    return any(name == start or name.startswith(f"{start}_niter_") for start in SUBTRACTED)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}…"


# ---------- alpha


def alpha_of(config: Mapping[str, Any], path: str, rank: int, source: str) -> float:
    """The alpha of `alpha / rank` for a layer; the first pattern that matches the end of its path applies."""
    try:
        patterns = dict(config.get("alpha_pattern") or {})
        alpha = float(config["lora_alpha"])
        for pattern, value in patterns.items():
            if _matches(path, pattern, source):
                alpha = float(value)
                break
    except Refused:
        raise
    except (TypeError, ValueError) as error:
        raise Refused(
            f"{source} has a damaged PEFT configuration ({error}); save the adapter again"
        ) from error
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _matches(path: str, pattern: str, source: str) -> bool:
    """PEFT's rule: the pattern matches a whole path, or its end after a dot.

    Raises `Refused` for an expression whose matching may take exponential time: repeated groups, references.
    """
    repeats = len(re.findall(r"[*+{]", re.sub(r"\\d[+*]|\[0-9\][+*]", "", pattern)))
    optional = pattern.count("?")
    many = len(pattern) > _LONGEST or repeats > _REPEATS or optional > 2 * _REPEATS
    if many or re.search(r"\)[*+{]|\\[1-9]|\(\?(?!:)", pattern):
        raise Refused(
            f"{source} has the alpha pattern {_short(pattern)!r}, which is too complex to be matched safely; "
            "name the layers"
        )
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None
    except re.error as error:
        raise Refused(
            f"{source} has the alpha pattern {_short(pattern)!r}, which is no regular expression ({error}); "
            "save the adapter again"
        ) from error
