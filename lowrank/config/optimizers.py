"""Optimizers by kohya's names, and the checks of optimizer and schedule that need only the flags."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from lowrank.config.command_line import Parsed
from lowrank.config.flag import literals, pairs, parse_text
from lowrank.config.flags_training import Optimizer
from lowrank.config.train import TrainOptions
from lowrank.errors import Refused, nearest

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
ONE_RATE = ("prodigyopt", "dadaptation")  # their optimizers find one step size for all parameters
HIGH = 0.1  # a learning rate that is an oversight for all but SGD and the optimizers of ONE_RATE
_STEP_RULE = re.compile(r"\s*[\d.]+(?:e-?\d+)?\s*:\s*\d+\s*")
_PACKAGES = {"prodigyplus": "prodigy-plus-schedule-free"}  # where the name is more than "_" for "-"


def optimizer_name(options: Optimizer) -> str:
    """The name in `KNOWN` that the flags mean, or what the user wrote. Raises `Refused` if flags differ."""
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


def refuse_several_rates(name: str, rates: set[float]) -> None:
    """Raise `Refused` where an optimizer that finds its own step size would have rates that differ."""
    if len(rates) > 1:
        raise Refused(
            f"{name} finds one step size for all parts, so their rates must be equal, but they are "
            f"{', '.join(f'{rate:g}' for rate in sorted(rates))} (--unet_lr, --text_encoder_lr, LoRA+); give "
            "one rate, or choose AdamW"
        )


def missing_package(flag: str, name: str, module: str) -> Refused:
    """The error for an optimizer whose package is not installed."""
    package = _PACKAGES.get(module, module.replace("_", "-"))
    return Refused(
        f"{flag} {name} needs the package {package}; run `pip install {package}`, or choose another"
    )


def check_optimizer(parsed: Parsed[TrainOptions]) -> Iterator[str]:
    """The rules of optimizer, rates and schedule; raises `Refused`, yields notes."""
    optimizer = parsed.options.optimizer
    name, rates = optimizer_name(optimizer), trained_rates(parsed.options)
    one_rate = KNOWN.get(name, name).split(".")[0] in ONE_RATE
    if one_rate:
        refuse_several_rates(name, rates)
    highest = max(rates, default=0)
    if highest >= HIGH and not one_rate and not name.startswith("SGD") and not sets_own_rate(optimizer):
        yield f"a learning rate of {highest:g} is very high for {name}, where 1e-4 is usual"
    schedule = optimizer.lr_scheduler
    if sets_own_rate(optimizer) or "schedulefree" in name.lower():
        if (schedule != "constant" and not schedule.startswith("adafactor:")) or optimizer.lr_scheduler_type:
            flag = parsed.flag("lr_scheduler_type" if optimizer.lr_scheduler_type else "lr_scheduler")
            yield f"{flag} has no effect: {name} has a schedule of its own"
    elif not optimizer.lr_scheduler_type:
        schedule_arguments(optimizer)


def trained_rates(options: TrainOptions) -> set[float]:
    """The learning rates above 0 of the parts that are trained, and those of LoRA+, as flags give them."""
    optimizer, network = options.optimizer, options.network
    base, arguments = optimizer.learning_rate, pairs("--network_args", network.network_args)
    rates = set[float]()
    parts = [("text_encoder", optimizer.text_encoder_lr or (base,))] if options.trains_text else []
    if not network.network_train_text_encoder_only:
        parts.append(("unet", (base if optimizer.unet_lr is None else optimizer.unet_lr,)))
    for part, part_rates in parts:
        ratio = arguments.get(f"loraplus_{part}_lr_ratio", arguments.get("loraplus_lr_ratio", "1"))
        factor = parse_text(float, ratio) or 1.0
        rates |= {factor * rate for rate in part_rates} | set(part_rates)
    return rates - {0}


def sets_own_rate(options: Optimizer) -> bool:
    """Whether the optimizer is an Adafactor that sets its own rate: by default, or to warm up, as kohya."""
    if optimizer_name(options) != "Adafactor":
        return False
    arguments = literals("--optimizer_args", options.optimizer_args)
    return bool(arguments.get("relative_step", True) or arguments.get("warmup_init", False))


def schedule_arguments(options: Optimizer) -> dict[str, str]:
    """--lr_scheduler_args of a schedule by name. Raises `Refused` for one that is missing or not known."""
    name, arguments = options.lr_scheduler, literals("--lr_scheduler_args", options.lr_scheduler_args)
    if name.startswith("adafactor:"):
        if optimizer_name(options) == "Adafactor":
            raise Refused(
                f"--lr_scheduler {name} shows the rate that Adafactor sets itself, and --optimizer_args "
                "relative_step=False switches that off; use constant_with_warmup, or drop relative_step=False"
            )
        raise Refused(f"--lr_scheduler {name} is only for --optimizer_type Adafactor; use constant")
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
    for rules in arguments.values():
        *pieces, last = str(rules).split(",")
        if parse_text(float, last) is None or not all(map(_STEP_RULE.fullmatch, pieces)):
            raise Refused(
                f"--lr_scheduler_args step_rules={rules!r} is not of the form 1:10,0.1:20,0.01: factor 1 "
                "before step 10, 0.1 before step 20, then 0.01"
            )
    return {key: str(value) for key, value in arguments.items()}


def check_optimizer_installed(options: Optimizer) -> None:
    """Refuse an optimizer whose package is missing, and an unknown name without a dot."""
    name = optimizer_name(options)
    dotted = KNOWN.get(name, name)
    if "." in dotted:
        root = dotted.split(".")[0]
        if importlib.util.find_spec(root) is None:
            raise missing_package("--optimizer_type", dotted.rpartition(".")[2], root)
        return
    spec = importlib.util.find_spec("torch")  # does not import torch
    folder = Path(spec.origin).parent / "optim" if spec and spec.origin else None
    if folder is None or not folder.is_dir():
        return
    modules = {file.stem.replace("_", "") for file in folder.glob("*.py")}
    if name.lower() not in modules:
        raise Refused(
            f"--optimizer_type {name} is unknown{nearest(name, KNOWN)}; give a class of torch.optim or its "
            f"dotted name, or one of {', '.join(KNOWN)}"
        )
