"""Which role learns how fast: groups by part and role, never by matching names (LoRA+, arXiv 2402.12354)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch.nn import Parameter


class Speed(NamedTuple):
    """How fast a layer learns, where it does not simply follow its part."""

    group: str = ""  # the name of its optimizer group
    factor: float = 1.0  # multiple of the part's learning rate
    rate: float | None = None  # its own learning rate, in place of that


class Tagged(NamedTuple):
    """A trainable parameter with the tags it was born with."""

    part: str  # "unet", "te1", …
    role: str  # "down", "up", "delta_r", …
    parameter: Parameter
    speed: Speed = Speed()


def groups(
    tagged: Iterable[Tagged], part_rates: Mapping[str, float], role_rates: Mapping[tuple[str, str], float]
) -> tuple[list[dict], list[str]]:
    """Optimizer groups and their descriptions.

    The rate of a parameter is that of its layer (part_rates[part] · speed.factor, or speed.rate) times
    role_rates.get((part, role), 1). Parameters of one group and one rate are together; a rate of 0 leaves
    them out, as kohya's trainers do. Groups keep the order of first appearance, because a resumed optimizer
    state is matched by position.
    """
    found: dict[tuple[str, Speed, float], list[Parameter]] = {}
    for part, role, parameter, speed in tagged:
        factor = role_rates.get((part, role), 1.0)
        found.setdefault((part, speed, factor), []).append(parameter)
    rated = [
        (speed.group or part, factor, factor * _rate(part_rates[part], speed), params)
        for (part, speed, factor), params in found.items()
    ]
    kept = [(name, factor, rate, params) for name, factor, rate, params in rated if rate != 0]
    names = {
        "unet": "unet",
        "te": "textencoder",
        "te1": "textencoder 1 ",
        "te2": "textencoder 2 ",
        "te3": "textencoder 3 ",
    }
    return (
        [{"params": params, "lr": rate} for _, _, rate, params in kept],
        [names.get(name, name) + ("" if factor == 1 else " plus") for name, factor, _, _ in kept],
    )


def _rate(part_rate: float, speed: Speed) -> float:
    return part_rate * speed.factor if speed.rate is None else speed.rate
