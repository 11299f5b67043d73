"""Learning-rate schedules: the factor on the rate as a function of the optimizer step.

They are those of diffusers and, where it has none, of transformers, which kohya's scripts call too. All but
`constant` and `piecewise_constant` begin with a linear warm-up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lowrank.errors import Refused

LAST_RATE = 1e-7  # where `polynomial` ends, as in diffusers


@dataclass(frozen=True)
class Curve:
    """What a schedule depends on besides the step; all lengths in optimizer steps."""

    steps: int
    warmup: int = 0
    decay: int = 0  # last steps of warmup_stable_decay
    cycles: int = 1
    power: float = 1.0
    timescale: int | None = None
    floor: float = 0.0  # lowest factor
    end: float = 0.0  # LAST_RATE / rate
    rules: str = ""  # "1:10,0.1:20,0.01": 1 before step 10, 0.1 before step 20, then 0.01


def factor(name: str, curve: Curve) -> Callable[[int], float]:
    """The schedule `name` as a function of the step. Raises `Refused` for malformed `rules`."""
    from diffusers.optimization import get_scheduler  # only here: a command line needs neither
    from transformers import optimization as transformers

    if name in ("linear", "polynomial"):
        end, power = (0.0, 1.0) if name == "linear" else (curve.end, curve.power)
        return lambda step: _polynomial(step, curve, end, power)
    carrier = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # the libraries hang a schedule on an optimizer
    lengths = {"num_warmup_steps": curve.warmup, "num_training_steps": curve.steps}
    waves = curve.cycles / 2  # a cycle goes down, a wave down and up
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
    try:
        made = get_scheduler(name, carrier, curve.rules, **lengths, num_cycles=curve.cycles)
        return made.lr_lambdas[0]
    except ValueError as error:
        raise Refused(
            f"--lr_scheduler_args step_rules={curve.rules!r} is not of the form 1:10,0.1:20,0.01: factor 1 "
            "before step 10, 0.1 before step 20, then 0.01"
        ) from error


def _polynomial(step: int, curve: Curve, end: float, power: float) -> float:
    """From 1 to `end`. Not diffusers': after a warm-up as long as the run its `linear` is 0 and its
    `polynomial` divides by 0, which also refuses every rate up to LAST_RATE."""
    if step < curve.warmup:
        return step / curve.warmup
    left = max(0.0, 1 - (step - curve.warmup) / max(1, curve.steps - curve.warmup))
    return end + (1 - end) * left**power
