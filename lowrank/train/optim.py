"""Optimizers by kohya's names.

A library is imported when its optimizer is asked for, and `chosen` can be called before a model is loaded, so
that a misspelt name or argument costs no time.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from lowrank.config.flag import literals
from lowrank.config.flags_training import Optimizer as Options
from lowrank.config.optimizers import (
    KNOWN,
    ONE_RATE,
    missing_package,
    optimizer_name,
    refuse_several_rates,
)
from lowrank.errors import Refused, nearest

log = logging.getLogger(__name__)


class Chosen(NamedTuple):
    """An optimizer that can be made: its class, and its arguments besides parameters and rate."""

    make: type[torch.optim.Optimizer]
    arguments: dict[str, Any]

    @property
    def relative_step(self) -> bool:
        """True for an Adafactor that sets its own rate."""
        return self.make.__name__ == "Adafactor" and bool(self.arguments.get("relative_step"))

    @property
    def one_rate(self) -> bool:
        """True for an optimizer that finds one step size for all parameters."""
        return self.make.__module__.split(".")[0] in ONE_RATE

    @property
    def weight_decay(self) -> float:
        """The weight decay that is given, or the optimizer's own default."""
        default = getattr(_parameters(self.make).get("weight_decay"), "default", 0.0)
        return self.arguments.get("weight_decay", default)


def chosen(options: Options) -> Chosen:
    """What --optimizer_type, --optimizer_args and diffusers' names for some of them ask for.

    Raises `Refused` for an unknown name, a package that is not installed, an argument that is malformed or
    that the optimizer does not take, and for an optimizer that needs another kind of loop.
    """
    name = optimizer_name(options)
    make = import_class(KNOWN.get(name, name), "--optimizer_type", "torch.optim", KNOWN)
    if not (isinstance(make, type) and issubclass(make, torch.optim.Optimizer)):
        raise Refused(f"--optimizer_type {name} is no optimizer; choose one of {', '.join(KNOWN)}")
    closure = inspect.signature(make.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise Refused(f"--optimizer_type {name} computes the loss several times per step; use e.g. AdamW")
    if make is torch.optim.SparseAdam:
        raise Refused(
            f"--optimizer_type {name} needs sparse gradients, and an adapter's are dense; use AdamW"
        )
    arguments: dict[str, Any] = {"nesterov": True, "momentum": 0.9} if "SGDNesterov" in name else {}
    arguments |= literals("--optimizer_args", options.optimizer_args)
    for key in arguments:
        if key in ("lr", "params") or not _takes(make, key):
            way_out = "; use --learning_rate" if key == "lr" else nearest(key, _parameters(make))
            raise Refused(f"--optimizer_args {key} is no argument of {make.__name__}{way_out}")
    _add_flags(options, make, arguments)
    if make.__name__ == "Adafactor":  # kohya's rule: its own rate by default, or if that warms up
        relative = arguments.get("relative_step", True) or arguments.get("warmup_init", False)
        arguments["relative_step"] = relative
    return Chosen(make, arguments)


def check_groups(groups: Iterable[Mapping[str, Any]], options: Options, copies: bool) -> None:
    """Refuse early what `build_optimizer` and `decay_towards` refuse; `copies`: the latter has targets."""
    picked = chosen(options)
    if picked.one_rate:
        refuse_several_rates(picked.make.__name__, _rates(groups, options))
    if copies and picked.weight_decay and _uses_values(picked.make):
        _refuse_decay(picked.make.__name__)


def _rates(groups: Iterable[Mapping[str, Any]], options: Options) -> set[float]:
    """The rates above 0 of the groups that have parameters."""
    return {group.get("lr", options.learning_rate) for group in groups if group["params"]} - {0}


def build_optimizer(
    groups: Iterable[Mapping[str, Any]], options: Options
) -> tuple[str, str, torch.optim.Optimizer]:
    """(name, arguments as text, optimizer) for torch parameter groups; one without "lr" gets --learning_rate.

    The texts are kohya's for metadata: `torch.optim.adamw.AdamW`, `weight_decay=0.01,betas=(0.9, 0.99)`.
    Raises `Refused` as `chosen` does, when there is nothing to train, for a value that the optimizer rejects,
    and for rates that differ where it knows only one.
    """
    picked = chosen(options)
    make, arguments = picked.make, picked.arguments
    parts = [{**group, "params": list(group["params"])} for group in groups]
    parts = [part for part in parts if part["params"]]
    if not parts:
        raise Refused(
            "no parameter is trained; check --network_module, and that some learning rate is above 0"
        )
    name = f"{make.__module__}.{make.__name__}"
    text = ",".join(f"{key}={value}" for key, value in arguments.items())
    rate: float | None = options.learning_rate
    rates = _rates(parts, options)
    if picked.relative_step:
        if len(rates) > 1:
            log.warning("Adafactor with relative_step sets its own rate; the parts' own rates have no effect")
        parts, rate = [{key: part[key] for key in part if key != "lr"} for part in parts], None
    elif picked.one_rate:
        refuse_several_rates(make.__name__, rates)
        if max(rates, default=1) <= 0.1:
            low = max(rates)
            log.warning(
                "%s scales the rate it finds by %g, which is very low; 1 is usual", make.__name__, low
            )
    try:
        optimizer = make(parts, lr=rate, **arguments)  # pyright: ignore[reportCallIssue]
    except (TypeError, ValueError, RuntimeError) as error:
        raise Refused(
            f"{name} rejects lr={rate},{text} ({error}); correct --learning_rate or --optimizer_args"
        ) from error
    if schedule_free(optimizer):
        optimizer.train()  # pyright: ignore[reportAttributeAccessIssue]
    return name, text, optimizer


def decay_towards(optimizer: torch.optim.Optimizer, targets: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Let weight decay pull each parameter θ of `targets` to its θ₀: in a step the optimizer sees θ − θ₀.

    Gradients and updates are the same for both; only weight decay uses the parameter's value. Raises
    `Refused` for optimizers that use the value in other ways, if their weight decay is not 0.
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    pairs = [(parameter, start) for parameter, start in targets if id(parameter) in trained]
    if not pairs or not any(group.get("weight_decay") for group in optimizer.param_groups):
        return
    if _uses_values(optimizer):
        _refuse_decay(type(optimizer).__name__)

    @torch.no_grad()
    def shift(sign: int) -> None:
        starts = [start.to(parameter) for parameter, start in pairs]
        torch._foreach_add_([parameter for parameter, _ in pairs], starts, alpha=sign)

    optimizer.register_step_pre_hook(lambda *_: shift(-1))
    optimizer.register_step_post_hook(lambda *_: shift(1))


def _uses_values(optimizer: Any) -> bool:
    """Whether an optimizer, or its class, uses a parameter's value for more than weight decay."""
    make = optimizer if isinstance(optimizer, type) else type(optimizer)
    return schedule_free(optimizer) or make.__name__ == "Adafactor"


def _refuse_decay(name: str) -> NoReturn:
    raise Refused(
        f"weight decay of {name} would pull this method's factors to 0, which erases the base model's "
        "strongest directions; give --optimizer_args weight_decay=0, or use AdamW, whose decay to the "
        "start is supported"
    )


def schedule_free(optimizer: Any) -> bool:
    """True when the weights to evaluate and save differ from those that are trained."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has train and eval for all
    return callable(getattr(inner, "eval", None)) and callable(getattr(inner, "train", None))


@contextlib.contextmanager
def training(optimizer: Any) -> Iterator[None]:
    """Around the loop: a schedule-free optimizer holds the weights that it trains, then what it held."""
    yield from _switched(optimizer, training=True)


@contextlib.contextmanager
def averaged_weights(optimizer: Any) -> Iterator[None]:
    """Around saving and sampling: a schedule-free optimizer holds its averages, then what it held."""
    yield from _switched(optimizer, training=False)


def _switched(optimizer: Any, training: bool) -> Iterator[None]:
    inner = getattr(optimizer, "optimizer", optimizer)
    before = all(group.get("train_mode", True) for group in inner.param_groups)
    if not schedule_free(inner) or before == training:
        yield
        return
    switch, restore = (inner.train, inner.eval) if training else (inner.eval, inner.train)
    switch()
    try:
        yield
    finally:
        restore()


def import_class(path: str, flag: str, home: str, names: Iterable[str] = ()) -> Any:
    """The class `path`, dotted or of the module `home`. Raises `Refused`, naming a missing package."""
    module, _, attribute = (path if "." in path else f"{home}.{path}").rpartition(".")
    root = module.split(".")[0]
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing_package(flag, attribute, (error.name or root).split(".")[0]) from error
    except ImportError as error:
        raise Refused(f"{flag} {path} cannot be imported ({error}); reinstall {root}") from error
    if not hasattr(imported, attribute):
        classes = [name for name in vars(imported) if name[0].isupper()]
        close = nearest(attribute, names) or nearest(attribute, classes)
        raise Refused(
            f"{flag} {path} is unknown{close}; give a class of {home} or its dotted name"
            + (f", or one of {', '.join(names)}" if names else "")
        )
    return getattr(imported, attribute)


def _add_flags(options: Options, make: type, arguments: dict[str, Any]) -> None:
    """Add diffusers' flags for single arguments; each must be one that the optimizer takes."""
    given: dict[str, tuple[str, object]] = {
        "weight_decay": ("adam_weight_decay", options.adam_weight_decay),
        "eps": ("adam_epsilon", options.adam_epsilon),
        "beta3": ("prodigy_beta3", options.prodigy_beta3),
        "decouple": ("prodigy_decouple", options.prodigy_decouple),
        "use_bias_correction": ("prodigy_use_bias_correction", options.prodigy_use_bias_correction),
        "safeguard_warmup": ("prodigy_safeguard_warmup", options.prodigy_safeguard_warmup),
    }
    betas = (options.adam_beta1, options.adam_beta2)
    if betas != (None, None):
        default = arguments.get("betas", getattr(_parameters(make).get("betas"), "default", (0.9, 0.999)))
        both = tuple(beta if beta is not None else other for beta, other in zip(betas, default, strict=False))
        given["betas"] = ("adam_beta1" if betas[0] is not None else "adam_beta2", (*both, *default[2:]))
    for key, (flag, value) in given.items():
        if value is None:
            continue
        if not _takes(make, key):
            raise Refused(f"--{flag} has no meaning for {make.__name__}, which takes no {key}; drop it")
        if key in arguments and arguments[key] != value:
            raise Refused(
                f"--{flag} {value} and --optimizer_args {key}={arguments[key]} differ; give one of them"
            )
        arguments[key] = value


def _parameters(make: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(make).parameters


def _takes(make: type, key: str) -> bool:
    parameters = _parameters(make)
    return key in parameters or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )
