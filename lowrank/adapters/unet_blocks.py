"""Blocks of a U-Net: which one a layer is in, and lists with one value for each (owner: kohya sd-scripts).

| plan | embedding | down | middle | up | out | blocks |
|---|---|---|---|---|---|---|
| SD   |   | 0–11 | 12 | 13–24 | | 25 |
| SDXL | 0 | 1–9 | 10–12 | 13–21 | 22 | 23 |

Functions of names in kohya's keys, numbers and texts; nothing here knows a module.
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
    """How many blocks a U-Net has; `ends` are those before and after, which hold no adapter."""

    down: int
    mid: int
    up: int
    ends: int

    @property
    def count(self) -> int:
        return self.down + self.mid + self.up + 2 * self.ends


SD, SDXL = Plan(12, 1, 12, 0), Plan(9, 3, 9, 1)
_SD = re.compile(r"^lora_unet_(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_")
_SDXL = re.compile(r"^lora_unet_(input_blocks|middle_block|output_blocks)_(\d+)_")
_FIRST = {"down": 1, "up": 13, "input_blocks": 1, "middle_block": 10, "output_blocks": 13}


def index(name: str) -> int | None:
    """The block of a layer by its key (`lora_unet_mid_block_…` is 12), or None for one in no block.

    SD's first downward block is 1, because 0 is the convolution before it.
    """
    if found := _SD.match(name):
        side, i, kind, j = found[1], int(found[2]), found[3], int(found[4])
        return _FIRST[side] + 3 * i + (2 if kind.endswith("samplers") else j)
    if found := _SDXL.match(name):
        return _FIRST[found[1]] + int(found[2])
    return SD.down if name.startswith("lora_unet_mid_block_") else None


def plan(names: Iterable[str]) -> Plan | None:
    """The plan of the U-Net whose layers have these keys, or None where they lie in no block."""
    inside = [name for name in names if index(name) is not None]
    return (SDXL if _SDXL.match(inside[0]) else SD) if inside else None


def values(option: str, text: str, count: int, kind: Callable[[str], Number]) -> list[Number]:
    """`4,4,8` as `count` numbers ≥ 0. Raises `Refused` for another count and for what is no such number."""
    try:
        found = [kind(part) for part in text.strip("[] ").split(",")]
    except ValueError as error:
        raise Refused(
            f"{option}={text} is not a list of numbers; give {count}, with commas between, one per block"
        ) from error
    if len(found) != count or not all(0 <= value < math.inf for value in found):
        raise Refused(
            f"{option} has {len(found)} numbers, and the model {count} blocks; give {count}, none below 0"
        )
    return found


CURVES: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda x: math.sin(math.pi / 2 * (1 - x)),
    "sine": lambda x: math.sin(math.pi / 2 * x),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}


def curve(option: str, text: str, count: int) -> list[float]:
    """`sine+0.25` as `count` weights of a learning rate: the curve over the blocks, plus the number."""
    name, _, base = text.partition("+")
    try:
        offset = float(base or 0)
    except ValueError as error:
        raise Refused(f"{option}={text} does not end in a number; write {name}+0.25") from error
    if name not in CURVES:
        raise Refused(
            f"{option}={text} is neither {count} numbers with commas between nor one of "
            f"{', '.join(CURVES)}{nearest(name, CURVES)}"
        )
    return [CURVES[name](i / (count - 1)) + offset for i in range(count)]


def lr_weights(
    plan: Plan, down: str | None, mid: str | None, up: str | None, threshold: float
) -> list[float] | None:
    """What the learning rate of each block is multiplied by, or None when no list is given.

    A list that is not given is 1 everywhere; weights of `threshold` or less are 0. As kohya does, a missing
    number of a list that is too short is 1, an empty one 0, and numbers too many are left out; it is said.
    """
    if down is None and mid is None and up is None:
        return None
    lists = (("down", down, plan.down), ("mid", mid, plan.mid), ("up", up, plan.up))
    found = [weight for side, text, count in lists for weight in _weights(side, text, count, threshold)]
    return [1.0] * plan.ends + found + [1.0] * plan.ends


def _weights(side: str, text: str | None, count: int, threshold: float) -> list[float]:
    option = f"{side}_lr_weight"
    if text is None:
        return [1.0] * count
    if side != "mid" and "," not in text:
        given = curve(option, text, count)
    else:
        try:
            given = [float(part or 0) for part in text.strip("[] ").split(",")]
        except ValueError as error:
            raise Refused(
                f"{option}={text} is not a list of numbers; give {count}, with commas between"
            ) from error
    if len(given) != count:
        logger.warning(
            "%s has %d numbers for %d blocks: missing ones are 1, others are left out",
            option,
            len(given),
            count,
        )
    given = (given + [1.0] * count)[:count]
    return [weight if weight > threshold else 0.0 for weight in given]
