"""The network module: found by name, asked through kohya's contract."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from lowrank.adapters.kohya import Facade
from lowrank.errors import Refused, nearest


def _own_networks() -> list[str]:
    spec = importlib.util.find_spec("networks")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return sorted(
        {file.stem for folder in folders for file in Path(folder).glob("*.py") if file.stem != "__init__"}
    )


def find_module(name: str) -> ModuleType:
    """The module for `--network_module`: `networks.delta_r`, a bare `delta_r`, or any contract module.

    Raises `Refused` with the nearest known name when there is none, or when it lacks `create_network`.
    """
    own = _own_networks()
    dotted = f"networks.{name}" if name in own else name
    try:
        module = importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        if error.name is None or not (dotted == error.name or dotted.startswith(error.name + ".")):
            raise Refused(
                f"network module {name} needs {error.name}, which is not installed; pip install it"
            ) from error
        short = name.removeprefix("networks.")
        raise Refused(
            f"there is no network module {name!r}{nearest(short, own)}; ours are {', '.join(own)}, and any "
            "importable module that follows kohya's contract works (lycoris.kohya)"
        ) from error
    if not hasattr(module, "create_network"):
        raise Refused(
            f"{name} has no create_network, so it is not a network module; ours are {', '.join(own)}"
        )
    return module


def facade_of(module: ModuleType) -> Facade | None:
    """Our façade behind a module, or None for a foreign one."""
    owner = getattr(module.create_network, "__self__", None)
    return owner if isinstance(owner, Facade) else None


def create(
    module: ModuleType,
    denoiser: nn.Module,
    text_encoders: Sequence[nn.Module],
    *,
    rank: int | None,
    alpha: float | None,
    dropout: float | None,
    arguments: Mapping[str, str],
    weights: str | None,
    dim_from_weights: bool,
    train_denoiser: bool = True,
) -> nn.Module:
    """A network on its hosts, ready for the optimizer.

    Call order: kohya's trainer (kohya_ss/sd-scripts, train_network.py).
    """
    facade = facade_of(module)
    if facade is not None:
        facade.check(arguments)
        alpha = facade.default_alpha(rank or 4) if alpha is None else alpha
    unet = denoiser if train_denoiser or facade is None else None
    extra: dict[str, Any] = dict(arguments)
    if dropout is not None and facade is None:
        extra.setdefault("dropout", str(dropout))
    if dim_from_weights:
        if not weights:
            raise Refused("--dim_from_weights needs --network_weights; name the file whose ranks to take")
        network, _ = module.create_network_from_weights(
            1.0, weights, None, list(text_encoders), unet, **extra
        )
    else:
        network = module.create_network(
            1.0,
            rank,
            1.0 if alpha is None else alpha,
            None,
            list(text_encoders),
            unet,
            neuron_dropout=dropout,
            **extra,
        )
    if network is None:
        raise Refused(f"{module.__name__} made no network for this model; see its messages above")
    network.apply_to(list(text_encoders), denoiser, bool(text_encoders), train_denoiser)
    if weights:
        told = network.load_weights(weights)
        if facade is not None and told.missing_keys:
            raise Refused(
                f"{weights} lacks {len(told.missing_keys)} tensors of this network, for example "
                f"{told.missing_keys[0]}; use --dim_from_weights, or the file's own targets"
            )
    network.prepare_grad_etc(list(text_encoders), denoiser)
    return network


def optimizer_groups(
    network: Any, text_encoder_lr: Any, unet_lr: float | None, rate: float
) -> tuple[list, list[str]]:
    """The network's parameter groups and a description for each.

    Raises `Refused` when nothing would be trained.
    """
    several = getattr(network, "prepare_optimizer_params_with_multiple_te_lrs", None)
    if several is not None:
        result = several(text_encoder_lr, unet_lr, rate)
    else:
        first = (
            text_encoder_lr[0]
            if isinstance(text_encoder_lr, (list, tuple)) and text_encoder_lr
            else text_encoder_lr or None
        )
        takes = len(inspect.signature(network.prepare_optimizer_params).parameters)
        result = network.prepare_optimizer_params(*(first, unet_lr, rate)[:takes])
    groups, names = result if isinstance(result, tuple) else (result, [])
    groups = [{**group, "params": list(group["params"])} for group in groups]
    if not any(group["params"] for group in groups):
        raise Refused(
            "no parameter would be trained: every learning rate is 0; "
            "set --learning_rate or --unet_lr above 0"
        )
    return groups, [*names, *(f"group{i}" for i in range(len(names), len(groups)))]
