"""Aspect-ratio buckets, as kohya sd-scripts forms them: pure functions on (w, h) pairs.

The rules and the numbers they must give are those of sd-scripts `main` (48d368fa); for one image, resolution
and step, the bucket and the resized size are the same.
"""

from __future__ import annotations

import functools
import math
import random
from typing import NamedTuple

from lowrank.errors import Refused

Size = tuple[int, int]  # (w, h)


class Placement(NamedTuple):
    """Where an image goes: scaled to `resized`, which covers `bucket`, then cropped to it; both (w, h)."""

    bucket: Size
    resized: Size


@functools.lru_cache(maxsize=64)
def bucket_sizes(resolution: Size, smallest: int, largest: int, step: int) -> tuple[Size, ...]:
    """All buckets, sorted: the square of that area, and for each width the tallest side that keeps the area.

    `smallest` is floored and `largest` ceiled to the step. No bucket's area exceeds w·h of the resolution.
    """
    area = resolution[0] * resolution[1]
    smallest, largest = max(smallest // step, 1) * step, -(-largest // step) * step
    square = math.isqrt(area) // step * step
    sizes = {(square, square)}
    for width in range(smallest, largest + 1, step):
        height = min(largest, area // width // step * step)
        if height >= smallest:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def choose(size: Size, sizes: tuple[Size, ...]) -> Size:
    """The bucket of exactly that size, otherwise the one of nearest aspect w/h (the first of equals)."""
    aspect = size[0] / size[1]
    return size if size in sizes else min(sizes, key=lambda bucket: abs(bucket[0] / bucket[1] - aspect))


def cover(size: Size, bucket: Size) -> Size:
    """The size scaled, aspect kept, until it just covers the bucket."""
    wider = size[0] / size[1] > bucket[0] / bucket[1]
    scale = bucket[1] / size[1] if wider else bucket[0] / size[0]
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def own_place(size: Size, area: int, step: int) -> Placement:
    """The place without enlarging: the image's own size, or scaled down to `area`, floored to the step.

    Raises `Refused` when a side is then shorter than one step.
    """
    resized = size if size[0] * size[1] <= area else _shrunk(size, area, step)
    bucket = _floor(resized[0], step), _floor(resized[1], step)
    if not min(bucket):
        raise Refused(
            f"size {size[0]}x{size[1]} leaves a side below bucket_reso_steps {step}, and bucket_no_upscale "
            "forbids enlarging; remove the image, lower the step or switch bucket_no_upscale off"
        )
    return Placement(bucket, resized)


def _shrunk(size: Size, area: int, step: int) -> Size:
    aspect = size[0] / size[1]
    width = math.sqrt(area * aspect)
    by_width, by_height = _floor(width, step), _floor(area / width, step)
    if not (by_width and by_height):
        return int(width + 0.5), int(area / width + 0.5)
    error_of_width = _error(by_width, _floor(by_width / aspect, step), aspect)
    error_of_height = _error(_floor(by_height * aspect, step), by_height, aspect)
    if error_of_width < error_of_height:
        return by_width, int(by_width / aspect + 0.5)
    return int(by_height * aspect + 0.5), by_height


def _floor(side: float, step: int) -> int:
    return int(side + 0.5) // step * step


def _error(width: int, height: int, aspect: float) -> float:
    return abs(width / height - aspect) if height else math.inf


def crop_box(where: Placement, draw: random.Random | None = None) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the bucket in the resized image: its centre, or anywhere with `draw`."""
    gaps = where.resized[0] - where.bucket[0], where.resized[1] - where.bucket[1]
    left, top = (draw.randint(0, gap) if draw else gap // 2 for gap in gaps)
    return left, top, left + where.bucket[0], top + where.bucket[1]
