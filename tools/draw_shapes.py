"""Curves, colours and noise for the pictures of draw_assets.py.

Coordinates are those of the 512 x 512 picture; everything is drawn SCALE times larger and reduced at the end,
which is what smooths the edges.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from PIL import Image

SIZE = 512
SCALE = 4

Point = tuple[float, float]
Colour = tuple[int, int, int]


def smooth(points: Sequence[Point], closed: bool = True, samples: int = 14) -> list[Point]:
    """Catmull-Rom curve through `points`."""
    count = len(points)
    at = (lambda i: points[i % count]) if closed else (lambda i: points[min(max(i, 0), count - 1)])
    curve = []
    for i in range(count if closed else count - 1):
        a, b, c, d = at(i - 1), at(i), at(i + 1), at(i + 2)
        for step in range(samples):
            t = step / samples
            curve.append(
                tuple(
                    0.5
                    * (
                        2 * q
                        + (r - p) * t
                        + (2 * p - 5 * q + 4 * r - s) * t**2
                        + (3 * q - p - 3 * r + s) * t**3
                    )
                    for p, q, r, s in zip(a, b, c, d, strict=True)
                )
            )
    return curve if closed else [*curve, points[-1]]


def mirror(points: Sequence[Point]) -> list[Point]:
    """The same points on the other side of the vertical middle line."""
    return [(SIZE - x, y) for x, y in points]


def ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0) -> list[Point]:
    """Ellipse about (x, y), turned clockwise by `turn` degrees."""
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    circle = [(math.cos(k * math.pi / 36), math.sin(k * math.pi / 36)) for k in range(72)]
    return [(x + rx * u * c - ry * v * s, y + rx * u * s + ry * v * c) for u, v in circle]


def sector(x: float, y: float, inner: float, outer: float, start: float, stop: float) -> list[Point]:
    """Piece of a ring between two radii and two angles (degrees, clockwise from the right)."""
    angles = [math.radians(start + (stop - start) * k / 12) for k in range(13)]
    far = [(x + outer * math.cos(a), y + outer * math.sin(a)) for a in angles]
    return far + [(x + inner * math.cos(a), y + inner * math.sin(a)) for a in reversed(angles)]


def band(spine: Sequence[Point], widths: Sequence[float]) -> list[Point]:
    """Outline of a ribbon of half-width `widths` (spread evenly along it) around the curve `spine`."""
    left, right = [], []
    for k, (x, y) in enumerate(spine):
        (x0, y0), (x1, y1) = spine[max(k - 1, 0)], spine[min(k + 1, len(spine) - 1)]
        length = math.hypot(x1 - x0, y1 - y0) or 1.0
        nx, ny = -(y1 - y0) / length, (x1 - x0) / length
        place = k / (len(spine) - 1) * (len(widths) - 1)
        i = min(int(place), len(widths) - 2)
        w = widths[i] + (widths[i + 1] - widths[i]) * (place - i)
        left.append((x + nx * w, y + ny * w))
        right.append((x - nx * w, y - ny * w))
    return left + right[::-1]


def tone(colour: Colour, factor: float) -> Colour:
    red, green, blue = (max(0, min(255, round(c * factor))) for c in colour)
    return red, green, blue


def cloudy(rng: random.Random, cells: int, low: int, high: int, stretch: int = 1) -> Image.Image:
    """Soft grey noise over the whole canvas, `cells` blobs across and cells/stretch down."""
    down = max(2, cells // stretch)
    grid = Image.frombytes("L", (cells, down), bytes(rng.randint(low, high) for _ in range(cells * down)))
    return grid.resize((SIZE * SCALE, SIZE * SCALE), Image.Resampling.BICUBIC)


def reduced(picture: Image.Image) -> Image.Image:
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
