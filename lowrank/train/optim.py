"""Optimizers and learning-rate schedules by kohya's names, and the plan of steps and epochs.

A library is imported when its optimizer is asked for, and `chosen` can be called before a model is loaded, so
that a misspelt name or argument costs no time.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lowrank.errors import Refused, nearest
from lowrank.fields import literals
from lowrank.flags.training import Optimizer as Options
from lowrank.train.curves import LAST_RATE, Curve, factor

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
_PACKAGES = {"prodigyplus": "prodigy-plus-schedule-free"}  # where the name is more than "_" for "-"
_ONE_RATE = ("prodigyopt", "dadaptation")  # they find the step size themselves, one for all parameters
# diffusers' flags for single arguments of an optimizer, besides the betas
_FLAGS = {
    "adam_weight_decay": "weight_decay",
    "adam_epsilon": "eps",
    "prodigy_beta3": "beta3",
    "prodigy_decouple": "decouple",
    "prodigy_use_bias_correction": "use_bias_correction",
    "prodigy_safeguard_warmup": "safeguard_warmup",
}


class Plan(NamedTuple):
    """How long a run is. `batches` are the micro-batches of one process in one epoch."""

    steps: int
    epochs: int
    batches: int
    accumulation: int
    processes: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of about one epoch, at least 1: steps need not end where epochs do."""
        return max(1, self.batches // self.accumulation)


def plan(
    batches: int, processes: int, accumulation: int, max_train_steps: int, max_train_epochs: int | None = None
) -> Plan:
    """Steps and epochs of a run whose processes have `batches` micro-batches each per epoch.

    Accumulation counts micro-batches and goes on across the end of an epoch: with one image and accumulation
    4 a step takes 4 epochs (accelerate's own data loaders would step after each, with a quarter of the
    gradient). With `max_train_epochs`, as in kohya's scripts, `max_train_steps` does not count; the last step
    is a whole one and may read on into one more epoch. Raises `Refused` without any batch.
    """
    if batches < 1:
        raise Refused("an epoch has no batch; give at least one readable training image")
    steps = -(-max_train_epochs * batches // accumulation) if max_train_epochs else max_train_steps
    return Plan(steps, -(-steps * accumulation // batches), batches, accumulation, processes)


# ---------- optimizers


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

    Raises `Refused` for an unknown name, a package that is not installed, an argument that is malformed or
    that the optimizer does not take, and for an optimizer that needs another kind of loop.
    """
    name = _name(options)
    make = load(KNOWN.get(name, name), "--optimizer_type", "torch.optim", KNOWN)
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
    if make.__name__ == "Adafactor":  # kohya's rule: its own rate unless told otherwise, or if that warms up
        relative = arguments.get("relative_step", True) or arguments.get("warmup_init", False)
        arguments["relative_step"] = relative
    return Chosen(make, arguments)


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
    rates = {part.get("lr", rate) for part in parts} - {0}
    if picked.relative_step:
        if len(rates) > 1:
            log.warning("Adafactor with relative_step sets its own rate; the parts' own rates have no effect")
        parts, rate = [{key: part[key] for key in part if key != "lr"} for part in parts], None
    elif make.__module__.split(".")[0] in _ONE_RATE:
        _check_one_rate(make.__name__, rates)
    try:
        optimizer = make(parts, lr=rate, **arguments)  # pyright: ignore[reportCallIssue]
    except (TypeError, ValueError, RuntimeError) as error:
        raise Refused(
            f"{name} rejects lr={rate},{text} ({error}); correct --learning_rate or --optimizer_args"
        ) from error
    if schedule_free(optimizer):
        optimizer.train()  # pyright: ignore[reportAttributeAccessIssue]
    return name, text, optimizer


def schedule_free(optimizer: Any) -> bool:
    """True when the weights to evaluate and save differ from those that are trained."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has train and eval for all
    return callable(getattr(inner, "eval", None)) and callable(getattr(inner, "train", None))


@contextlib.contextmanager
def training(optimizer: Any) -> Iterator[None]:
    """Around the loop: a schedule-free optimizer holds the weights that it trains, then what it held."""
    yield from _held(optimizer, training=True)


@contextlib.contextmanager
def evaluating(optimizer: Any) -> Iterator[None]:
    """Around saving and sampling: a schedule-free optimizer holds its averages, then what it held."""
    yield from _held(optimizer, training=False)


def _held(optimizer: Any, training: bool) -> Iterator[None]:
    inner = getattr(optimizer, "optimizer", optimizer)
    before = all(group.get("train_mode", True) for group in inner.param_groups)
    if not schedule_free(inner) or before == training:
        yield
        return
    there, back = (inner.train, inner.eval) if training else (inner.eval, inner.train)
    there()
    try:
        yield
    finally:
        back()


def load(path: str, flag: str, home: str, names: Iterable[str] = ()) -> Any:
    """The class `path`, dotted or of the module `home`. Raises `Refused`, naming a missing package."""
    module, _, attribute = (path if "." in path else f"{home}.{path}").rpartition(".")
    root = module.split(".")[0]
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or root).split(".")[0]
        package = _PACKAGES.get(missing, missing.replace("_", "-"))
        raise Refused(
            f"{flag} {attribute} needs the package {package}; run `pip install {package}`, or choose another"
        ) from error
    except ImportError as error:
        raise Refused(f"{flag} {path} cannot be imported ({error}); reinstall {root}") from error
    if not hasattr(found, attribute):
        classes = [name for name in vars(found) if name[0].isupper()]
        close = nearest(attribute, names) or nearest(attribute, classes)
        raise Refused(
            f"{flag} {path} is unknown{close}; give a class of {home} or its dotted name"
            + (f", or one of {', '.join(names)}" if names else "")
        )
    return getattr(found, attribute)


def _name(options: Options) -> str:
    """The name in `KNOWN` that is meant, or what the user wrote."""
    name = options.optimizer_type
    if options.use_8bit_adam:
        if name.lower() not in ("", "adamw", "adamw8bit"):
            raise Refused(f"--use_8bit_adam is for AdamW, but --optimizer_type is {name}; give one of them")
        name = "AdamW8bit"
    if options.use_lion_optimizer:
        if name.lower() not in ("", "lion"):
            raise Refused(f"--use_lion_optimizer is Lion, but the optimizer is {name}; give one of them")
        name = "Lion"
    return {known.lower(): known for known in KNOWN}.get((name or "AdamW").lower(), name)


def _add_flags(options: Options, make: type, arguments: dict[str, Any]) -> None:
    """Add diffusers' flags for single arguments; each must be one that the optimizer takes."""
    told = {key: (flag, getattr(options, flag)) for flag, key in _FLAGS.items()}
    betas = (options.adam_beta1, options.adam_beta2)
    if betas != (None, None):
        default = arguments.get("betas", getattr(_parameters(make).get("betas"), "default", (0.9, 0.999)))
        both = tuple(own if own is not None else other for own, other in zip(betas, default, strict=False))
        told["betas"] = ("adam_beta1" if betas[0] is not None else "adam_beta2", (*both, *default[2:]))
    for key, (flag, value) in told.items():
        if value is None:
            continue
        if not _takes(make, key):
            raise Refused(f"--{flag} has no meaning for {make.__name__}, which takes no {key}; drop it")
        if key in arguments and arguments[key] != value:
            raise Refused(
                f"--{flag} {value} and --optimizer_args {key}={arguments[key]} differ; give one of them"
            )
        arguments[key] = value


def _check_one_rate(name: str, rates: set[float]) -> None:
    if len(rates) > 1:
        raise Refused(
            f"{name} finds one step size for all parts, so their rates must be equal, but they are "
            f"{', '.join(f'{rate:g}' for rate in sorted(rates))} (--unet_lr, --text_encoder_lr, LoRA+); give "
            "one rate, or choose AdamW"
        )
    if max(rates, default=1) <= 0.1:
        log.warning("%s scales the rate it finds by %g, which is very low; 1 is usual", name, max(rates))


def _parameters(make: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(make).parameters


def _takes(make: type, key: str) -> bool:
    parameters = _parameters(make)
    return key in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


# ---------- schedules


def build_scheduler(
    optimizer: torch.optim.Optimizer, options: Options, total_steps: int, processes: int = 1
) -> LRScheduler:
    """The learning-rate schedule of a run of `total_steps` optimizer steps, to be wrapped by accelerate.

    accelerate steps a scheduler once per process at each optimizer step, so `processes` of its steps are one
    here. Adafactor with its own rate and schedule-free optimizers have nothing to schedule: the first reports
    its rate, the others keep theirs. Raises `Refused` for names and arguments that do not fit.
    """
    name = options.lr_scheduler
    own = any(group.get("relative_step") for group in optimizer.param_groups)
    if own or schedule_free(optimizer):
        if (name != "constant" and not name.startswith("adafactor:")) or options.lr_scheduler_type:
            log.warning("%s has its own schedule; --lr_scheduler has no effect", type(optimizer).__name__)
        return _adafactor(optimizer, options) if own else LambdaLR(optimizer, lambda step: 1.0)
    if options.lr_scheduler_type:
        check_schedule(options)
        return _custom(optimizer, options, processes)
    if name.startswith("adafactor:"):
        raise Refused(f"--lr_scheduler {name} is only for --optimizer_type Adafactor; use constant")
    curve = factor(name, _curve(optimizer, options, total_steps))
    return LambdaLR(optimizer, lambda step: curve(step // processes))


def _curve(optimizer: torch.optim.Optimizer, options: Options, total_steps: int) -> Curve:
    name, arguments = options.lr_scheduler, literals("--lr_scheduler_args", options.lr_scheduler_args)
    known = ("step_rules",) if name == "piecewise_constant" else ()
    for key in arguments.keys() - set(known):
        raise Refused(
            f"--lr_scheduler_args {key} is no argument of {name}{nearest(key, known)}; use the flags "
            "--lr_warmup_steps, --lr_scheduler_num_cycles and the like"
        )
    if known and "step_rules" not in arguments:
        raise Refused(f"--lr_scheduler {name} needs --lr_scheduler_args \"step_rules='1:10,0.1:20,0.01'\"")
    if name == "cosine_with_min_lr" and options.lr_scheduler_min_lr_ratio is None:
        raise Refused(f"--lr_scheduler {name} needs --lr_scheduler_min_lr_ratio, e.g. 0.1")
    warmup, decay = (
        int(value * total_steps) if value < 1 else int(value)
        for value in (options.lr_warmup_steps, options.lr_decay_steps)
    )
    if warmup + decay > total_steps:
        log.warning("warm-up (%d) and decay (%d) are longer than the %d steps", warmup, decay, total_steps)
    rate = optimizer.defaults["lr"] or LAST_RATE
    return Curve(
        steps=total_steps,
        warmup=warmup,
        decay=decay,
        cycles=options.lr_scheduler_num_cycles,
        power=options.lr_scheduler_power,
        timescale=options.lr_scheduler_timescale,
        floor=options.lr_scheduler_min_lr_ratio or 0.0,
        end=min(1.0, LAST_RATE / rate),
        rules=str(arguments.get("step_rules", "")),
    )


def check_schedule(options: Options) -> None:
    """Refuse a --lr_scheduler_type or arguments that do not fit; before anything is loaded."""
    if not options.lr_scheduler_type:
        return
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=options.learning_rate)
    schedule = _custom(optimizer, options)
    optimizer.step()
    try:
        schedule.step()  # where some look at their arguments for the first time
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise Refused(
            f"{type(schedule).__name__} rejects {' '.join(options.lr_scheduler_args)} ({error}); correct "
            "--lr_scheduler_args"
        ) from error


def _custom(optimizer: torch.optim.Optimizer, options: Options, processes: int = 1) -> LRScheduler:
    make = load(options.lr_scheduler_type, "--lr_scheduler_type", "torch.optim.lr_scheduler")
    if not (isinstance(make, type) and issubclass(make, LRScheduler)) or make.__name__ == "ReduceLROnPlateau":
        raise Refused(
            f"--lr_scheduler_type {options.lr_scheduler_type} is not a schedule of the step alone; use e.g. "
            "CosineAnnealingLR"
        )
    if processes > 1:
        log.warning(
            "with %d processes %s counts %d steps per optimizer step", processes, make.__name__, processes
        )
    arguments = literals("--lr_scheduler_args", options.lr_scheduler_args)
    try:
        return make(optimizer, **arguments)
    except (TypeError, ValueError) as error:
        raise Refused(
            f"{make.__name__} rejects {arguments} ({error}); correct --lr_scheduler_args"
        ) from error


def _adafactor(optimizer: torch.optim.Optimizer, options: Options) -> LRScheduler:
    from transformers.optimization import AdafactorSchedule  # only here: transformers is slow to import

    start = options.lr_scheduler.partition(":")[2] or str(options.learning_rate)
    try:
        return AdafactorSchedule(optimizer, float(start))
    except ValueError as error:
        raise Refused(f"--lr_scheduler {options.lr_scheduler}: {start!r} is not a rate") from error
