"""Weights in captions, in the syntax that stable-diffusion-webui made common: `(word)` counts 1.1 times,
`[word]` 1/1.1, `(word:1.3)` 1.3 times; brackets nest, and `\\(` is a bracket.
"""

from __future__ import annotations

import itertools
import re

STEP = 1.1  # factor of one pair of brackets
DEEPEST = 64  # nested brackets of one kind that count: 1.1^64 is 445, and time grows with depth × length
_NUMBER = r"[+-]?(?:\d{1,9}(?:\.\d{0,99})?|\.\d{1,99})"
_PIECE = re.compile(rf"\\[()\[\]\\]|\\|[(\[]|:\s*({_NUMBER})\s*\)|[)\]]|[^\\()\[\]:]+|:")


def weighted(caption: str) -> list[tuple[str, float]]:
    """The caption as texts with their weights; neighbours of one weight are one text."""
    parts: list[list] = []  # [text, weight]
    # by kind of bracket the number of parts before each that is open
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        for part in parts[start:] if len(opened[bracket]) < DEEPEST else ():
            part[1] *= factor

    for match in _PIECE.finditer(caption):
        piece, number = match[0], match[1]
        if piece in opened:
            opened[piece].append(len(parts))
        elif number is not None and opened["("]:
            close("(", float(number))
        elif piece == ")" and opened["("]:
            close("(", STEP)
        elif piece == "]" and opened["["]:
            close("[", 1 / STEP)
        else:
            parts.append([piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece, 1.0])
    for bracket, factor in (("(", STEP), ("[", 1 / STEP)):  # never closed: to the end
        while opened[bracket]:
            close(bracket, factor)
    groups = itertools.groupby(parts, lambda part: part[1])
    return [("".join(text for text, _ in group), weight) for weight, group in groups] or [("", 1.0)]
