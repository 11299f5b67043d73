"""Charts as SVG by matplotlib, in colours that the page sets for light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice

import matplotlib
from matplotlib.figure import Figure

# Marker colours in the SVG, replaced by CSS variables; the values of the page are of the palette of Okabe and
# Ito, which people who confuse red and green can tell apart.
SERIES = tuple(f"#0000{i:02x}" for i in range(1, 9))
INK, FAINT = "#010101", "#020202"
POINTS = 500  # of a curve in the page: a curve of 20,000 steps is thinned to its extremes

Curve = tuple[Sequence[float], Sequence[float]]  # x, y


def thinned(x: Sequence[float], y: Sequence[float], most: int = POINTS) -> Curve:
    """The curve with at most `most` points: the least and the largest of each of most/2 parts."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if not math.isnan(b)]
    if len(pairs) > most:
        size, kept = 2 * len(pairs) / most, []
        for part in range(most // 2):
            piece = pairs[int(part * size) : int((part + 1) * size)]
            ends = (min(piece, key=lambda p: p[1]), max(piece, key=lambda p: p[1]))
            kept += sorted({*ends})
        pairs = kept
    return [a for a, _ in pairs], [b for _, b in pairs]


def line_chart(
    title: str,
    curves: Mapping[str, Curve],
    *,
    behind: Mapping[str, Curve] = {},
    marks: Mapping[str, Curve] = {},
    log: bool = False,
    y_label: str = "",
) -> str:
    """Curves over steps as SVG; those `behind` are drawn pale, `marks` as points with a line."""
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 11, "svg.hashsalt": "lowrank"}):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.subplots()
        for (x, y), colour in zip(behind.values(), _colours(0), strict=False):
            axes.plot(*thinned(x, y), color=colour, linewidth=0.8, alpha=0.25)
        for (name, (x, y)), colour in zip(curves.items(), _colours(0), strict=False):
            axes.plot(*thinned(x, y), color=colour, linewidth=1.6, label=_label(name))
        for (name, (x, y)), colour in zip(marks.items(), _colours(len(curves)), strict=False):
            axes.plot(
                *thinned(x, y), color=colour, linewidth=1.6, marker="o", markersize=4, label=_label(name)
            )
        if log:
            axes.set_yscale("log")
        _finish(axes, title, y_label, len(curves) + len(marks) > 1)
        return _svg(figure, title)


def bar_chart(title: str, values: Mapping[str, float], y_label: str) -> str:
    """A bar for each name as SVG, in order."""
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 11, "svg.hashsalt": "lowrank"}):
        figure = Figure(figsize=(7.2, 0.9 + 0.26 * max(4, len(values))), layout="constrained")
        axes = figure.subplots()
        axes.barh(list(values), list(values.values()), color=SERIES[0], height=0.7)
        axes.invert_yaxis()
        _finish(axes, title, "", False)
        axes.set_xlabel(y_label, color=INK)
        return _svg(figure, title)


def _colours(first: int) -> Iterator[str]:
    """The colours of the series from the one numbered `first`, again and again."""
    return islice(cycle(SERIES), first, None)


def _label(name: str) -> str:
    """A name as matplotlib shows it: not hidden for its first letter, not read as a formula."""
    plain = name.replace("$", r"\$")
    return f"\u2009{plain}" if plain.startswith("_") else plain


def _finish(axes, title: str, y_label: str, legend: bool) -> None:
    axes.set_title(title, loc="left", color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(color=FAINT, alpha=0.3, linewidth=0.6)
    axes.tick_params(colors=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    if legend:
        axes.legend(frameon=False, labelcolor=INK, fontsize=10)


def _svg(figure: Figure, title: str) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Title": title})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for colour, name in ((INK, "ink"), (FAINT, "faint"), *((c, f"c{i}") for i, c in enumerate(SERIES, 1))):
        text = text.replace(colour, f"var(--{name})")
    return text.replace("font-family", "data-family").replace("<svg", '<svg role="img"', 1)
