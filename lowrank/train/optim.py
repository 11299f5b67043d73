"""Optimizers by name: kohya's names in any case, a class of torch.optim, or any dotted class.

A library is imported when its optimizer is asked for, and `chosen` can be called before a model is loaded, so a
misspelt name or argument costs no time.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from lowrank.errors import Refused, nearest
from lowrank.flags import Optimizer as Options
from lowrank.options import pairs

log = logging.getLogger(__name__)

KNOWN = {
    "AdamW": "torch.optim.AdamW",
    "SGDNesterov": "torch.optim.SGD",
    "AdamW8bit": "bitsandbytes.optim.AdamW8bit",
    "PagedAdamW": "bitsandbytes.optim.PagedAdamW",
    "PagedAdamW8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "PagedAdamW32bit": "bitsandbytes.optim.PagedAdamW32bit",
    "Lion8bit": "bitsandbytes.optim.Lion8bit",
    "PagedLion8bit": "bitsandbytes.optim.PagedLion8bit",
    "SGDNesterov8bit": "bitsandbytes.optim.SGD8bit",
    "Lion": "lion_pytorch.Lion",
    "DAdaptation": "dadaptation.experimental.DAdaptAdamPreprint",
    "DAdaptAdamPreprint": "dadaptation.experimental.DAdaptAdamPreprint",
    "DAdaptAdaGrad": "dadaptation.DAdaptAdaGrad",
    "DAdaptAdam": "dadaptation.DAdaptAdam",
    "DAdaptAdan": "dadaptation.DAdaptAdan",
    "DAdaptAdanIP": "dadaptation.experimental.DAdaptAdanIP",
    "DAdaptLion": "dadaptation.DAdaptLion",
    "DAdaptSGD": "dadaptation.DAdaptSGD",
    "Prodigy": "prodigyopt.Prodigy",
    "Adafactor": "transformers.optimization.Adafactor",
    "RAdamScheduleFree": "schedulefree.RAdamScheduleFree",
    "AdamWScheduleFree": "schedulefree.AdamWScheduleFree",
    "SGDScheduleFree": "schedulefree.SGDScheduleFree",
}
_PRESETS = {
    "SGDNesterov": {"nesterov": True, "momentum": 0.9},
    "SGDNesterov8bit": {"nesterov": True, "momentum": 0.9},
}
_PACKAGES = {
    "lion_pytorch": "lion-pytorch",
    "pytorch_optimizer": "pytorch-optimizer",
    "prodigyplus": "prodigy-plus-schedule-free",
}
_ONE_RATE = ("prodigyopt", "dadaptation")  # they find the step size themselves, one for all parameters


class Chosen(NamedTuple):
    """An optimizer that can be made: its class, and its arguments besides parameters and rate."""

    make: type[torch.optim.Optimizer]
    arguments: dict[str, Any]

    @property
    def relative_step(self) -> bool:
        """True for an Adafactor that sets its own rate."""
        return self.make.__name__ == "Adafactor" and bool(self.arguments.get("relative_step"))


def chosen(options: Options) -> Chosen:
    """What --optimizer_type, --optimizer_args and diffusers' names for some of them ask for.

    Raises `Refused` for an unknown name, a package that is not installed, and an argument that is malformed or that the
    optimizer does not take.
    """
    name = _name(options)
    make = load(KNOWN.get(name, name), "--optimizer_type", "torch.optim", KNOWN)
    if not (isinstance(make, type) and issubclass(make, torch.optim.Optimizer)):
        raise Refused(
            f"--optimizer_type {name} is not a class of optimizers; choose AdamW or one of {', '.join(KNOWN)}"
        )
    arguments = dict(_PRESETS.get(name, ())) | literals("--optimizer_args", options.optimizer_args)
    for key in arguments:
        if key in ("lr", "params") or not _takes(make, key):
            use = "; use --learning_rate" if key == "lr" else nearest(key, _parameters(make))
            raise Refused(f"--optimizer_args {key} is no argument of {make.__name__}{use}")
    _add_flags(options, make, arguments)
    if make.__name__ == "Adafactor":
        # kohya: its own rate unless told otherwise; its warm-up exists only with that.
        arguments["relative_step"] = arguments.get("relative_step", True) or arguments.get(
            "warmup_init", False
        )
    return Chosen(make, arguments)


def build_optimizer(
    groups: Iterable[Mapping[str, Any]], options: Options
) -> tuple[str, str, torch.optim.Optimizer]:
    """(name, arguments as text, optimizer) for torch parameter groups; a group without "lr" gets --learning_rate.

    The texts are kohya's for metadata: `torch.optim.adamw.AdamW`, `weight_decay=0.01,betas=(0.9, 0.99)`. Raises
    `Refused` as `chosen` does, when there is nothing to train, for a value that the optimizer rejects, and for
    rates that differ where it knows only one.
    """
    make, arguments = picked = chosen(options)
    groups = [dict(group, params=list(group["params"])) for group in groups]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise Refused(
            "no parameter is trained; check --network_module, and that not every learning rate is 0"
        )
    name, text = (
        f"{make.__module__}.{make.__name__}",
        ",".join(f"{key}={value}" for key, value in arguments.items()),
    )
    rate: float | None = options.learning_rate
    rates = {group.get("lr", rate) for group in groups} - {0, 0.0}
    if picked.relative_step:
        rate = None
        groups = [{key: value for key, value in group.items() if key != "lr"} for group in groups]
        if len(rates) > 1:
            log.warning("Adafactor with relative_step sets its own rate; the parts' own rates have no effect")
    elif make.__module__.split(".")[0] in _ONE_RATE:
        _check_one_rate(make.__name__, rates)
    try:
        optimizer = make(groups, lr=rate, **arguments)
    except (TypeError, ValueError) as error:
        raise Refused(
            f"{name} does not accept lr={rate},{text}: {error}; correct --optimizer_args"
        ) from error
    if schedule_free(optimizer):
        optimizer.train()
    return name, text, optimizer


def schedule_free(optimizer: Any) -> bool:
    """True when the weights to evaluate and save differ from those that are trained."""
    inner = getattr(
        optimizer, "optimizer", optimizer
    )  # accelerate's wrapper has train and eval for any optimizer
    return callable(getattr(inner, "eval", None)) and callable(getattr(inner, "train", None))


@contextlib.contextmanager
def evaluating(optimizer: Any) -> Iterator[None]:
    """Around saving, sampling and validation: a schedule-free optimizer swaps its averaged weights in, then back."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if not schedule_free(inner) or not all(group.get("train_mode", True) for group in inner.param_groups):
        yield
        return
    inner.eval()
    try:
        yield
    finally:
        inner.train()


def literals(flag: str, items: Iterable[str]) -> dict[str, Any]:
    """`key=value` texts with Python literals as values; `betas=0.9,0.99` is a tuple. Raises `Refused`."""
    found = {}
    for key, text in pairs(flag, items).items():
        try:
            found[key] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise Refused(
                f"{flag} {key}={text}: the value is not a Python literal; write e.g. True, 0.1 or (0.9,0.99), and a text "
                f"with its quotes: \"{key}='{text}'\""
            ) from error
    return found


def load(path: str, flag: str, home: str, names: Iterable[str] = ()) -> Any:
    """The class `path`, dotted or of the module `home`. Raises `Refused`, naming the package that is missing."""
    module, _, attribute = (path if "." in path else f"{home}.{path}").rpartition(".")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).split(".")[0]
        package = _PACKAGES.get(missing, missing)
        raise Refused(
            f"{flag} {path} needs the package {package}; run `pip install {package}`, or choose another"
        ) from error
    except ImportError as error:
        raise Refused(
            f"{flag} {path} cannot be imported ({error}); repair {module.split('.')[0]}, or choose another"
        ) from error
    if not hasattr(found, attribute):
        known = [*names, *(name for name in vars(found) if name[0].isupper())]
        raise Refused(
            f"{flag} {path} is not known{nearest(path, known) or nearest(attribute, known)}; give a name of "
            f"{home}, a dotted class, or one of {', '.join(names) or 'its classes'}"
        )
    return getattr(found, attribute)


def _name(options: Options) -> str:
    name = options.optimizer_type
    for flag, wanted, allowed in (
        ("use_8bit_adam", "AdamW8bit", ("", "adamw", "adamw8bit")),
        ("use_lion_optimizer", "Lion", ("", "lion")),
    ):
        if getattr(options, flag):
            if name.lower() not in allowed:
                raise Refused(f"--{flag} means --optimizer_type {wanted}, which is {name}; give one of them")
            name = wanted
    return {known.lower(): known for known in KNOWN}.get((name or "AdamW").lower(), name)


def _add_flags(options: Options, make: type, arguments: dict[str, Any]) -> None:
    """Diffusers' flags for single arguments; each must be one that the optimizer takes."""
    told = {
        "adam_weight_decay": "weight_decay",
        "adam_epsilon": "eps",
        "prodigy_beta3": "beta3",
        "prodigy_decouple": "decouple",
        "prodigy_use_bias_correction": "use_bias_correction",
        "prodigy_safeguard_warmup": "safeguard_warmup",
    }
    values = {
        flag: (key, getattr(options, flag))
        for flag, key in told.items()
        if getattr(options, flag) is not None
    }
    if (options.adam_beta1, options.adam_beta2) != (None, None):
        default = arguments.get("betas", getattr(_parameters(make).get("betas"), "default", (0.9, 0.999)))
        beta1 = default[0] if options.adam_beta1 is None else options.adam_beta1
        beta2 = default[1] if options.adam_beta2 is None else options.adam_beta2
        values["adam_beta1" if options.adam_beta1 is not None else "adam_beta2"] = (
            "betas",
            (beta1, beta2, *default[2:]),
        )
    for flag, (key, value) in values.items():
        if not _takes(make, key):
            raise Refused(f"--{flag} has no meaning for {make.__name__}, which takes no {key}; drop it")
        if key in arguments and arguments[key] != value and key in pairs("", options.optimizer_args):
            raise Refused(
                f"--{flag} {value} and --optimizer_args {key}={arguments[key]} differ; give one of them"
            )
        arguments[key] = value


def _check_one_rate(name: str, rates: set) -> None:
    if len(rates) > 1:
        raise Refused(
            f"{name} finds one step size for all parts, so their rates must not differ, but they are "
            f"{', '.join(f'{rate:g}' for rate in sorted(rates))} (--unet_lr, --text_encoder_lr, LoRA+); give one rate, or "
            "choose AdamW"
        )
    if rates and max(rates) <= 0.1:
        log.warning(
            "%s multiplies --learning_rate to the rate it finds, so %g is very low; 1 is usual",
            name,
            max(rates),
        )


def _parameters(make: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(make).parameters


def _takes(make: type, key: str) -> bool:
    parameters = _parameters(make)
    return key in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
