"""A labelled sheet of pictures: rows and columns with names, references beside."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

LONGEST = 10_000  # characters of a title that are looked at: no sheet is wider
GAP, INK, PAPER = 6, "#222222", "#ffffff"


def sheet(
    cells: Mapping[tuple[Any, Any], Image.Image],
    title: str,
    references: Mapping[str, Image.Image] | None = None,
    row_name: Callable[[Any], str] = "style {:g}".format,
    column_name: Callable[[Any], str] = "content {:g}".format,
) -> Image.Image:
    """One picture of all cells; keys are (row, column), by default strengths, in the order given.

    `references` are the pictures that the adapters learned from, by their names; they stand left of the grid.
    """
    rows = list(dict.fromkeys(a for a, _ in cells))
    columns = list(dict.fromkeys(b for _, b in cells))
    width = max(128, max(image.width for image in cells.values()))
    height = max(128, max(image.height for image in cells.values()))
    size = max(13, width // 22)
    font = ImageFont.load_default(size)
    margin = size // 2 + width + GAP if references else 0
    left, top, below = margin + int(size * 6.5), int(size * 4.2), height + int(size * 1.8)
    page = Image.new(
        "RGB",
        (
            left + len(columns) * (width + GAP),
            top + max(len(rows) * (height + GAP), len(references or ()) * below),
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(page)
    draw.text((size // 2, size // 3), _shortened(title, font, page.width - size), fill=INK, font=font)
    for i, (name, image) in enumerate((references or {}).items()):
        page.paste(_fitted(image, width, height), (size // 2, top + i * below))
        middle = size // 2 + width // 2
        draw.text((middle, top + i * below + height + size), name, fill=INK, font=font, anchor="ms")
    for j, b in enumerate(columns):
        middle = left + j * (width + GAP) + width // 2
        draw.text(
            (middle, top - size // 2),
            _shortened(column_name(b), font, width),
            fill=INK,
            font=font,
            anchor="ms",
        )
    for i, a in enumerate(rows):
        middle = top + i * (height + GAP) + height // 2
        draw.text((left - size // 2, middle), row_name(a), fill=INK, font=font, anchor="rm")
        for j, b in enumerate(columns):
            if (a, b) in cells:
                place = (left + j * (width + GAP), top + i * (height + GAP))
                page.paste(_fitted(cells[a, b], width, height), place)
    return page


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture at a cell's size: small ones in whole pixels, larger ones smoothly, proportions kept."""
    if image.size == (width, height):
        return image
    how = Image.Resampling.NEAREST if image.width < width else Image.Resampling.LANCZOS
    return ImageOps.pad(image.convert("RGB"), (width, height), how, PAPER)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> str:
    """As much of a text as `room` pixels hold, on one line."""
    text = " ".join(text[:LONGEST].split())
    if font.getlength(text) <= room:
        return text
    fits = bisect_right(range(1, len(text)), room, key=lambda n: font.getlength(text[:n] + "…"))
    return text[:fits] + "…"
