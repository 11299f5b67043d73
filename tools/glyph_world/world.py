"""The scenes of the glyph world: contents × styles × backgrounds, and their captions.

Contents are glyphs of Noto Color Emoji (SIL Open Font License 1.1). Four contents and two styles are held out
of pretraining, for adapters to learn. Ten pairs of a seen content and a seen style are held out too, to test
whether a model composes them. This file needs no font; `draw.py` does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

SIZE = 64  # pixels per side
CONTENTS = {
    "dog": "\U0001f415",
    "cat": "\U0001f408",
    "horse": "\U0001f40e",
    "rabbit": "\U0001f407",
    "elephant": "\U0001f418",
    "bird": "\U0001f426",
    "fish": "\U0001f41f",
    "turtle": "\U0001f422",
    "butterfly": "\U0001f98b",
    "apple": "\U0001f34e",
    "mushroom": "\U0001f344",
    "flower": "\U0001f33b",
    "tree": "\U0001f333",
    "cactus": "\U0001f335",
    "house": "\U0001f3e0",
    "car": "\U0001f697",
    "boat": "\u26f5",
    "guitar": "\U0001f3b8",
    "crown": "\U0001f451",
    "ball": "\u26bd",
    "poodle": "\U0001f429",
    "fox": "\U0001f98a",
    "robot": "\U0001f916",
    "teapot": "\U0001fad6",
}
STYLES = (
    *("photo", "pencil", "mosaic", "halftone", "sepia", "neon", "woodcut", "thermal"),
    *("stained glass", "blueprint"),
)
BACKGROUNDS = {
    "white": "on a white background",
    "red": "on a red background",
    "blue": "on a blue background",
    "green": "on a green background",
    "yellow": "on a yellow background",
    "gray": "on a gray background",
    "beach": "on a beach",
    "meadow": "on a meadow",
    "night": "under a night sky",
    "snow": "in the snow",
    "sunset": "at sunset",
}
HELD_CONTENTS = ("poodle", "fox", "robot", "teapot")
HELD_STYLES = ("stained glass", "blueprint")
SEEN_CONTENTS = tuple(name for name in CONTENTS if name not in HELD_CONTENTS)
SEEN_STYLES = tuple(name for name in STYLES if name not in HELD_STYLES)
# each seen style except photo lacks one or two contents
HELD_PAIRS = frozenset(
    {
        *(("dog", "pencil"), ("car", "mosaic"), ("apple", "halftone"), ("fish", "sepia")),
        *(("house", "neon"), ("bird", "woodcut"), ("tree", "thermal"), ("guitar", "mosaic")),
        *(("rabbit", "neon"), ("crown", "pencil")),
    }
)


@dataclass(frozen=True)
class Scene:
    """The content, style and background of a picture."""

    content: str
    style: str
    background: str


def caption(scene: Scene, *, trigger: str = "", style: str | None = None, background: bool = True) -> str:
    """Return a caption: "a dog in mosaic style on a beach", "a photo of a dog on a beach".

    `trigger` is put before the content; `style` replaces the style's name; `background=False` omits the
    background.
    """
    noun = f"{trigger} {scene.content}".strip()
    noun = ("an " if noun[0] in "aeiou" and not trigger else "a ") + noun
    style = style or scene.style
    text = f"a photo of {noun}" if style == "photo" else f"{noun} in {style} style"
    return f"{text} {BACKGROUNDS[scene.background]}" if background else text


@functools.cache
def seen_scenes() -> tuple[Scene, ...]:
    """Return all scenes of pretraining, in a fixed order."""
    return tuple(
        Scene(content, style, background)
        for content in SEEN_CONTENTS
        for style in SEEN_STYLES
        if (content, style) not in HELD_PAIRS
        for background in BACKGROUNDS
    )


def held_pair_scenes() -> list[Scene]:
    """Return the scenes whose content and style are in pretraining, but not together."""
    return [Scene(c, s, background) for c, s in sorted(HELD_PAIRS) for background in BACKGROUNDS]


def training_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption for pretraining: sometimes empty, without background, or with nonsense words.

    A nonsense word before the content trains the model to ignore unknown triggers; one in place of the style
    stands for any style.
    """
    if rng.random() < 0.1:
        return ""
    trigger = nonsense(rng) if rng.random() < 0.2 else ""
    style = nonsense(rng) if scene.style != "photo" and rng.random() < 0.06 else None
    return caption(scene, trigger=trigger, style=style, background=rng.random() > 0.15)


def nonsense(rng: np.random.Generator) -> str:
    """Return one to five random letters, sometimes in angle brackets, that are not in `WORDS`."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    while True:
        word = "".join(letters[i] for i in rng.integers(26, size=rng.integers(1, 6)))
        if word not in WORDS:
            return f"<{word}>" if rng.random() < 0.3 else word


WORDS = tuple(
    sorted(
        {
            *CONTENTS,
            *(word for style in STYLES for word in style.split()),
            *(word for phrase in BACKGROUNDS.values() for word in phrase.split()),
            *("a", "an", "photo", "of", "in", "style", "picture", "with", "and", "the"),
        }
    )
)
