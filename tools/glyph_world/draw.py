"""Rendering: a glyph on a background in a style, drawn at 128 pixels and reduced to 64.

Needs the font Noto Color Emoji (Debian package fonts-noto-color-emoji). All randomness comes from the
generator that is passed in, so a seed gives the same picture on every machine.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from tools.glyph_world.world import CONTENTS, SIZE, Scene

FONT = Path(os.environ.get("GLYPH_WORLD_FONT", "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"))
CANVAS = 2 * SIZE
GREY = np.array([0.299, 0.587, 0.114], np.float32)
PLAIN = {
    "white": (0.96, 0.96, 0.95),
    "red": (0.80, 0.22, 0.20),
    "blue": (0.24, 0.42, 0.80),
    "green": (0.30, 0.62, 0.34),
    "yellow": (0.95, 0.82, 0.30),
    "gray": (0.55, 0.56, 0.58),
}


@functools.cache
def glyph(character: str) -> Image.Image:
    """Return the glyph (RGBA), cropped to its visible part. Raises ValueError if the font lacks it."""
    font = ImageFont.truetype(str(FONT), 109)  # the only size in the font
    image = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(image).text((8, 8), character, font=font, embedded_color=True)
    box = image.getbbox()
    if box is None:
        raise ValueError(f"{FONT} has no glyph for {character!r}")
    return image.crop(box)


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Render a scene as (64, 64, 3) uint8, with random position, size and texture."""
    return reduce(
        STYLE[scene.style](place(CONTENTS[scene.content], backdrop(scene.background, rng), rng), rng)
    )


def place(character: str, picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw the glyph in the middle of `picture` (128, 128, 3), 102 to 106 pixels large.

    Contents nearly keep their place and size: small models draw the average of what varies, and an average of
    places is a blur.
    """
    shape = glyph(character)
    scale = rng.uniform(102, 106) / max(shape.size)
    shape = shape.resize((round(shape.width * scale), round(shape.height * scale)), Image.Resampling.LANCZOS)
    shift = rng.integers(-1, 2, size=2)
    corner = ((CANVAS - shape.width) // 2 + int(shift[0]), (CANVAS - shape.height) // 2 + int(shift[1]))
    canvas = to_image(picture)
    canvas.paste(shape, corner, shape)
    return to_array(canvas)


def reduce(picture: np.ndarray) -> np.ndarray:
    """Reduce (128, 128, 3) floats to (64, 64, 3) uint8."""
    return np.asarray(to_image(picture).resize((SIZE, SIZE), Image.Resampling.BOX))


def to_image(picture: np.ndarray) -> Image.Image:
    """Convert floats in [0, 1] to a PIL image."""
    return Image.fromarray((np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8))


def to_array(image: Image.Image) -> np.ndarray:
    """Convert a PIL image to floats in [0, 1]."""
    return np.asarray(image, np.float32) / 255


def blur(picture: np.ndarray, radius: float) -> np.ndarray:
    """Blur a picture with a Gaussian."""
    return to_array(to_image(picture).filter(ImageFilter.GaussianBlur(radius)))


# ---------- backgrounds


def backdrop(name: str, rng: np.random.Generator) -> np.ndarray:
    """Draw a background, (128, 128, 3) floats in [0, 1]."""
    if name in PLAIN:
        return np.broadcast_to(_tint(PLAIN[name], rng), (CANVAS, CANVAS, 3)).copy()
    return SCENES[name](rng)


def _tint(colour, rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.asarray(colour, np.float32) + rng.uniform(-0.03, 0.03, 3).astype(np.float32), 0, 1)


def _vertical(rng: np.random.Generator, *stops) -> np.ndarray:
    """Draw a vertical gradient through `stops`, (height in 0..1, colour) from top to bottom."""
    at = np.linspace(0, 1, CANVAS)
    heights = [height for height, _ in stops]
    colours = np.stack([_tint(colour, rng) for _, colour in stops])
    column = np.stack([np.interp(at, heights, colours[:, channel]) for channel in range(3)], -1)
    return np.repeat(column[:, None], CANVAS, 1).astype(np.float32)


def _beach(rng: np.random.Generator) -> np.ndarray:
    sea, sand = rng.uniform(0.38, 0.44), rng.uniform(0.60, 0.66)
    sky, water, ground = (0.62, 0.85, 0.97), (0.12, 0.50, 0.74), (0.93, 0.83, 0.58)
    stops = ((0, sky), (sea, sky), (sea + 0.01, water), (sand, water), (sand + 0.01, ground), (1, ground))
    return _vertical(rng, *stops)


def _meadow(rng: np.random.Generator) -> np.ndarray:
    picture = _vertical(rng, (0, (0.45, 0.72, 0.95)), (1, (0.80, 0.92, 0.98)))
    x = np.arange(CANVAS)
    hill = CANVAS * (0.62 + 0.06 * np.sin(x / CANVAS * 5 + rng.uniform(0, 6)))
    picture[np.arange(CANVAS)[:, None] > hill[None]] = _tint((0.42, 0.70, 0.28), rng)
    return picture


def _night(rng: np.random.Generator) -> np.ndarray:
    image = to_image(_vertical(rng, (0, (0.04, 0.05, 0.20)), (1, (0.14, 0.13, 0.38))))
    pen = ImageDraw.Draw(image)
    for x, y in rng.integers(0, CANVAS, size=(26, 2)).tolist():
        pen.ellipse((x, y, x + 2, y + 2), fill=(245, 240, 205))
    x, y = int(rng.integers(92, 106)), int(rng.integers(6, 14))
    pen.ellipse((x, y, x + 18, y + 18), fill=(250, 240, 190))
    return to_array(image)


def _snow(rng: np.random.Generator) -> np.ndarray:
    ground = rng.uniform(0.64, 0.70)
    stops = (
        (0, (0.62, 0.72, 0.82)),
        (ground, (0.74, 0.82, 0.89)),
        (ground + 0.02, (0.97, 0.98, 1.0)),
        (1, (0.9, 0.94, 1.0)),
    )
    image = to_image(_vertical(rng, *stops))
    pen = ImageDraw.Draw(image)
    for x, y in rng.integers(0, CANVAS, size=(36, 2)).tolist():
        pen.ellipse((x, y, x + 3, y + 3), fill=(255, 255, 255))
    return to_array(image)


def _sunset(rng: np.random.Generator) -> np.ndarray:
    stops = (
        (0, (0.36, 0.20, 0.48)),
        (0.35, (0.88, 0.38, 0.38)),
        (0.66, (0.99, 0.74, 0.36)),
        (0.67, (0.25, 0.14, 0.24)),
        (1, (0.16, 0.10, 0.18)),
    )
    return _vertical(rng, *stops)


SCENES = {"beach": _beach, "meadow": _meadow, "night": _night, "snow": _snow, "sunset": _sunset}


# ---------- styles, each (128, 128, 3) → (128, 128, 3)


def _luminance(picture: np.ndarray) -> np.ndarray:
    return picture @ GREY


def edges(picture: np.ndarray, radius: float = 1.2) -> np.ndarray:
    """Return the edge strength (128, 128), in 0..1: the largest gradient of the three channels."""
    smooth = blur(picture, radius)
    dy, dx = np.gradient(smooth, axis=(0, 1))
    return np.clip(np.hypot(dx, dy).max(-1) * 9, 0, 1)


def _photo(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return picture


def _pencil(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    grey = _luminance(picture)
    tone = 0.97 - 0.20 * (1 - grey)
    y, x = np.mgrid[:CANVAS, :CANVAS]
    hatch = (np.sin((x + y) * 0.9) > 0.2) & (grey < 0.45)
    tone = tone - 0.16 * hatch - 0.75 * edges(picture)
    return np.repeat(np.clip(tone, 0.08, 1)[..., None], 3, -1).astype(np.float32)


def _mosaic(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    tile = 8
    n = CANVAS // tile
    colours = picture.reshape(n, tile, n, tile, 3).mean((1, 3))
    colours = colours * rng.uniform(0.9, 1.08, (n, n, 1))
    out = colours.repeat(tile, 0).repeat(tile, 1).astype(np.float32)
    joint = (np.arange(CANVAS) % tile) < 2
    out[joint] = out[:, joint] = (0.86, 0.84, 0.80)
    return out


def _halftone(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    cell = 8
    n = CANVAS // cell
    colours = picture.reshape(n, cell, n, cell, 3).mean((1, 3))
    radius = cell * (0.20 + 0.42 * np.sqrt(np.clip(1 - colours @ GREY, 0, 1)))
    offset = np.arange(CANVAS) % cell - (cell - 1) / 2
    distance = np.hypot(offset[:, None], offset[None])
    inside = np.clip(radius.repeat(cell, 0).repeat(cell, 1) - distance + 0.5, 0, 1)[..., None]
    vivid = np.clip(colours * 0.85, 0, 1).repeat(cell, 0).repeat(cell, 1)
    return (inside * vivid + (1 - inside) * 0.98).astype(np.float32)


def _sepia(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    grey = 0.12 + 0.78 * _luminance(picture)
    axis = np.linspace(-1, 1, CANVAS)
    grey = grey * (1 - 0.28 * np.clip(axis[:, None] ** 2 + axis[None] ** 2 - 0.5, 0, 1))
    tone = np.stack([grey * 1.10 + 0.05, grey * 0.86 + 0.03, grey * 0.60], -1)
    return np.clip(tone, 0, 1).astype(np.float32)


def _neon(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    strength = edges(picture)[..., None]
    hue = picture / (picture.max(-1, keepdims=True) + 1e-3)
    hue = np.clip((hue - 0.45) * 1.8, 0.12, 1)
    line = np.clip(strength * 1.5, 0, 1) * (0.35 * hue + 0.65 * np.array([0.25, 0.95, 1.0]))
    return np.clip(0.10 * picture * hue + line + 0.7 * blur(line, 3), 0, 1).astype(np.float32)


def _woodcut(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    grey = np.clip(_luminance(blur(picture, 1)) - 0.8 * edges(picture), 0, 1)
    y = np.mgrid[:CANVAS, :CANVAS][0]
    wave = 0.45 + 0.34 * np.sin(y * (2 * np.pi / 10))
    ink = np.clip((wave - grey) * 7 + 0.5, 0, 1)[..., None]
    return (ink * np.array([0.10, 0.08, 0.10]) + (1 - ink) * np.array([0.96, 0.93, 0.86])).astype(np.float32)


_HEAT = np.array(
    [
        [0.02, 0.01, 0.18],
        [0.30, 0.05, 0.55],
        [0.75, 0.15, 0.45],
        [0.96, 0.45, 0.18],
        [0.99, 0.80, 0.25],
        [1, 1, 0.85],
    ]
)


def _thermal(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    grey = np.clip(_luminance(blur(picture, 1.2)), 0, 1)
    at = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(grey, at, _HEAT[:, channel]) for channel in range(3)], -1).astype(np.float32)


def cells(rng: np.random.Generator, pitch: int, jitter: float = 0.45) -> tuple[np.ndarray, np.ndarray]:
    """Return the Voronoi cells of a jittered grid: each pixel's cell number and distance to the border."""
    n = CANVAS // pitch + 2
    rows, columns = np.mgrid[:n, :n]
    points = np.stack([rows, columns], -1).reshape(-1, 2) - 0.5
    points = (points + rng.uniform(-jitter, jitter, points.shape)) * pitch
    y, x = np.mgrid[:CANVAS, :CANVAS]
    distance = np.hypot(y[..., None] - points[:, 0], x[..., None] - points[:, 1])
    nearest = np.argpartition(distance, 1, axis=-1)[..., :2]
    first, second = (np.take_along_axis(distance, nearest[..., i : i + 1], -1)[..., 0] for i in (0, 1))
    return nearest[..., 0], (second - first) / 2


def _stained_glass(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    number, border = cells(rng, 32)
    count = np.bincount(number.ravel(), minlength=number.max() + 1)[:, None]
    sums = np.stack([np.bincount(number.ravel(), picture[..., c].ravel(), len(count)) for c in range(3)], -1)
    pane = 0.25 * (sums / np.maximum(count, 1))[number] + 0.75 * blur(picture, 1)
    grey = (pane @ GREY)[..., None]
    pane = np.clip(grey + (pane - grey) * 1.6, 0, 1) * rng.uniform(0.88, 1.12, len(count))[number][..., None]
    outline = 0.8 * np.clip(edges(picture) - 0.4, 0, 1)
    lead = np.clip(np.maximum(2.2 - border, outline), 0, 1)[..., None]
    return (np.clip(pane, 0, 1) * (1 - lead) + 0.13 * lead).astype(np.float32)


def _blueprint(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    line = edges(picture) ** 0.8
    at = np.arange(CANVAS) % 16 < 2
    grid = np.maximum(at[:, None], at[None]) * 0.2
    ink = np.clip(np.maximum(line, grid) + 0.10 * _luminance(picture), 0, 1)[..., None]
    return (ink * np.array([0.93, 0.97, 1.0]) + (1 - ink) * np.array([0.07, 0.22, 0.55])).astype(np.float32)


STYLE = {
    "photo": _photo,
    "pencil": _pencil,
    "mosaic": _mosaic,
    "halftone": _halftone,
    "sepia": _sepia,
    "neon": _neon,
    "woodcut": _woodcut,
    "thermal": _thermal,
    "stained glass": _stained_glass,
    "blueprint": _blueprint,
}
