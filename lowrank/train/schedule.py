"""Learning-rate schedules, and the plan of steps and epochs.

A schedule is the factor on the rate as a function of the optimizer step. It comes from diffusers.optimization
or, where diffusers has none, from transformers.optimization, as in kohya's scripts. All but `constant`
and `piecewise_constant` begin with a linear warm-up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lowrank.config.flag import literals
from lowrank.config.flags_training import Optimizer as Options
from lowrank.config.optimizers import schedule_arguments
from lowrank.errors import Refused
from lowrank.train.optim import import_class, schedule_free

log = logging.getLogger(__name__)

LAST_RATE = 1e-7  # where `polynomial` ends, as in diffusers


@dataclass(frozen=True)
class Curve:
    """Parameters of a schedule; all lengths in optimizer steps."""

    steps: int
    warmup: int = 0
    decay: int = 0  # last steps of warmup_stable_decay
    cycles: int = 1
    power: float = 1.0
    timescale: int | None = None
    floor: float = 0.0  # lowest factor
    end: float = 0.0  # LAST_RATE / rate
    rules: str = ""  # "1:10,0.1:20,0.01": 1 before step 10, 0.1 before step 20, then 0.01


def rate_factor(name: str, curve: Curve) -> Callable[[int], float]:
    """The schedule `name` as a function of the step."""
    from diffusers.optimization import get_scheduler  # imported late: parsing needs neither
    from transformers import optimization as transformers

    if name in ("linear", "polynomial"):
        end, power = (0.0, 1.0) if name == "linear" else (curve.end, curve.power)
        return lambda step: _polynomial(step, curve, end, power)
    carrier = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # the libraries attach a schedule to an optimizer
    lengths = {"num_warmup_steps": curve.warmup, "num_training_steps": curve.steps}
    waves = curve.cycles / 2  # a cycle falls once, a wave falls and rises
    arguments = {
        "inverse_sqrt": {"timescale": curve.timescale or None},
        "cosine_with_min_lr": {"num_cycles": waves, "min_lr_rate": curve.floor},
        "warmup_stable_decay": {
            "num_cycles": waves,
            "min_lr_ratio": curve.floor,
            "num_decay_steps": curve.decay,
        },
    }
    if name in arguments:
        made: Any = transformers.get_scheduler(
            name, carrier, **lengths, scheduler_specific_kwargs=arguments[name]
        )
        return made.lr_lambdas[0]
    made = get_scheduler(name, carrier, curve.rules, **lengths, num_cycles=curve.cycles)
    return made.lr_lambdas[0]


def _polynomial(step: int, curve: Curve, end: float, power: float) -> float:
    """Fall from 1 to `end` after the warm-up.

    Replaces diffusers' functions: if the warm-up is as long as the run, its `linear` is 0 and its
    `polynomial` divides by 0, and `polynomial` refuses every rate up to LAST_RATE.
    """
    if step < curve.warmup:
        return step / curve.warmup
    left = max(0.0, 1 - (step - curve.warmup) / max(1, curve.steps - curve.warmup))
    return end + (1 - end) * left**power


class RunPlan(NamedTuple):
    """The length of a run. `batches` are the micro-batches of one process in one epoch."""

    steps: int
    epochs: int
    batches: int
    accumulation: int
    processes: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in about one epoch, at least 1; a step may cross the end of an epoch."""
        return max(1, self.batches // self.accumulation)


def plan_run(
    batches: int, processes: int, accumulation: int, max_train_steps: int, max_train_epochs: int | None = None
) -> RunPlan:
    """Steps and epochs of a run whose processes have `batches` micro-batches each per epoch.

    Accumulation counts micro-batches and continues across the end of an epoch: with one image and
    accumulation 4 a step takes 4 epochs (accelerate's data loaders would step after each, with a quarter of
    the gradient). `max_train_epochs` overrides `max_train_steps`, as in kohya's scripts; the last step is
    complete and may read into one more epoch. Raises `Refused` if there is no batch.
    """
    if batches < 1:
        raise Refused("an epoch has no batch; give at least one readable training image")
    steps = -(-max_train_epochs * batches // accumulation) if max_train_epochs else max_train_steps
    return RunPlan(steps, -(-steps * accumulation // batches), batches, accumulation, processes)


def build_scheduler(
    optimizer: torch.optim.Optimizer, options: Options, total_steps: int, processes: int = 1
) -> LRScheduler:
    """The learning-rate schedule of a run of `total_steps` optimizer steps, to be wrapped by accelerate.

    accelerate steps a scheduler once per process at each optimizer step, so `processes` scheduler steps are
    one optimizer step. Adafactor with relative steps and schedule-free optimizers ignore the schedule: the
    first reports its own rate, the others keep theirs. Raises `Refused` for unknown names and arguments.
    """
    relative_step = any(group.get("relative_step") for group in optimizer.param_groups)
    if relative_step or schedule_free(optimizer):
        return _adafactor(optimizer, options) if relative_step else LambdaLR(optimizer, lambda step: 1.0)
    if options.lr_scheduler_type:
        check_schedule(options)
        return _custom(optimizer, options, processes)
    factor = rate_factor(options.lr_scheduler, _curve(optimizer, options, total_steps))
    if processes == 1:
        return LambdaLR(optimizer, factor)
    return LambdaLR(optimizer, lambda step: factor(step // processes))


def _curve(optimizer: torch.optim.Optimizer, options: Options, total_steps: int) -> Curve:
    arguments = schedule_arguments(options)
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
        rules=arguments.get("step_rules", ""),
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
    make = import_class(options.lr_scheduler_type, "--lr_scheduler_type", "torch.optim.lr_scheduler")
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
