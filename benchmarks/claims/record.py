"""What a claim is: arms that are trained, numbers that are measured, and the statement that they test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Cell: TypeAlias = dict[str, Any]  # what one training of one arm measured: numbers, and lists of numbers


@dataclass(frozen=True)
class Arm:
    """One way to train. `prepare(network)` changes start values; `options` are for the claim's `measure`."""

    name: str
    module: str = "lora"
    rank: int = 4
    arguments: Mapping[str, str] = field(default_factory=dict)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    prepare: Callable[[Any], None] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A number of a cell by its key, and whether more of it is better."""

    key: str
    more_is_better: bool = False


@dataclass(frozen=True)
class Statement:
    """A sentence under test: `arm` is better than `against` in `metric`."""

    text: str
    arm: str
    against: str
    metric: Metric


@dataclass(frozen=True)
class Claim:
    """An experiment. `measure(bench, arm, rate, seed)` trains one arm once.

    `tune` chooses each arm's rate with seeds that are not measured. `settle(cells)` adds numbers that need
    the cells of all arms with one seed; `cells` is by arm. `every_rate` measures all rates instead of tuning.
    """

    name: str
    title: str
    paper: str
    arms: tuple[Arm, ...]
    tune: Metric
    statements: tuple[Statement, ...]
    measure: Callable[[Any, Arm, float, int], Cell]
    settle: Callable[[dict[str, Cell]], None] | None = None
    every_rate: bool = False
