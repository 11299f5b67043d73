"""A labelled sheet of pictures: style strengths down, content strengths across."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

LONGEST = 10_000  # characters of a title that are looked at: no sheet is wider
GAP, INK, PAPER = 6, "#222222", "#ffffff"


def sheet(cells: Mapping[tuple[float, float], Image.Image], title: str) -> Image.Image:
    """One picture of all cells; keys are (style strength, content strength), in the order given."""
    rows = list(dict.fromkeys(a for a, _ in cells))
    columns = list(dict.fromkeys(b for _, b in cells))
    width = max(128, max(image.width for image in cells.values()))
    height = max(128, max(image.height for image in cells.values()))
    size = max(13, width // 22)
    font = ImageFont.load_default(size)
    left, top = int(size * 6.5), int(size * 4.2)
    page = Image.new("RGB", (left + len(columns) * (width + GAP), top + len(rows) * (height + GAP)), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((size // 2, size // 3), _shortened(title, font, page.width - size), fill=INK, font=font)
    for j, b in enumerate(columns):
        draw.text(
            (left + j * (width + GAP) + width // 2, top - size // 2),
            f"content {b:g}",
            fill=INK,
            font=font,
            anchor="ms",
        )
    for i, a in enumerate(rows):
        draw.text(
            (left - size // 2, top + i * (height + GAP) + height // 2),
            f"style {a:g}",
            fill=INK,
            font=font,
            anchor="rm",
        )
        for j, b in enumerate(columns):
            if (a, b) in cells:
                image = cells[a, b]
                if image.size != (width, height):
                    image = image.resize((width, height), Image.Resampling.NEAREST)
                page.paste(image, (left + j * (width + GAP), top + i * (height + GAP)))
    return page


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> str:
    """As much of a text as `room` pixels hold, on one line."""
    text = " ".join(text[:LONGEST].split())
    if font.getlength(text) <= room:
        return text
    fits = bisect_right(range(1, len(text)), room, key=lambda n: font.getlength(text[:n] + "…"))
    return text[:fits] + "…"
