"""Means over seeds with 95 % intervals, paired differences, and verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

# Student's t, two-sided 95 %, for 1 to 10 degrees of freedom; beyond that the normal distribution's
_T = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
LEAST = 5  # seeds below which no verdict is given


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, half width of the 95 % interval (t distribution over seeds), and number of values."""
    n, mean = len(values), fmean(values)
    if n < 2:
        return {"mean": mean, "half": None, "n": n}
    t = _T[n - 2] if n - 2 < len(_T) else 1.96
    return {"mean": mean, "half": t * stdev(values) / math.sqrt(n), "n": n}


def verdict(difference: dict[str, Any], more_is_better: bool) -> str:
    """Return what an interval of paired differences, arm minus rival, says about "the arm is better"."""
    if difference["n"] < LEAST or difference["half"] is None:
        return "not measured with enough seeds"
    low, high = difference["mean"] - difference["half"], difference["mean"] + difference["half"]
    if low <= 0 <= high:
        return "no difference measured"
    return "supported here" if (low > 0) == more_is_better else "contradicted here"
