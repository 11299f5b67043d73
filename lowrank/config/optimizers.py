"""Optimizers by kohya's names, and the checks of optimizer and schedule that need only the flags."""

from __future__ import annotations

import importlib.util
from pathlib import Path

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


def check_rates(options: TrainOptions) -> None:
    """Refuse two learning rates for an optimizer that has one, and schedules that lack their numbers."""
    optimizer, network = options.optimizer, options.network
    name = optimizer_name(optimizer)
    rate, rates = optimizer.learning_rate, set[float]()
    if not network.network_train_text_encoder_only:
        rates.add(rate if optimizer.unet_lr is None else optimizer.unet_lr)
    if options.trains_text:
        rates.add(optimizer.text_encoder_lr[0] if optimizer.text_encoder_lr else rate)
    if KNOWN.get(name, name).split(".")[0] in ONE_RATE:
        refuse_several_rates(name, rates - {0})
    schedule, lower = optimizer.lr_scheduler, name.lower()
    if "schedulefree" in lower or "adafactor" in lower or optimizer.lr_scheduler_type:
        return
    if schedule.startswith("adafactor:"):
        raise Refused(f"--lr_scheduler {schedule} is only for --optimizer_type Adafactor; use constant")
    if schedule == "cosine_with_min_lr" and optimizer.lr_scheduler_min_lr_ratio is None:
        raise Refused(f"--lr_scheduler {schedule} needs --lr_scheduler_min_lr_ratio, e.g. 0.1")


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
