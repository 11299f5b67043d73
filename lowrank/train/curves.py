"""Learning-rate schedules: the factor on the rate as a function of the optimizer step.

The formulas are those of diffusers.optimization and transformers.optimization, which kohya's scripts call.
All but `constant` and `piecewise_constant` begin with a linear warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lowrank.errors import Refused

LAST_RATE = 1e-7  # where `polynomial` ends, as in transformers


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
    if name == "constant":
        return lambda step: 1.0
    if name == "piecewise_constant":
        return _piecewise(curve.rules)
    if name == "warmup_stable_decay":  # warms up from the floor, not from 0
        return lambda step: _warmup_stable_decay(step, curve)
    after = {
        "constant_with_warmup": lambda step, c: 1.0,
        "linear": lambda step, c: max(0.0, 1 - _progress(step, c)),
        "cosine": lambda step, c: _half_cosine(_progress(step, c)),
        "cosine_with_restarts": _restarts,
        "polynomial": _polynomial,
        "inverse_sqrt": _inverse_sqrt,
        "cosine_with_min_lr": lambda step, c: _raised(_half_cosine(c.cycles * _progress(step, c)), c),
    }[name]
    return lambda step: step / curve.warmup if step < curve.warmup else after(step, curve)


def _progress(step: int, curve: Curve) -> float:
    """0 at the end of the warm-up, 1 at the last step."""
    return (step - curve.warmup) / max(1, curve.steps - curve.warmup)


def _half_cosine(progress: float) -> float:
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


def _raised(value: float, curve: Curve) -> float:
    """[0, 1] squeezed into [floor, 1]."""
    return curve.floor + (1 - curve.floor) * value


def _restarts(step: int, curve: Curve) -> float:
    progress = _progress(step, curve)
    return 0.0 if progress >= 1 else _half_cosine(curve.cycles * progress % 1)


def _polynomial(step: int, curve: Curve) -> float:
    return curve.end + (1 - curve.end) * max(0.0, 1 - _progress(step, curve)) ** curve.power


def _inverse_sqrt(step: int, curve: Curve) -> float:
    scale = curve.timescale or curve.warmup or 10_000
    return 1 / math.sqrt((step - curve.warmup + scale) / scale)


def _warmup_stable_decay(step: int, curve: Curve) -> float:
    if step < curve.warmup:
        return _raised(step / curve.warmup, curve)
    decayed = step - (curve.steps - curve.decay)
    if decayed < 0:
        return 1.0
    if decayed >= curve.decay:
        return curve.floor
    return _raised(_half_cosine(curve.cycles * decayed / curve.decay), curve)


def _piecewise(rules: str) -> Callable[[int], float]:
    try:
        *parts, last = rules.split(",")
        pieces = sorted((int(until), float(value)) for value, until in (part.split(":") for part in parts))
        rest = float(last)
    except ValueError as error:
        raise Refused(
            f"--lr_scheduler_args step_rules={rules!r} is not of the form 1:10,0.1:20,0.01: factor 1 before "
            "step 10, 0.1 before step 20, then 0.01"
        ) from error
    return lambda step: next((value for until, value in pieces if step < until), rest)
