"""Find a network module by name and create its network through kohya's contract."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lowrank.adapter_file import kind_of_key
from lowrank.adapters.network_module import NetworkModule
from lowrank.adapters.targets import as_passed, is_clip
from lowrank.errors import Refused, nearest
from lowrank.tensors import read_names
from lowrank.unused_keys import refuse_unused, usage

if TYPE_CHECKING:
    from torch.nn.modules.module import _IncompatibleKeys

logger = logging.getLogger(__name__)

# diffusers' classes by the names in Black Forest Labs' code (flux/modules/layers.py), which kohya's modules
# and LyCORIS' presets list
_PUBLISHED = {
    "FluxTransformerBlock": "DoubleStreamBlock",
    "FluxSingleTransformerBlock": "SingleStreamBlock",
    "FluxAttention": "SelfAttention",
    "TimestepEmbedding": "MLPEmbedder",  # LyCORIS lists the name for another model
    "PixArtAlphaTextProjection": "MLPEmbedder",
}
# what a foreign module raises for arguments that it does not understand
_COMPLAINTS = (ValueError, TypeError, LookupError, AssertionError, AttributeError, OSError, RuntimeError)


class KohyaNetwork(nn.Module):
    """What a trainer calls of a network by kohya's contract, besides nn.Module's methods.

    For type checkers: a foreign network need not derive from it.
    """

    if TYPE_CHECKING:

        def apply_to(
            self, text_encoders: object, denoiser: nn.Module, train_text: bool, train_denoiser: bool
        ) -> None: ...

        def load_weights(self, file: str) -> _IncompatibleKeys: ...

        def save_weights(self, file: str, dtype: torch.dtype | None, metadata: dict[str, str]) -> None: ...

        def prepare_grad_etc(self, text_encoders: list[nn.Module], denoiser: nn.Module) -> None: ...

        def set_multiplier(self, multiplier: float) -> None: ...

        def enable_gradient_checkpointing(self) -> None: ...

        def on_epoch_start(self, text_encoders: list[nn.Module], denoiser: nn.Module) -> None: ...

        def on_step_start(self, text_encoders: list[nn.Module], denoiser: nn.Module) -> None: ...

        def penalties(self) -> dict[str, torch.Tensor]: ...

        def apply_max_norm_regularization(
            self, limit: float, device: torch.device
        ) -> tuple[int, float, float]: ...


def _builtin_names() -> list[str]:
    spec = importlib.util.find_spec("networks")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return sorted(
        {file.stem for folder in folders for file in Path(folder).glob("*.py") if file.stem != "__init__"}
    )


def find_module(name: str) -> ModuleType:
    """The module for `--network_module`: `networks.delta_r`, a bare `delta_r`, or any contract module.

    Raises `Refused` with the nearest known name when there is none, or when it lacks `create_network`.
    """
    builtin = _builtin_names()
    if not all(part.isidentifier() for part in name.split(".")):
        raise Refused(
            f"--network_module {name!r} is not the dotted name of a module; ours are {', '.join(builtin)}, "
            "and others are named as lycoris.kohya"
        )
    dotted = f"networks.{name}" if name in builtin else name
    try:
        module = importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        if error.name is None or not (dotted == error.name or dotted.startswith(error.name + ".")):
            raise Refused(
                f"network module {name} needs {error.name}, which is not installed; pip install it"
            ) from error
        short = name.removeprefix("networks.")
        raise Refused(
            f"there is no network module {name!r}{nearest(short, builtin)}; ours are {', '.join(builtin)}, "
            "and any importable module that follows kohya's contract works (lycoris.kohya)"
        ) from error
    if not hasattr(module, "create_network"):
        raise Refused(
            f"{name} has no create_network, so it is not a network module; ours are {', '.join(builtin)}"
        )
    return module


def facade_of(module: ModuleType) -> NetworkModule | None:
    """Our façade behind a module, or None for a foreign one."""
    owner = getattr(module.create_network, "__self__", None)
    return owner if isinstance(owner, NetworkModule) else None


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
    report: bool = False,
    strict: bool = False,
) -> KohyaNetwork:
    """A network attached to its models, ready for the optimizer.

    Call order: kohya's trainer (kohya_ss/sd-scripts, train_network.py). Raises `Refused` for arguments that
    the module does not take, and for a foreign network without a layer in the denoiser's blocks.
    """
    if dim_from_weights and not weights:
        raise Refused("--dim_from_weights needs --network_weights; name the file whose ranks to take")
    facade = facade_of(module)
    passed = text_encoders if facade is not None else [_with_text_level(encoder) for encoder in text_encoders]
    encoders = as_passed(passed, denoiser)
    before = _block_layers(denoiser)
    if facade is None:
        extra = {**({} if dropout is None else {"dropout": str(dropout)}), **arguments}
        with _complaints_of(module, f"with --network_args {_text(extra)}"), _published(denoiser):
            network = _call(
                module, denoiser, encoders, rank, alpha, dropout, extra, weights, dim_from_weights
            )
    else:
        facade.check(arguments)
        alpha = facade.default_alpha(rank or 4) if alpha is None else alpha
        unet = denoiser if train_denoiser else None
        network = _call(module, unet, encoders, rank, alpha, dropout, arguments, weights, dim_from_weights)
    if network is None:
        raise Refused(f"{module.__name__} made no network for this model; see its messages above")
    network.apply_to(encoders, denoiser, bool(text_encoders), train_denoiser)
    if facade is None and train_denoiser and before and _block_layers(denoiser) == before:
        raise Refused(
            f"{module.__name__} adapts no layer in the blocks of {type(denoiser).__name__} with "
            f"--network_args {_text(arguments)}; give it another preset or other targets, or choose "
            "networks.lora"
        )
    if weights:
        result = network.load_weights(weights)
        if report or facade is None:
            report_unused(weights, _unexpected(result), strict)
        if facade is not None and result.missing_keys:
            raise Refused(
                f"{weights} lacks {len(result.missing_keys)} tensors of this network, for example "
                f"{result.missing_keys[0]}; use --dim_from_weights, or the file's own targets"
            )
    network.prepare_grad_etc(list(text_encoders), denoiser)
    return cast(KohyaNetwork, network)


def report_unused(path: str, unexpected: Sequence[str], strict: bool) -> None:
    """Warn once about tensors of an adapter file that a network does not use, by kind and count.

    Raises `Refused` with `strict`.
    """
    if not unexpected:
        return
    unused, tensors = [kind_of_key(key) for key in unexpected], len(read_names(path))
    if strict:
        refuse_unused(path, tensors, unused)
    logger.warning("%s", usage(path, tensors, unused))


def _unexpected(result: Any) -> Sequence[str]:
    """The keys that a network's `load_weights` reports as not loaded: torch's tuple, or LyCORIS' mapping."""
    report = result if isinstance(result, Mapping) else {}
    return getattr(result, "unexpected_keys", report.get("unexpected keys", ()))


def merge_file(
    module: ModuleType,
    path: str,
    strength: float,
    text_encoders: Sequence[nn.Module],
    denoiser: nn.Module,
    strict: bool,
) -> None:
    """Add an adapter file to the weights of the models. Raises `Refused` for what a foreign module raises.

    Tensors that a foreign network does not use are reported here, those of ours when the run is checked.
    """
    facade, device = facade_of(module), next(denoiser.parameters()).device
    if facade is not None:
        passed = as_passed(text_encoders, denoiser)
        network, state, _ = facade.from_file(strength, path, passed, denoiser)
    else:
        passed = as_passed([_with_text_level(encoder) for encoder in text_encoders], denoiser)
        complaints = _complaints_of(module, f"of --base_weights {path}", "leave the file out")
        with complaints, _published(denoiser):
            network, state = module.create_network_from_weights(
                strength, path, None, passed, denoiser, for_inference=True
            )
        _report_merged(path, network, strict)
    logger.info("merging module: %s with multiplier %s", path, strength)
    network.merge_to(passed, denoiser, state, None, device)


def _report_merged(path: str, network: Any, strict: bool) -> None:
    """Report the tensors of a file that a foreign network made from that file has no layer for.

    By kohya's contract its layers are in `unet_loras` and `text_encoder_loras`, each with a `lora_name`.
    """
    layers = [*getattr(network, "unet_loras", ()), *getattr(network, "text_encoder_loras", ())]
    names = {getattr(layer, "lora_name", None) for layer in layers} - {None}
    if names:
        report_unused(path, [key for key in read_names(path) if key.partition(".")[0] not in names], strict)


def _call(
    module: ModuleType,
    unet: nn.Module | None,
    encoders: object,
    rank: int | None,
    alpha: float | None,
    dropout: float | None,
    arguments: Mapping[str, str],
    weights: str | None,
    dim_from_weights: bool,
) -> Any:
    """The module's network by kohya's contract: with the ranks of a file, or with a rank and alpha."""
    facade = facade_of(module)
    if dim_from_weights and facade is not None:
        return facade.from_file(1.0, weights, encoders, unet, None, **arguments)[0]
    if dim_from_weights:
        network, _ = module.create_network_from_weights(1.0, weights, None, encoders, unet, **arguments)
        return network
    alpha = 1.0 if alpha is None else alpha
    return module.create_network(1.0, rank, alpha, None, encoders, unet, neuron_dropout=dropout, **arguments)


class _TextModel(nn.Module):
    """A text encoder below the level `text_model`, which transformers 5 does not have and files do."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.text_model = encoder


def _with_text_level(encoder: nn.Module) -> nn.Module:
    """The encoder with the paths that other programs' modules make names of (`lora_te_text_model_…`)."""
    has_level = any(name == "text_model" for name, _ in encoder.named_children())
    return _TextModel(encoder) if is_clip(encoder) and not has_level else encoder


@contextlib.contextmanager
def _published(denoiser: nn.Module) -> Iterator[None]:
    """Give the denoiser's submodules the class names of the published code while a module looks for them."""
    renamed: list[tuple[nn.Module, Any]] = [
        (part, type(part)) for part in denoiser.modules() if type(part).__name__ in _PUBLISHED
    ]
    try:
        for part, kind in renamed:
            part.__class__ = type(_PUBLISHED[kind.__name__], (kind,), {})
        yield
    finally:
        for part, kind in renamed:
            part.__class__ = kind


@contextlib.contextmanager
def _complaints_of(module: ModuleType, of_what: str, way_out: str = "correct them") -> Iterator[None]:
    """Turn what a foreign module raises into one sentence that quotes it."""
    try:
        yield
    except _COMPLAINTS as error:
        message = str(error).strip() or traceback.extract_tb(error.__traceback__)[-1].line
        raise Refused(
            f"{module.__name__} makes no network {of_what} "
            f"({type(error).__name__}: {(message or '?').splitlines()[0]}); {way_out}"
        ) from error


def _text(arguments: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in arguments.items()) or "(none)"


def _block_layers(denoiser: nn.Module) -> dict[str, tuple]:
    """For each layer in a list of blocks what an adapter changes on it: itself, its forward, its hooks."""
    lists = [name for name, part in denoiser.named_modules() if isinstance(part, nn.ModuleList)]
    return {
        name: (
            part,
            part.__dict__.get("forward"),
            len(part._forward_hooks) + len(part._forward_pre_hooks),
        )
        for name, part in denoiser.named_modules()
        if any(name.startswith(f"{blocks}.") for blocks in lists)
    }


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
