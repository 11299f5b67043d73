"""Draw assets/qr-method.png: how QR-LoRA splits a weight, what ΔR trains, and how two ΔR are added.

python tools/draw_qr_method.py           write it
python tools/draw_qr_method.py --check   exit 1 if another version of this script drew the file
"""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "assets" / "qr-method.png"
STYLE_PICTURE, CONTENT_PICTURE = ROOT / "assets/sty/cat/sty_cat.png", ROOT / "assets/cnt/dog/cnt_dog.png"

FROZEN, BASE, STYLE, CONTENT, INK = "#c9d8ea", "#e6e6e6", "#f0a868", "#7fbf8e", "#2b2b2b"


def block(axes: Axes, x: float, y: float, wide: float, high: float, colour: str, label: str) -> None:
    """A matrix: a rectangle with its lower left corner at (x, y)."""
    axes.add_patch(Rectangle((x, y), wide, high, facecolor=colour, edgecolor=INK, linewidth=1.2))
    axes.text(x + wide / 2, y + high / 2, label, ha="center", va="center", fontsize=13, color=INK)


def trapezoid(axes: Axes, x: float, y: float, wide: float, high: float, colour: str, label: str) -> None:
    """An upper-trapezoidal matrix: zero under the diagonal of its leading square."""
    axes.add_patch(Rectangle((x, y), wide, high, facecolor="white", edgecolor=INK, linewidth=0.8))
    corners = [(x, y + high), (x + wide, y + high), (x + wide, y), (x + high, y)]
    axes.add_patch(Polygon(corners, facecolor=colour, edgecolor=INK, linewidth=1.2))
    axes.text(x + high + (wide - high) * 0.44, y + high / 2, label, ha="center", va="center", fontsize=12)
    axes.text(x + high * 0.28, y + high * 0.3, "0", ha="center", va="center", fontsize=10, color="#777777")


def text(axes: Axes, x: float, y: float, words: str, size: float = 11, **details: object) -> None:
    """Words at (x, y), centred unless `details` differ."""
    options = {"ha": "center", "va": "center", "color": INK, **details}
    axes.text(x, y, words, fontsize=size, **options)  # pyright: ignore[reportArgumentType]


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow between two points."""
    style = {"arrowstyle": "-|>", "mutation_scale": 16, "linewidth": 1.4, "color": INK}
    axes.add_patch(FancyArrowPatch(start, end, **style))


def thumbnail(axes: Axes, x: float, y: float, side: float, file: Path) -> None:
    """A picture of the repository, `side` wide and high."""
    with Image.open(file) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    axes.imshow(pixels, extent=(x, x + side, y, y + side), aspect="auto", interpolation="nearest", zorder=2)


def split(axes: Axes) -> None:
    """Step 1: W = W_res + Q·R."""
    text(axes, 0.2, 9.45, "1  Split the weight W of a layer, once", 14, ha="left", weight="bold")
    block(axes, 0.4, 6.35, 2.4, 2.4, BASE, "W")
    text(axes, 3.2, 7.55, "=", 20)
    block(axes, 3.6, 6.35, 2.4, 2.4, BASE, "W_res")
    text(axes, 6.4, 7.55, "+", 20)
    block(axes, 6.8, 6.35, 0.7, 2.4, FROZEN, "Q")
    text(axes, 7.85, 7.55, "·", 24)
    trapezoid(axes, 8.2, 7.1, 2.4, 0.9, FROZEN, "R")
    text(axes, 1.6, 6.08, "O outputs × I inputs", 9.5)
    text(axes, 4.8, 6.08, "the remainder", 9.5)
    text(axes, 7.15, 6.08, "O × r, orthonormal", 9.5)
    text(axes, 9.4, 6.82, "r × I, upper trapezoidal", 9.5)
    note = "Q · R is the strongest part of W:\nr directions (in FLUX 64 of 3072).\nW, Q and R stay frozen."
    text(axes, 11.1, 7.55, note, 11, ha="left", linespacing=1.5)


def train(axes: Axes) -> None:
    """Step 2: each adapter trains its own ΔR on the shared Q."""
    text(axes, 0.2, 5.3, "2  Train one ΔR for each picture", 14, ha="left", weight="bold")
    rows = (
        (3.95, STYLE, "ΔR style", "“a cat in <s> style”", STYLE_PICTURE),
        (2.6, CONTENT, "ΔR content", "“a photo of a <c> dog”", CONTENT_PICTURE),
    )
    for y, colour, label, caption, file in rows:
        thumbnail(axes, 0.4, y - 0.08, 1.06, file)
        text(axes, 1.65, y + 0.45, caption, 10.5, ha="left", style="italic")
        arrow(axes, (4.2, y + 0.45), (4.85, y + 0.45))
        trapezoid(axes, 5.0, y, 2.4, 0.9, colour, label)
    text(axes, 6.2, 2.3, "from zero: step 0 is the base model", 9.5)
    text(axes, 7.75, 4.2, "the layer computes", 11, ha="left")
    text(axes, 7.75, 3.7, "y = W x + s · Q · ΔR x", 13, ha="left")
    text(axes, 7.75, 3.25, "s = alpha / r", 10, ha="left")
    note = (
        "Every adapter of this base and\nrank has the same Q. It trains half\nof the numbers of a LoRA.\n"
        "(QR-LoRA trains Q and R instead.)"
    )
    text(axes, 11.1, 3.72, note, 11, ha="left", linespacing=1.5)


def add(axes: Axes) -> None:
    """Step 3: the sum of two ΔR, with one strength each."""
    text(axes, 0.2, 1.6, "3  Add them, with one strength for each", 14, ha="left", weight="bold")
    block(axes, 0.4, 0.1, 1.15, 1.15, BASE, "W")
    text(axes, 2.05, 0.68, "+  s ·", 14)
    block(axes, 2.6, 0.1, 0.4, 1.15, FROZEN, "Q")
    text(axes, 3.6, 0.68, "·  (  α ·", 14)
    trapezoid(axes, 4.2, 0.3, 2.2, 0.76, STYLE, "ΔR style")
    text(axes, 6.9, 0.68, "+  β ·", 14)
    trapezoid(axes, 7.4, 0.3, 2.2, 0.76, CONTENT, "ΔR content")
    text(axes, 9.85, 0.68, ")", 16)
    note = "α = β = 0 is the base model.\nThe sum has the rank of one adapter."
    text(axes, 11.1, 0.68, note, 11, ha="left", linespacing=1.5)


def figure() -> Figure:
    """The whole picture."""
    picture = Figure(figsize=(12.4, 8.0), dpi=110, facecolor="white")
    FigureCanvasAgg(picture)
    axes = picture.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.axis("off")
    for y in (5.72, 1.98):
        axes.plot((0.2, 15.0), (y, y), color="#bbbbbb", linewidth=1)
    for draw in (split, train, add):
        draw(axes)
    axes.set(xlim=(0, 15.2), ylim=(-0.7, 9.9))  # after imshow, which changes the limits
    legend = (
        (BASE, "frozen: the base model"),
        (FROZEN, "frozen: computed from W"),
        (STYLE, "trained on the style"),
        (CONTENT, "trained on the content"),
    )
    for number, (colour, words) in enumerate(legend):
        x = 0.4 + 3.4 * number
        axes.add_patch(Rectangle((x, -0.6), 0.3, 0.3, facecolor=colour, edgecolor=INK, linewidth=0.8))
        text(axes, x + 0.45, -0.45, words, 10, ha="left")
    return picture


def source_hash() -> str:
    """The sha256 of this script and the pictures in the figure; the PNG's text field `Source` has it."""
    return hashlib.sha256(
        b"".join(file.read_bytes() for file in (Path(__file__), STYLE_PICTURE, CONTENT_PICTURE))
    ).hexdigest()


def png() -> bytes:
    """The picture as a PNG file without version or date, so that equal libraries give equal bytes."""
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        stream = io.BytesIO()
        figure().savefig(stream, format="png", metadata={"Software": None, "Source": source_hash()})
    return stream.getvalue()


def drawn_from(file: Path) -> str | None:
    """The text field `Source` of a PNG file."""
    with Image.open(file) as picture:
        return picture.info.get("Source")


def main() -> int:
    """Write the picture, or with --check compare it."""
    if "--check" in sys.argv[1:]:
        current = PICTURE.is_file() and drawn_from(PICTURE) == source_hash()
        print(f"{PICTURE} is {'current' if current else 'not current; run python tools/draw_qr_method.py'}")
        return 0 if current else 1
    PICTURE.write_bytes(png())
    print(PICTURE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
