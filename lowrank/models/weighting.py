"""Weights in captions, in the syntax that stable-diffusion-webui made common: `(word)` counts 1.1 times,
`[word]` 1/1.1, `(word:1.3)` 1.3 times; brackets nest, and `\\(` is a bracket.
"""

from __future__ import annotations

import re

STEP = 1.1  # factor of one pair of brackets
_PIECE = re.compile(r"\\[()\[\]\\]|\\|[(\[]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[)\]]|[^\\()\[\]:]+|:")


def weighted(caption: str) -> list[tuple[str, float]]:
    """The caption as texts with their weights; neighbours of one weight are one text."""
    parts: list[list] = []  # [text, weight]
    # by kind of bracket the number of parts before each that is open
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        for part in parts[opened[bracket].pop() :]:
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
    merged: list[tuple[str, float]] = []
    for text, weight in parts:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged or [("", 1.0)]
