"""Contents, styles and general pictures: those of the glyph world, or folders of photographs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lowrank.errors import Refused
from tools.glyph_world.world import HELD_CONTENTS, HELD_STYLES, SEEN_CONTENTS, SEEN_STYLES, Scene, caption
from tools.glyph_world.world import seen_scenes as scenes_of_the_base

CLASSES = {"poodle": "dog", "fox": "cat", "robot": "car", "teapot": "crown"}  # words of the base's captions
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Pictures(NamedTuple):
    """Pictures (N, H, W, 3) uint8 of one size, and their captions."""

    pixels: np.ndarray
    captions: list[str]


class Task(NamedTuple):
    """What is trained, and held-out pictures of the same concept."""

    train: Pictures
    test: Pictures


def _negative(x: np.ndarray) -> np.ndarray:
    return 255 - x


def _blocks(x: np.ndarray) -> np.ndarray:
    return x[::4, ::4].repeat(4, 0).repeat(4, 1)


def _posterised(x: np.ndarray) -> np.ndarray:
    return (x // 96 * 96 + 32).astype(np.uint8)


def _lines(x: np.ndarray) -> np.ndarray:
    return np.where((np.arange(len(x)) % 8 < 3)[:, None, None], x // 2, x).astype(np.uint8)


_PERMUTATIONS = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
_EFFECTS: tuple[Callable[[np.ndarray], np.ndarray], ...] = (_negative, _blocks, _posterised, _lines)
# 20 styles that the base never saw: one of four effects on exchanged colour channels
INVENTED: tuple[Callable[[np.ndarray], np.ndarray], ...] = tuple(
    (lambda x, effect=effect, order=order: effect(x[..., list(order)]))
    for order in _PERMUTATIONS
    for effect in _EFFECTS
)


class GlyphWorld:
    """The world of the shipped models: held-out contents and styles, and invented styles."""

    size = 64
    contents, styles = HELD_CONTENTS, HELD_STYLES
    words = tuple(f"in {style} style" for style in SEEN_STYLES if style != "photo")
    invented = len(INVENTED)

    def content(self, name: str, seed: int) -> Task:
        """One photo of a new content on a meadow; tests are photos on other backgrounds."""
        train = [Scene(name, "photo", "meadow")]
        test = [Scene(name, "photo", b) for b in ("white", "beach", "night", "snow", "sunset", "red")] * 3
        word = f"<c> {CLASSES[name]}"
        renamed = (name, word)
        return Task(self._drawn(train, seed, renamed), self._drawn(test, seed + 1, renamed))

    def style(self, name: str, seed: int, count: int = 4) -> Task:
        """`count` pictures of known contents in a new style; tests are other contents."""
        return self._styled(seed, count, lambda content: Scene(content, name, "white"), None)

    def invented_style(self, index: int, seed: int, count: int = 4) -> Task:
        """As `style`, with one of the `invented` styles."""
        return self._styled(seed, count, lambda content: Scene(content, "photo", "white"), INVENTED[index])

    def source(self, seed: int, count: int = 24) -> Pictures:
        """General pictures that the base knows."""
        chosen = np.random.default_rng(seed).choice(len(scenes_of_the_base()), count, replace=False)
        return self._drawn([scenes_of_the_base()[i] for i in chosen], seed)

    def content_prompt(self, name: str, words: str) -> str:
        """A prompt for a trained content with some of `words`."""
        return f"a <c> {CLASSES[name]} {words}"

    def both_prompt(self, content: str) -> str:
        """A prompt for a trained content in the trained style."""
        return f"a <c> {CLASSES[content]} in <s> style"

    def _styled(
        self,
        seed: int,
        count: int,
        scene: Callable[[str], Scene],
        effect: Callable[[np.ndarray], np.ndarray] | None,
    ) -> Task:
        names = np.random.default_rng(seed).permutation(SEEN_CONTENTS)
        sets = []
        for part, chosen in enumerate((names[:count], names[count : count + 12].repeat(2))):
            scenes = [scene(str(name)) for name in chosen]
            drawn = self._drawn(scenes, 2 * seed + part)
            pixels = drawn.pixels if effect is None else np.stack([effect(x) for x in drawn.pixels])
            sets.append(Pictures(pixels, [f"a {s.content} in <s> style" for s in scenes]))
        return Task(*sets)

    def _drawn(self, scenes: Sequence[Scene], seed: int, rename: tuple[str, str] = ("", "")) -> Pictures:
        from tools.glyph_world.draw import render  # needs the font

        rng = np.random.default_rng(seed)
        captions = [caption(s).replace(*rename) if rename[0] else caption(s) for s in scenes]
        return Pictures(np.stack([render(s, rng) for s in scenes]), captions)


class FolderWorld:
    """Folders of photographs: `subjects` and `styles` each have one folder for each name."""

    words = ("in the snow", "on a beach", "at night", "on a wooden table", "as a pencil drawing", "in a city")

    def __init__(self, subjects: Path, styles: Path, size: int) -> None:
        self.size, self._general = size, None
        self._folders = {kind: _named_folders(path) for kind, path in (("c", subjects), ("s", styles))}
        self.contents, self.styles = tuple(self._folders["c"]), tuple(self._folders["s"])
        self.invented = len(self.styles)

    def content(self, name: str, seed: int) -> Task:
        """The first half of a subject's pictures; tests are the others, or the same where there is one."""
        return self._halves(self._folders["c"][name], f"a photo of a <c> {name}")

    def style(self, name: str, seed: int, count: int = 4) -> Task:
        """As `content`, for a style."""
        return self._halves(self._folders["s"][name], "a picture in <s> style")

    def invented_style(self, index: int, seed: int, count: int = 4) -> Task:
        """The styles in their order: nothing is invented for photographs."""
        return self.style(self.styles[index], seed, count)

    def source(self, seed: int, count: int = 24) -> Pictures:
        """Pictures of all subjects and styles but none of the trained words: what a base should keep."""
        names = [*self._folders["c"].items(), *self._folders["s"].items()]
        files = [(file, name) for name, files in names for file in files]
        chosen = np.random.default_rng(seed).choice(len(files), min(count, len(files)), replace=False)
        captions = [f"a picture of {files[i][1]}" for i in chosen]
        return Pictures(np.stack([self._read(files[i][0]) for i in chosen]), captions)

    def content_prompt(self, name: str, words: str) -> str:
        """A prompt for a trained content with some of `words`."""
        return f"a photo of a <c> {name} {words}"

    def both_prompt(self, content: str) -> str:
        """A prompt for a trained content in the trained style."""
        return f"a <c> {content} in <s> style"

    def pictures(self, kind: str, name: str) -> np.ndarray:
        """All pictures of a subject ("c") or a style ("s")."""
        return np.stack([self._read(file) for file in self._folders[kind][name]])

    def _halves(self, files: list[Path], words: str) -> Task:
        half = max(1, len(files) // 2)
        sets = (files[:half], files[half:] or files)
        return Task(*(Pictures(np.stack([self._read(f) for f in s]), [words] * len(s)) for s in sets))

    def _read(self, file: Path) -> np.ndarray:
        with Image.open(file) as picture:
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            square = picture.convert("RGB").crop((left, top, left + side, top + side))
            return np.asarray(square.resize((self.size, self.size), Image.Resampling.LANCZOS))


World: Any = GlyphWorld | FolderWorld


def _named_folders(path: Path) -> dict[str, list[Path]]:
    """The pictures by folder name. Raises `Refused` for fewer than two folders with pictures."""
    folders = sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
    named = {f.name: sorted(p for p in f.iterdir() if p.suffix.lower() in SUFFIXES) for f in folders}
    named = {name: files for name, files in named.items() if files}
    if len(named) < 2:
        raise Refused(
            f"{path} has {len(named)} folders with pictures, and a nearest reference needs two or more; put "
            "the pictures of each subject or style into a folder of its own"
        )
    return named
