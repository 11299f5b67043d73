"""Which role learns how fast: groups by part and role, never by matching names (LoRA+, arXiv 2402.12354)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch.nn import Parameter


class Tagged(NamedTuple):
    """A trainable parameter with the tags it was born with."""

    part: str  # "unet", "te1", …
    role: str  # "down", "up", "delta_r", …
    parameter: Parameter


def groups(
    tagged: Iterable[Tagged], part_rates: Mapping[str, float], role_rates: Mapping[tuple[str, str], float]
) -> tuple[list[dict], list[str]]:
    """Optimizer groups and their descriptions.

    The rate of a parameter is part_rates[part] · role_rates.get((part, role), 1). Parameters of one part and
    one rate share a group; a rate of 0 leaves the group out, as kohya's trainers do. Groups keep the order of
    first appearance, because a resumed optimizer state is matched by position.
    """
    found: dict[tuple[str, float], list[Parameter]] = {}
    for part, role, parameter in tagged:
        factor = role_rates.get((part, role), 1.0)
        found.setdefault((part, factor), []).append(parameter)
    rated = [(part, factor, part_rates[part] * factor, params) for (part, factor), params in found.items()]
    kept = [(part, factor, rate, params) for part, factor, rate, params in rated if rate != 0]
    names = {
        "unet": "unet",
        "te": "textencoder",
        "te1": "textencoder 1 ",
        "te2": "textencoder 2 ",
        "te3": "textencoder 3 ",
    }
    return (
        [{"params": params, "lr": rate} for _, _, rate, params in kept],
        [names.get(part, part) + ("" if factor == 1 else " plus") for part, factor, _, _ in kept],
    )
