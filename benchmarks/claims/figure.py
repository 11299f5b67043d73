"""A figure for each claim: the mean of each arm over seeds with its 95 % interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.claims.record import Claim

COLUMNS = 3  # most metrics side by side


def draw_figure(claim: Claim, outcome: dict[str, Any], path: Path) -> None:
    """Write one panel for each metric of the statements, at most `COLUMNS`; equal results, equal bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    keys = list(dict.fromkeys(statement.metric.key for statement in claim.statements))[:COLUMNS]
    arms = list(outcome["arms"])
    with matplotlib.rc_context({"svg.hashsalt": claim.name, "font.size": 8}):
        figure = Figure(figsize=(3 + 2.6 * len(keys), 0.9 + 0.26 * len(arms)), layout="constrained")
        axes = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
        for axis, key in zip(axes, keys, strict=True):
            for row, arm in enumerate(arms):
                value = outcome["arms"][arm].get(key)
                if value is not None:
                    axis.errorbar(value["mean"], row, xerr=value["half"] or 0, fmt="o", color="C0", capsize=3)
            axis.set_xlabel(key)
            axis.grid(axis="x", alpha=0.3)
        axes[0].set_yticks(range(len(arms)), arms)
        axes[0].invert_yaxis()
        figure.suptitle(claim.title)
        figure.savefig(path, metadata={"Date": None})
