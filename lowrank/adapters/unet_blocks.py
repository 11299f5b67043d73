"""Blocks of a U-Net: the block of a layer, and options with one value per block (names and numbers of kohya).

| plan | embedding | down | middle | up | out | blocks |
|---|---|---|---|---|---|---|
| SD   |   | 0–11 | 12 | 13–24 | | 25 |
| SDXL | 0 | 1–9 | 10–12 | 13–21 | 22 | 23 |

Functions of layer names in kohya's keys, numbers and texts.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeVar

from lowrank.errors import Refused, nearest

logger = logging.getLogger(__name__)
Number = TypeVar("Number", int, float)


class Plan(NamedTuple):
    """The numbers of blocks of a U-Net; `ends`: blocks before the first and after the last adapted one."""

    down: int
    mid: int
    up: int
    ends: int

    @property
    def count(self) -> int:
        """The number of all blocks."""
        return self.down + self.mid + self.up + 2 * self.ends


SD, SDXL = Plan(12, 1, 12, 0), Plan(9, 3, 9, 1)
_SD = re.compile(r"^lora_unet_(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_")
_SDXL = re.compile(r"^lora_unet_(input_blocks|middle_block|output_blocks)_(\d+)_")
_FIRST = {"down": 1, "up": 13, "input_blocks": 1, "middle_block": 10, "output_blocks": 13}


def index(name: str) -> int | None:
    """Return the block of a layer from its key (`lora_unet_mid_block_…` is 12), or None outside of blocks.

    The first down block of SD is 1, because 0 is the convolution before it.
    """
    if match := _SD.match(name):
        side, i, kind, j = match[1], int(match[2]), match[3], int(match[4])
        return _FIRST[side] + 3 * i + (2 if kind.endswith("samplers") else j)
    if match := _SDXL.match(name):
        return _FIRST[match[1]] + int(match[2])
    return SD.down if name.startswith("lora_unet_mid_block_") else None


def plan(names: Iterable[str]) -> Plan | None:
    """Return the plan of the U-Net whose layers have these keys, or None if no key is in a block."""
    inside = [name for name in names if index(name) is not None]
    return (SDXL if _SDXL.match(inside[0]) else SD) if inside else None


def values(option: str, text: str, count: int, kind: Callable[[str], Number]) -> list[Number]:
    """Parse `4,4,8` as `count` numbers ≥ 0. Raises `Refused` for another count or a wrong number."""
    try:
        numbers = [kind(part) for part in text.strip("[] ").split(",")]
    except ValueError as error:
        raise Refused(
            f"{option}={text} is not a list of numbers; give {count}, separated by commas, one per block"
        ) from error
    if len(numbers) != count or not all(0 <= value < math.inf for value in numbers):
        raise Refused(
            f"{option} has {len(numbers)} numbers, but the model has {count} blocks; give {count}, all >= 0"
        )
    return numbers


CURVES: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda x: math.sin(math.pi / 2 * (1 - x)),
    "sine": lambda x: math.sin(math.pi / 2 * x),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}


def curve(option: str, text: str, count: int) -> list[float]:
    """Parse `sine+0.25` as `count` learning rate weights: the curve over the blocks, plus the number."""
    name, _, base = text.partition("+")
    try:
        offset = float(base or 0)
    except ValueError as error:
        raise Refused(f"{option}={text} does not end in a number; write {name}+0.25") from error
    if name not in CURVES:
        raise Refused(
            f"{option}={text} is neither {count} numbers separated by commas nor one of "
            f"{', '.join(CURVES)}{nearest(name, CURVES)}"
        )
    return [CURVES[name](i / (count - 1)) + offset for i in range(count)]


def lr_weights(
    plan: Plan, down: str | None, mid: str | None, up: str | None, threshold: float
) -> list[float] | None:
    """Return the learning rate weight of each block, or None if no list is given.

    Without a list the weights of a side are 1. Weights of `threshold` or less become 0. As in kohya, a list
    that is too short is filled with 1, an empty entry is 0, and surplus numbers are ignored, with a warning.
    """
    if down is None and mid is None and up is None:
        return None
    lists = (("down", down, plan.down), ("mid", mid, plan.mid), ("up", up, plan.up))
    weights = [weight for side, text, count in lists for weight in _weights(side, text, count, threshold)]
    return [1.0] * plan.ends + weights + [1.0] * plan.ends


def _weights(side: str, text: str | None, count: int, threshold: float) -> list[float]:
    option = f"{side}_lr_weight"
    if text is None:
        return [1.0] * count
    if side != "mid" and "," not in text:
        weights = curve(option, text, count)
    else:
        try:
            weights = [float(part or 0) for part in text.strip("[] ").split(",")]
        except ValueError as error:
            raise Refused(
                f"{option}={text} is not a list of numbers; give {count} numbers separated by commas"
            ) from error
    if len(weights) != count:
        logger.warning(
            "%s has %d numbers for %d blocks: missing numbers are 1, surplus numbers are ignored",
            *(option, len(weights), count),
        )
    weights = (weights + [1.0] * count)[:count]
    return [weight if weight > threshold else 0.0 for weight in weights]
