"""Training pictures: scenes of the glyph world, and arbitrary pictures for the autoencoder.

Rendering runs in several processes; picture i of a set depends only on the seed and on i.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from PIL import Image, ImageDraw

from tools.glyph_world import draw
from tools.glyph_world.draw import CANVAS
from tools.glyph_world.world import CONTENTS, HELD_CONTENTS, SEEN_STYLES, SIZE, Scene, seen_scenes


def pictures(make: Callable[[int, int], np.ndarray], count: int, seed: int, workers: int = 2) -> np.ndarray:
    """Return `make(seed, i)` for all i < count, as (count, 64, 64, 3) uint8."""
    out = np.empty((count, SIZE, SIZE, 3), np.uint8)
    with ProcessPoolExecutor(workers) as pool:
        job = functools.partial(make, seed)
        for i, picture in enumerate(pool.map(job, range(count), chunksize=64)):
            out[i] = picture
    return out


def scene_at(scenes: Sequence[Scene], seed: int, i: int) -> np.ndarray:
    """Render scene number i of `scenes`, repeated; each repetition differs in its random details."""
    return draw.render(scenes[i % len(scenes)], np.random.default_rng((seed, i)))


def anything(seed: int, i: int) -> np.ndarray:
    """Render a training scene, or random glyphs on a random texture with random effects, (64, 64, 3) uint8.

    Held-out contents and styles never occur. Other glyphs, outlined polygons and recoloured edges do, so that
    the autoencoder also works for pictures that the models are not trained on.
    """
    rng = np.random.default_rng((seed, i))
    if rng.random() < 0.4:
        scenes = seen_scenes()
        return draw.render(scenes[rng.integers(len(scenes))], rng)
    picture = _texture(rng)
    for _ in range(rng.integers(1, 4)):
        picture = _paste(picture, rng)
    if rng.random() < 0.4:
        picture = draw.STYLE[SEEN_STYLES[rng.integers(len(SEEN_STYLES))]](picture, rng)
    if rng.random() < 0.5:
        picture = _recolour(picture, rng)
    if rng.random() < 0.3:
        ink = draw.edges(picture, rng.uniform(0.8, 1.6))[..., None] ** rng.uniform(0.6, 1.4)
        if rng.random() < 0.5:
            picture = np.broadcast_to(rng.random(3), picture.shape)
        picture = picture * (1 - ink) + ink * rng.random(3)
    return draw.reduce(picture)


@functools.cache
def glyphs() -> tuple[str, ...]:
    """Return all single-character glyphs of the font, except the held-out contents."""
    held_out = {CONTENTS[name] for name in HELD_CONTENTS}
    characters = []
    for code in (*range(0x2600, 0x27C0), *range(0x1F300, 0x1F6FD), *range(0x1F900, 0x1FAF7)):
        character = chr(code)
        if character not in held_out:
            try:
                draw.glyph(character)
            except ValueError:
                continue
            characters.append(character)
    return tuple(characters)


def _paste(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    names = glyphs()
    shape = draw.glyph(names[rng.integers(len(names))]).rotate(
        rng.uniform(-25, 25), Image.Resampling.BICUBIC, expand=True
    )
    scale = rng.uniform(40, 120) / max(shape.size)
    shape = shape.resize(
        (max(1, round(shape.width * scale)), max(1, round(shape.height * scale))), Image.Resampling.LANCZOS
    )
    canvas = draw.to_image(picture)
    corner = (int(rng.integers(-30, CANVAS - 40)), int(rng.integers(-30, CANVAS - 40)))
    canvas.paste(shape, corner, shape)
    return draw.to_array(canvas)


def _recolour(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    picture = picture[..., rng.permutation(3)]
    if rng.random() < 0.3:
        picture = 1 - picture
    picture = np.clip(picture, 0, 1) ** rng.uniform(0.6, 1.6)
    grey = (picture @ draw.GREY)[..., None]
    return np.clip(grey + (picture - grey) * rng.uniform(0.2, 1.8), 0, 1)


def _texture(rng: np.random.Generator) -> np.ndarray:
    kind = rng.integers(6)
    first, second = rng.random((2, 3)).astype(np.float32)
    y, x = np.mgrid[:CANVAS, :CANVAS].astype(np.float32)
    if kind == 0:
        return np.broadcast_to(first, (CANVAS, CANVAS, 3)).copy()
    if kind == 1:
        names = (*draw.PLAIN, *draw.SCENES)
        return draw.backdrop(names[rng.integers(len(names))], rng)
    if kind == 2:  # a gradient
        along = (np.cos(a := rng.uniform(0, 6)) * x + np.sin(a) * y) / CANVAS
        along = (along - along.min()) / np.ptp(along)
        return first + (second - first) * along[..., None]
    if kind == 3:  # outlined polygons
        number, border = draw.cells(rng, int(rng.integers(10, 30)), rng.uniform(0, 0.5))
        colours = rng.random((number.max() + 1, 3)) * rng.uniform(0.2, 1) + rng.random(3) * 0.4
        ink = np.clip(rng.uniform(0, 3) - border, 0, 1)[..., None]
        return np.clip(colours, 0, 1)[number] * (1 - ink) + ink * (
            second if rng.random() < 0.5 else second * 0.15
        )
    if kind == 4:  # stripes or a grid
        period, angle = rng.uniform(5, 24), rng.uniform(0, np.pi)
        wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * 2 * np.pi / period)
        if rng.random() < 0.5:
            wave = np.maximum(wave, np.sin((np.cos(angle) * y - np.sin(angle) * x) * 2 * np.pi / period))
        mix = np.clip((wave - rng.uniform(-0.3, 0.9)) * 4 + 0.5, 0, 1)[..., None]
        return first + (second - first) * mix
    canvas = draw.to_image(np.broadcast_to(first, (CANVAS, CANVAS, 3)))
    pen = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(6, 40)):  # lines and discs
        a, b, c, d = (int(v) for v in rng.integers(0, CANVAS, 4))
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        if rng.random() < 0.5:
            pen.line((a, b, c, d), fill=colour, width=int(rng.integers(1, 6)))
        else:
            r = int(rng.integers(2, 16))
            pen.ellipse((a - r, b - r, a + r, b + r), fill=colour)
    return draw.to_array(canvas)
