"""Optimizer groups by component and role, with a learning rate for each (LoRA+, arXiv 2402.12354)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Parameter


class Speed(NamedTuple):
    """The learning rate of a layer, if it is not that of its part."""

    group: str = ""  # name of the optimizer group
    factor: float = 1.0  # multiple of the learning rate of the part
    rate: float | None = None  # absolute learning rate, replaces the part's


class Tagged(NamedTuple):
    """A trainable parameter with the part and the role it was created with."""

    part: str  # "unet", "te1", …
    role: str  # "down", "up", "delta_r", …
    parameter: Parameter
    speed: Speed = Speed()


def groups(
    tagged: Iterable[Tagged], part_rates: Mapping[str, float], role_rates: Mapping[tuple[str, str], float]
) -> tuple[list[dict], list[str]]:
    """Return optimizer groups and their names.

    The learning rate of a parameter is that of its layer (part_rates[part] · speed.factor, or speed.rate)
    times role_rates.get((part, role), 1). Parameters of one group and rate are put together. A rate of 0
    omits the parameters, as in kohya's trainers. Groups are in the order of first appearance, because a
    resumed optimizer state is matched by position.
    """
    grouped: dict[tuple[str, Speed, float], list[Parameter]] = {}
    for part, role, parameter, speed in tagged:
        factor = role_rates.get((part, role), 1.0)
        grouped.setdefault((part, speed, factor), []).append(parameter)
    rated = [
        (speed.group or part, factor, factor * _rate(part_rates[part], speed), params)
        for (part, speed, factor), params in grouped.items()
    ]
    kept = [(name, factor, rate, params) for name, factor, rate, params in rated if rate != 0]
    kohya_names = {
        "unet": "unet",
        "te": "textencoder",
        "te1": "textencoder 1 ",
        "te2": "textencoder 2 ",
        "te3": "textencoder 3 ",
    }
    return (
        [{"params": params, "lr": rate} for _, _, rate, params in kept],
        [kohya_names.get(name, name) + ("" if factor == 1 else " plus") for name, factor, _, _ in kept],
    )


def decay_targets(network: Any) -> list[tuple[Parameter, Tensor]]:
    """Return the parameters that weight decay must pull to another value than 0, each with this value.

    If an initial copy U₀·D₀ is subtracted, decay of U and D to 0 would make ΔW = −U₀·D₀.
    """
    starts = network.factor.starts()
    return [
        (parameter, getattr(layer, starts[role]))
        for layer in network.layers()
        for role, parameter in layer.roles().items()
        if role in starts
    ]


def _rate(part_rate: float, speed: Speed) -> float:
    return part_rate * speed.factor if speed.rate is None else speed.rate
