"""A method is a record of seven slots; `a | b` fills the empty ones.

    y = g ⊙ ( W x + s·U·C(t,x)·D x − s·U₀·C₀(t)·D₀ x ) + b

factor: who are D, C, U, which are frozen, is the initial copy (index 0) subtracted · gate: which ranks are
open at t · experts: does U depend on x · magnitude: is g free · penalty: what pulls during training · rates:
which role learns how fast · warm-up: what happens before step 0. A slot left None is neutral.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lowrank.errors import Refused

# values by layer and role, facts for the file's metadata
Start = tuple[dict[str, dict[str, Tensor]], dict[str, str]]


@dataclass(frozen=True)
class Factor:
    """Who are U, C and D; the names on the right are roles, which are also the names in files.

    `start(weights, ranks, scales)` gives the values at step 0: `weights` maps a layer's name to its dense
    weight (O, I·kh·kw) and is read lazily, `ranks` and `scales` map it to R and s. A role in `record` is
    written to files but takes no part in the forward.
    """

    start: Callable[[Mapping[str, Tensor], Mapping[str, int], Mapping[str, float]], Start]
    trained: tuple[str, ...]
    up: str = "up"
    down: str = "down"
    up_0: str | None = None  # with down_0: the initial copy, subtracted
    down_0: str | None = None
    core: str | None = None  # R×R, or R when `diagonal`; None is the identity
    core_0: str | None = None
    diagonal: bool = False
    record: tuple[str, ...] = ()
    # role -> projection in forward
    constrain: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    @property
    def copies(self) -> tuple[str | None, ...]:
        """The roles of the initial copy."""
        return (self.up_0, self.down_0, self.core_0)

    @property
    def frozen(self) -> frozenset[str]:
        """The roles of the forward that are not trained."""
        roles = (self.up, self.down, self.core, *self.copies)
        return frozenset(role for role in roles if role) - set(self.trained)


@dataclass(frozen=True)
class Gate:
    """`open(timestep (B,), rank) -> (B,)`: how many leading ranks are open."""

    open: Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Experts:
    """`count` ups (role up has shape E×O×R); `route(x or h (…, K), router (E, K)) -> (…, E)`."""

    count: int
    route: Callable[[Tensor, Tensor], Tensor]
    on: str = "h"  # what the router reads: "h" (the R-wide projection) or "x"


@dataclass(frozen=True)
class Magnitude:
    """g = m/‖W+ΔW‖ per output row, m trained; `detach`: no gradient through the norm (the paper's §4.3)."""

    detach: bool = True


@dataclass(frozen=True)
class Penalty:
    """A term added to the loss and logged by name: `value(network) -> scalar`."""

    name: str
    value: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Warmup:
    """A stage before step 0 that needs data: `run(network, denoise, batches)`."""

    name: str
    run: Callable[..., None]


# Slots that cannot be filled together, and why: printed at start, rendered into the documentation.
CONFLICTS: Mapping[tuple[str, str], str] = {
    ("experts", "magnitude"): "the row norm of W+ΔW needs one ΔW, and a routed mixture has one per input",
    ("gate", "magnitude"): "the row norm of W+ΔW would change with every timestep of a batch",
}


@dataclass(frozen=True)
class Method:
    """Seven slots and a name. `options` is what the method was asked for, as written into files."""

    name: str
    factor: Factor | None = None
    gate: Gate | None = None
    experts: Experts | None = None
    magnitude: Magnitude | None = None
    penalty: tuple[Penalty, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)  # role -> multiple of the part's learning rate
    warmup: Warmup | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def require_factor(self) -> Factor:
        """The factor, without which nothing can be built. Raises `Refused` when the slot is empty."""
        if self.factor is None:
            raise Refused(f"{self.name} has no factor; join it with a method that has one, as in `a | b`")
        return self.factor

    def __post_init__(self) -> None:
        for pair, reason in CONFLICTS.items():
            if all(getattr(self, slot) is not None for slot in pair):
                raise Refused(
                    f"{self.name} fills {pair[0]} and {pair[1]}, which cannot work: {reason}; leave one out"
                )

    def __or__(self, other: Method) -> Method:
        """Both methods at once.

        Raises `Refused` when both fill one slot, set one rate or one option differently.
        """
        merged: dict[str, Any] = {
            "name": f"{self.name}+{other.name}",
            "penalty": self.penalty + other.penalty,
        }
        for slot in ("factor", "gate", "experts", "magnitude", "warmup"):
            mine, theirs = getattr(self, slot), getattr(other, slot)
            if mine is not None and theirs is not None:
                raise Refused(f"{self.name} and {other.name} both fill the {slot} slot; choose one of them")
            merged[slot] = mine if theirs is None else theirs
        for table in ("rates", "options"):
            mine, theirs = getattr(self, table), getattr(other, table)
            for key in mine.keys() & theirs.keys():
                if mine[key] != theirs[key]:
                    raise Refused(
                        f"{self.name} sets {table[:-1]} {key} to {mine[key]} and {other.name} to "
                        f"{theirs[key]}; give one value"
                    )
            merged[table] = {**mine, **theirs}
        return dataclasses.replace(self, **merged)
