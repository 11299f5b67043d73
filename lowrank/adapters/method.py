"""A method is a record of seven slots; `a | b` fills the empty ones.

    y = g ⊙ ( W x + s·U·C(t,x)·D x − s·U₀·C₀(t)·D₀ x ) + b

factor: who are D, C, U, which are frozen, is the initial copy (index 0) subtracted · gate: which ranks are
open at t · experts: does U depend on x · magnitude: is g free · penalty: what pulls during training · rates:
which role learns how fast · warm-up: what happens before step 0. A slot left None is neutral.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank.adapters.factor import kaiming
from lowrank.errors import Refused
from lowrank.naming.keys import ROUTER

# values by layer and role, facts for the file's metadata
Start = tuple[dict[str, dict[str, Tensor]], dict[str, str]]


def structural(default: Any, words: tuple[str, ...] | None = None) -> Any:
    """A field of a method's options that decides which tensors there are or what they do; read from files.

    `words` are all that a file may say there, for an option that can also be a path: what a stranger's file
    names is not opened.
    """
    return field(default=default, metadata={"structural": True, "words": words})


class Chain(NamedTuple):
    """A product of roles, from the output's side to the input's; `up` and `down` meet in the rank.

    The first role of `up` is O×R, the last of `down` R×I, those between R×R, or R where diagonal.
    """

    up: tuple[str, ...] = ("up",)
    down: tuple[str, ...] = ("down",)


@dataclass(frozen=True)
class Factor:
    """Who are U, C and D; the names in the chains are roles, which are also the names in files.

    `start(weights, ranks, scales)` gives the values at step 0: `weights` maps a layer's name to its dense
    weight (O, I·kh·kw) and is read lazily, `ranks` and `scales` map it to R and s. Several chains are added
    and share the rank evenly. A role in `record` is written to files but takes no part in the forward.
    """

    start: Callable[[Mapping[str, Tensor], Mapping[str, int], Mapping[str, float]], Start]
    trained: tuple[str, ...]
    chains: tuple[Chain, ...] = (Chain(),)
    copy: Chain | None = None  # the initial copy, subtracted
    diagonal: tuple[str, ...] = ()  # roles that hold only a diagonal
    record: tuple[str, ...] = ()
    precise: tuple[str, ...] = ()  # frozen roles that stay in fp32 whatever the forward computes in
    plus: tuple[str, ...] = ("up",)  # roles that LoRA+ speeds up, where they are trained
    # role -> projection in forward
    constrain: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    # (weights, ranks) -> the ranks that the layers can have
    fit: Callable[[Mapping[str, Tensor], Mapping[str, int]], Mapping[str, int]] | None = None
    unique: str = ""  # why frozen roles cannot be found again, so that no file may leave them out
    # (part, path, input shape (I[, k, k])) -> layers of one answer have the last down role in common
    share: Callable[[str, str, tuple[int, ...]], Hashable] | None = None

    @property
    def copies(self) -> tuple[str, ...]:
        """The roles of the initial copy."""
        return (*self.copy.up, *self.copy.down) if self.copy else ()

    @property
    def frozen(self) -> frozenset[str]:
        """The roles of the forward that are not trained."""
        roles = {role for chain in self.chains for role in (*chain.up, *chain.down)}
        return frozenset(roles.union(self.copies)) - set(self.trained)

    def sides(self) -> dict[str, tuple[str, ...]]:
        """The sizes that each role has, in the order of its tensor: "outputs", "rank", "inputs".

        A convolution's kernel belongs to the inputs, a record has the shape of a D, and experts' ups one
        dimension more in front.
        """
        shapes: dict[str, tuple[str, ...]] = {}
        for chain in (*((self.copy,) if self.copy else ()), *self.chains):
            for role in (*chain.up[1:], *chain.down[:-1]):
                shapes[role] = ("rank",) if role in self.diagonal else ("rank", "rank")
            shapes[chain.down[-1]], shapes[chain.up[0]] = ("rank", "inputs"), ("outputs", "rank")
        return shapes | dict.fromkeys(self.record, ("rank", "inputs"))

    @property
    def shared(self) -> str | None:
        """The role that layers have in common."""
        return self.chains[0].down[-1] if self.share else None

    def rank_in(self, role: str, shape: Sequence[int]) -> int | None:
        """The layer's rank, from the shape of one of its tensors; None for a role that does not tell."""
        for chain in self.chains:
            if role in self.diagonal and role in (*chain.up, *chain.down):
                return shape[-1] * len(self.chains)  # (R,), and (1, R) in LyCORIS' files
            if role in chain.down:
                return shape[0] * len(self.chains)
            if role in chain.up:
                plain = shape[:-2] if len(shape) > 3 else shape  # of a convolution it ends in 1, 1
                return plain[-1] * len(self.chains)
        return None


@dataclass(frozen=True)
class Gate:
    """`open(timestep (B,), rank) -> (B,)`: how many leading ranks are open.

    `metadata(rank, or None where layers differ)`: its entries in a file. `of(rank)`: the gate of a network of
    this rank, where layers of other ranks have their share of it.
    """

    open: Callable[[Tensor, int], Tensor]
    metadata: Callable[[int | None], Mapping[str, str]] = lambda rank: {}
    of: Callable[[int], Gate] | None = None


@dataclass(frozen=True)
class Experts:
    """`count` of one role of the up side, (E, …); `route(x or h (…, K), router (E, K)) -> (…, E)`."""

    count: int
    route: Callable[[Tensor, Tensor], Tensor]
    role: str = "up"
    on: str = "h"  # what the router reads: "h" (the R-wide projection) or "x"
    scope: str = "token"  # each token or pixel has its own weights, or a "sample" those of its mean


@dataclass(frozen=True)
class Magnitude:
    """g = m/‖W+ΔW‖ per output row, m trained; `detach`: no gradient through the norm (the paper's §4.3)."""

    detach: bool = True


@dataclass(frozen=True)
class Penalty:
    """A term added to the loss and logged by name: `value(network) -> scalar`.

    Instead of `value`, `prepare(network)` gives it once the network's layers are known.
    """

    name: str
    value: Callable[[Any], Tensor] | None = None
    prepare: Callable[[Any], Callable[[Any], Tensor]] | None = None


@dataclass(frozen=True)
class WarmupBatches:
    """What a trainer gives a warm-up stage: its own batches, with the objective and precision of the run."""

    # endless; each item gives the weighted losses (B,) of one batch with gradient, the same at every call
    batches: Callable[[], Iterator[Callable[[], Tensor]]]
    total: Callable[[Tensor], Tensor]  # the sum over processes
    processes: int
    log: Callable[[Mapping[str, float], int], None]  # scalars by name, at a step of the stage
    scaled: bool = False  # gradients are fp16 and underflow unless the loss is scaled
    progress: bool = False  # show a bar


@dataclass(frozen=True)
class Warmup:
    """A stage before step 0 that needs data: `run(network, samples)` changes values of the adapter alone."""

    name: str
    run: Callable[[Any, WarmupBatches], None]


@dataclass(frozen=True)
class Updates:
    """Which layers learn in a step, no slot of the equation: the forward stays as it is.

    In each step `share` of the layers are drawn by importance, and `role` stands still in the others. Every
    `every` steps a probe leaves of the output of `probed` layers only the share `faint`: what a fixed loss
    rises by makes them important.
    """

    role: str
    share: float
    every: int
    probed: int
    faint: float = 0.01


# Slots that cannot be filled together, and why: printed at start, rendered into the documentation.
CONFLICTS: Mapping[tuple[str, str], str] = {
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
    warmup: tuple[Warmup, ...] = ()  # in this order
    updates: Updates | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a user should know of this combination; logged at the start

    def require_factor(self) -> Factor:
        """The factor, without which nothing can be built. Raises `Refused` when the slot is empty."""
        if self.factor is None:
            raise Refused(f"{self.name} has no factor; join it with a method that has one, as in `a | b`")
        return self.factor

    def file_roles(self) -> tuple[str, ...]:
        """The tensors that a file of this method has for each layer, besides alpha and a magnitude."""
        factor = self.require_factor()
        chains = (*factor.chains, *((factor.copy,) if factor.copy else ()))
        roles = [role for chain in chains for role in (*chain.up, *chain.down)]
        return (*dict.fromkeys(roles), *factor.record, *((ROUTER,) if self.experts else ()))

    def of(self, rank: int | None) -> Method:
        """The method for a network of this rank, which a gate may count by; None where nobody knows it."""
        if self.gate is None or self.gate.of is None or rank is None:
            return self
        return dataclasses.replace(self, gate=self.gate.of(rank))

    def __post_init__(self) -> None:
        if self.factor and self.factor.copy and (self.experts or len(self.factor.chains) > 1):
            raise Refused(
                f"{self.name} subtracts an initial copy of its factors, which is defined for one up; leave "
                "the experts out"
            )
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
            "warmup": self.warmup + other.warmup,
            "notes": self.notes + other.notes,
        }
        for slot in ("factor", "gate", "experts", "magnitude", "updates"):
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


def check_made_by(source: str, metadata: Mapping[str, str], method: Method) -> None:
    """Raise `Refused` for a file of another method, and for an export whose ranks open in pairs."""
    made_by = metadata.get("lowrank.method", method.name)
    if made_by != method.name:
        raise Refused(f"{source} was made by {made_by}, not {method.name}; use --network_module {made_by}")
    if method.gate is not None and "lowrank.exported_from" in metadata and metadata.get("tlora_group") == "2":
        raise Refused(
            f"{source} is an export as a plain LoRA whose ranks open in pairs; use the original file"
        )


def lora_start(weights, ranks, scales) -> Start:
    """D ~ U(−1/√I, 1/√I), U = 0."""
    values = {}
    for name, weight in weights.items():
        outs, ins = weight.shape
        values[name] = {"down": kaiming(ranks[name], (ins,)), "up": torch.zeros(outs, ranks[name])}
    return values, {}


LORA_FACTOR = Factor(lora_start, trained=("down", "up"))
