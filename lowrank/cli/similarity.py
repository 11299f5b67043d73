"""visualize_similarity.py: compare two adapter files layer by layer; write plots, JSON and a text summary."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lowrank.combine.compare import (
    UPDATES,
    LayerSimilarity,
    Names,
    common,
    comparable,
    compare,
    judge,
    statistics,
)
from lowrank.config.tools import VISUALIZE_SIMILARITY
from lowrank.files import atomic, writable_folder
from lowrank.formats.delta import missing_from
from lowrank.formats.read import Adapter, read_adapter

_INK, _MEAN, _UNDEFINED = "#1f5fa8", "#c0392b", "#777777"
_BAND: Mapping[str, Any] = MappingProxyType({"color": "#e8a33d", "alpha": 0.35, "linewidth": 0})
_CJK = ("Noto Sans CJK JP", "IPAexGothic", "Hiragino Sans", "Yu Gothic", "Noto Sans CJK SC", "SimHei")
_FIXED = (-1.05, 1.05)  # the range of a cosine; the official −0.1…1.1 would cut off negative values
_REMARKS = {
    ("shared", "ideal"): "practically identical, as expected of adapters with one basis",
    ("shared", "warn"): "similar but not shared: train both from one base model, rank and basis",
    ("shared", "problem"): "not shared: base models, ranks or bases differ; compare deltaW instead of deltaR",
    (
        "apart",
        "ideal",
    ): "low similarity (|mean| < 0.10), as of independent random matrices; see the caution below",
    ("apart", "warn"): "moderate similarity (|mean| 0.10 to 0.50): some interference when merged",
    (
        "apart",
        "problem",
    ): "high similarity (mean > 0.50): poorly separated, a merge adds the same change twice",
    ("apart", "opposed"): "opposed (mean < -0.50): poorly separated, a merge cancels the common part",
}
_CAUTION = (
    "Caution: independent random matrices lie within the null band (a wider one if they share large\n"
    "columns), so almost any two adapters pass |mean| < 0.10; an A near 1 may only mean a common start.\n"
    "Orthogonality is neither necessary nor sufficient for a good merge: look at the merged images too."
)

Found = Mapping[str, list[LayerSimilarity]]  # matrix -> its layers


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two adapters; return 0. Raises `Refused` before any file is written."""
    options = VISUALIZE_SIMILARITY.parse(argv).options
    names = (options.lora1_name, options.lora2_name)
    folder = writable_folder(options.output_dir)
    first, second = (read_adapter(path, strict=False) for path in (options.lora1_path, options.lora2_path))
    layers = compare(comparable(first), comparable(second), names)
    about = [*_files(first, second, names), *_notes((first, second), names)]
    text = statistics_text(layers, names) + "\n" + "\n".join(about) + "\n"
    written = write_comparison(folder, layers, names, text)
    _print(f"{text}\nWritten to {folder}:\n" + "".join(f"  {path.name}\n" for path in written))
    _print(f"{first.usage}\n{second.usage}\n")
    return 0


def write_comparison(folder: Path, comparison: Found, names: Names, text: str) -> list[Path]:
    """Write all files of one comparison, each complete or not at all; other files in `folder` stay."""
    written = []

    def put(name: str, content: str | Figure) -> None:
        with atomic(folder / name) as part:
            if isinstance(content, str):
                part.write_text(content, encoding="utf-8")
            else:
                content.savefig(part, format="png", dpi=150)
        written.append(folder / name)

    for matrix, layers in comparison.items():
        with matplotlib.rc_context(
            {
                "font.family": _fonts(),
                "font.size": 11,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "savefig.facecolor": "white",
            }
        ):
            put(f"{matrix}_similarity_fixed_scale_line.png", line_plot(matrix, layers, names, fixed=True))
            put(f"{matrix}_similarity_auto_scale_line.png", line_plot(matrix, layers, names, fixed=False))
            put(f"{matrix}_similarity_distribution.png", distribution_plot(matrix, layers, names))
        put(f"{matrix}_similarity_details.json", _json([_details(layer) for layer in layers]))
    numbers = {matrix: statistics(layers) for matrix, layers in comparison.items()}
    verdicts = {
        matrix: {"verdict": judge(matrix, of["mean"], of["outside_null_band"])}
        for matrix, of in numbers.items()
    }
    put("all_statistics.json", _json({matrix: of | verdicts[matrix] for matrix, of in numbers.items()}))
    put("summary_statistics.txt", text)
    return written


# ---------- text


def statistics_text(comparison: Found, names: Names) -> str:
    """summary_statistics.txt up to what the files are, in the layout of the QR-LoRA demo guide."""
    parts = ["=== QR-LoRA Similarity Analysis Summary ===\n"]
    for matrix, layers in comparison.items():
        parts.append("\n".join([f"{matrix} Matrix Similarity:", *_block(matrix, layers, names)]) + "\n")
    return "\n".join([*parts, _CAUTION]) + "\n"


def _block(matrix: str, layers: list[LayerSimilarity], names: Names) -> list[str]:
    of = statistics(layers)
    measures = ("Mean", "Median", "Std", "Min", "Max")
    lines = [f"  {measure + ':':<8}{_decimal(of[measure.lower()])}" for measure in measures]
    lines.append(f"  → {_remark(matrix, of['mean'], of['outside_null_band'])}")

    def add(label: str, text: str) -> None:
        lines.append(f"  {label + ':':<14}{text}")

    if of["undefined"]:
        why = Counter((layer.reason or "").split(":")[0] for layer in layers if layer.similarity is None)
        reasons = ", ".join(f"{count} × {reason}" for reason, count in why.items())
        add("Undefined", f"{of['undefined']} of {of['layers']} layers ({reasons}), only counted in the norms")
    if of["by_principal_angles"]:
        add(
            "Measure",
            f"{of['by_principal_angles']} of {of['layers']} layers have bases of differing rank; "
            "their value is the bases' overlap, no cosine",
        )
    if of["mean"] is not None:
        add("|cos|", f"mean {of['abs_mean']:.4f}, max {of['abs_max']:.4f}")
    low, high = of["null_band_min"], of["null_band_max"]
    if low is not None and high is not None:
        width = f"±{low:.4f}" if math.isclose(low, high) else f"±{low:.4f} to ±{high:.4f}"
        add(
            "Null band",
            f"{width} (independent random matrices); {of['outside_null_band']:.1%} of the layers outside",
        )
    add("Norm", f"{names[0]} {of['lora1_norm_mean']:.4g}, {names[1]} {of['lora2_norm_mean']:.4g} (mean)")
    if of["basis_overlap_mean"] is not None:
        add("Basis", f"column spaces overlap {of['basis_overlap_mean']:.4f} (mean cos² of principal angles)")
    if of["interference_mean"] is not None:
        add(
            "Interference",
            f"‖X+Y‖²/(‖X‖²+‖Y‖²) mean {of['interference_mean']:.4f}, min "
            f"{of['interference_min']:.4f}, max {of['interference_max']:.4f} "
            "(0 cancel, 1 orthogonal, 2 equal)",
        )
    if of["row_overlap_mean"] is not None:
        add(
            "Row spaces",
            f"overlap {of['row_overlap_mean']:.4f} (mean cos² of principal angles; random "
            f"{of['row_overlap_random']:.4f})",
        )
        add(
            "Energy",
            f"{of['energy_1_in_2_mean']:.1%} of {names[0]} lies in the rows of {names[1]}, "
            f"{of['energy_2_in_1_mean']:.1%} of {names[1]} in those of {names[0]}",
        )
    return lines


def _remark(matrix: str, mean: float | None, outside: float | None) -> str:
    if mean is None:
        return "undefined: no layer has a value"
    verdict = judge(matrix, mean, outside)
    if verdict is None:
        return "no threshold: trained or randomly started factors, compare deltaW"
    if matrix not in UPDATES:
        return _REMARKS["shared", verdict]
    if verdict == "warn" and judge(matrix, mean) == "ideal":
        return (
            f"low mean similarity (|mean| < 0.10), but {outside:.0%} of the layers are more alike or more "
            "opposed than independent random matrices: not separated in these layers"
        )
    return _REMARKS["apart", "opposed" if verdict == "problem" and mean < 0 else verdict]


def _files(first: Adapter, second: Adapter, names: Names) -> list[str]:
    layers = comparable(first), comparable(second)
    both = len(common(*layers))
    return [
        f"Files:  {names[0]} = {first.path}",
        f"        {names[1]} = {second.path}",
        f"Layers: {both} in both, {len(layers[0]) - both} only in {names[0]}, "
        f"{len(layers[1]) - both} only in {names[1]}",
    ]


def _notes(adapters: Sequence[Adapter], names: Names) -> list[str]:
    """Notes on the two files that a reader of the numbers needs."""
    notes = []
    for fact, things in (("base_hash", "base models"), ("basis_hash", "bases")):
        if len({adapter.fact(fact) for adapter in adapters} - {None}) > 1:
            notes.append(
                f"Note: the metadata of the files names different {things}; "
                "only deltaW then compares their effect on a layer."
            )
    for adapter, name in zip(adapters, names, strict=True):
        absent = [missing_from(roles, adapter.method) for roles in adapter.raw.values()]
        if "basis" in absent:
            notes.append(f"Note: {name} was saved without its basis, so there is no Q and no deltaW.")
        elif "initial copy" in absent:
            notes.append(
                f"Note: {name} was saved without its initial copy, so its deltaW, where it has one, is that "
                "of Q′R′ and not of the update."
            )
        if adapter.has_magnitude():
            notes.append(f"Note: {name} also scales output rows (DoRA); deltaW is its low-rank part alone.")
    return notes


def _decimal(value: float | None) -> str:
    return "undefined" if value is None else f"{round(value, 4) + 0.0:.4f}"  # + 0.0: no minus before 0.0000


def _details(layer: LayerSimilarity) -> dict:
    overlap = layer.row_overlap and layer.row_overlap._asdict()  # by name: asdict leaves a list
    return asdict(layer) | {"row_overlap": overlap}


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _print(text: str) -> None:
    """Print to stdout, with `?` for characters that the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end="")


# ---------- plots


def line_plot(matrix: str, layers: list[LayerSimilarity], names: Names, *, fixed: bool) -> Figure:
    """One point per layer, the mean, the null band; layers without a value are crosses at the bottom."""
    values = [math.nan if layer.similarity is None else layer.similarity for layer in layers]
    known = [value for value in values if not math.isnan(value)]
    figure = Figure(figsize=(min(18.0, max(9.0, 6 + 0.04 * len(layers))), 5.6), layout="constrained")
    axes = figure.subplots()
    marked = _mark_groups(axes, layers)
    _title(axes, f"Cosine Similarity of {matrix} matrices\n({names[0]} vs {names[1]})", 20 if marked else 8)
    bands = [layer.null_band for layer in layers if layer.null_band is not None]
    low, high = _FIXED if fixed else _limits(known, bands)
    axes.set_ylim(low, high)
    axes.set_xlim(-0.5 - 0.01 * len(layers), len(layers) - 0.5 + 0.01 * len(layers))
    if bands and low < max(bands) and high > -max(bands):
        edges = [layer.null_band or math.nan for layer in layers for _ in range(2)]
        steps = [index + side for index in range(len(layers)) for side in (-0.5, 0.5)]
        axes.fill_between(steps, [-edge for edge in edges], edges, label=_null_label(bands), **_BAND)
    small = 3.0 if len(layers) > 100 else 4.5
    axes.plot(
        range(len(layers)),
        values,
        color=_INK,
        linewidth=0.9,
        marker="o",
        markersize=small,
        label="one layer" if known else None,
    )
    if known:
        mean = sum(known) / len(known)
        axes.axhline(mean, color=_MEAN, linestyle="--", linewidth=1.4, label=f"mean {_decimal(mean)}")
    missing = [index for index, value in enumerate(values) if math.isnan(value)]
    if missing:
        bottom = axes.get_xaxis_transform()
        axes.plot(
            missing,
            [0.025] * len(missing),
            "x",
            color=_UNDEFINED,
            transform=bottom,
            label=f"undefined ({len(missing)} of {len(layers)} layers)",
        )
    axes.set_xlabel("Layer index (order of the first file)")
    cosines = all(layer.measure == "cosine" for layer in layers)
    axes.set_ylabel("Cosine similarity" if cosines else "Similarity (bases: mean cos²)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=14, integer=True))
    _finish(figure, axes)
    return figure


def distribution_plot(matrix: str, layers: list[LayerSimilarity], names: Names) -> Figure:
    """Histogram over the layers that have a value, with mean and null band."""
    values = [layer.similarity for layer in layers if layer.similarity is not None]
    bands = [layer.null_band for layer in layers if layer.null_band is not None]
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots()
    _title(axes, f"Distribution of {matrix} Similarity\n({names[0]} vs {names[1]})", 8)
    low, high = _limits(values, bands)
    axes.set_xlim(low, high)
    if bands and low < max(bands) and high > -max(bands):
        axes.axvspan(max(-max(bands), low), min(max(bands), high), label=_null_label(bands), **_BAND)
    if values:
        axes.hist(values, bins=21, range=(low, high), color=_INK, edgecolor="white", linewidth=0.6)
        mean = sum(values) / len(values)
        axes.axvline(mean, color=_MEAN, linestyle="--", linewidth=1.4, label=f"mean {_decimal(mean)}")
    missing = len(layers) - len(values)
    if missing:
        axes.plot([], [], "x", color=_UNDEFINED, label=f"undefined ({missing} of {len(layers)} layers)")
    axes.set_xlabel("Similarity")
    axes.set_ylabel("Number of layers")
    axes.set_ylim(bottom=0, top=None if values else 1)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(figure, axes)
    return figure


def _null_label(bands: Sequence[float]) -> str:
    return f"null band of independent random matrices (at most ±{max(bands):.2g})"


def _limits(values: Sequence[float], bands: Sequence[float]) -> tuple[float, float]:
    """Set an axis that shows the values, and the null band too unless it would squeeze them."""
    if not values:
        return _FIXED
    low, high = min(values), max(values)
    span = max(high - low, 0.01)
    if bands:
        widest = max(bands)
        both = min(low, -widest), max(high, widest)
        if both[1] - both[0] <= 4 * span:
            low, high = both
    margin = max(0.12 * (high - low), 0.005)
    return low - margin, high + margin


def _mark_groups(axes: Axes, layers: list[LayerSimilarity]) -> bool:
    """Mark where the kind of block changes, with labels along the top; return False if they do not fit."""
    kinds = [layer.layer_name.removeprefix("transformer.").split(".")[0] for layer in layers]
    groups = [(kind, len(list(same))) for kind, same in groupby(kinds)]
    if not 1 < len(groups) <= 4 or min(count for _, count in groups) < 0.12 * len(layers):
        return False
    start = 0
    for kind, count in groups:
        if start:
            axes.axvline(start - 0.5, color=_UNDEFINED, linewidth=0.8)
        axes.text(
            start + (count - 1) / 2,
            1.0,
            kind,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=9,
            color=_UNDEFINED,
            parse_math=False,
        )
        start += count
    return True


def _title(axes: Axes, text: str, pad: float) -> None:
    axes.set_title(text, fontsize=14, pad=pad, parse_math=False)  # a trigger word may hold a $


def _finish(figure: Figure, axes: Axes) -> None:
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.ticklabel_format(axis="y", useOffset=False)
    if axes.get_legend_handles_labels()[1]:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10)


def _fonts() -> list[str]:
    """DejaVu Sans, then installed fonts with Japanese and Chinese characters."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _CJK if name in installed)]
