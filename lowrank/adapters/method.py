"""A method of adaptation: a record of seven slots, each None or empty if the method does not use it.

    y = g ⊙ ( W x + s·U·C(t,x)·D x − s·U₀·C₀(t)·D₀ x ) + b

factor: the tensors D, C, U, which of them are frozen, and whether an initial copy (index 0) is subtracted ·
gate: the ranks that are open at t · experts: U depends on x · magnitude: g is trained · penalty: terms of the
loss · rates: learning rates by role · warm-up: stages before step 0. `a | b` is both methods at once.
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

# values by layer and role, and metadata for the file
Start = tuple[dict[str, dict[str, Tensor]], dict[str, str]]


def structural(default: Any, words: tuple[str, ...] | None = None) -> Any:
    """Return a field for an option that determines the tensors or their use; it is also read from files.

    `words` are the only values accepted from a file's metadata, for an option that can also be a path: paths
    from metadata are not opened.
    """
    return field(default=default, metadata={"structural": True, "words": words})


class Chain(NamedTuple):
    """A product of roles, from outputs to inputs; the rank is between `up` and `down`.

    The first role of `up` is O×R, the last of `down` R×I, the others are R×R, or R if diagonal. A
    diagonal (O,) may precede the O×R role (`Factor.split_up`).
    """

    up: tuple[str, ...] = ("up",)
    down: tuple[str, ...] = ("down",)


@dataclass(frozen=True)
class Factor:
    """The tensors U, C and D. The names in the chains are roles, which are also the names in files.

    `start(weights, ranks, scales)` returns the values at step 0: `weights` maps a layer's name to its dense
    weight (O, I·kh·kw) and is read lazily, `ranks` and `scales` map it to R and s. Several chains are added;
    each has an equal part of the rank.
    """

    start: Callable[[Mapping[str, Tensor], Mapping[str, int], Mapping[str, float]], Start]
    trained: tuple[str, ...]
    chains: tuple[Chain, ...] = (Chain(),)
    copy: Chain | None = None  # the initial copy, subtracted
    diagonal: tuple[str, ...] = ()  # roles that are diagonal matrices, stored as (R,) or (O,)
    common: tuple[str, ...] = ()  # frozen roles that layers of equal shapes have in common
    saved_only: tuple[str, ...] = ()  # roles that are written to files but not used in the forward
    precise: tuple[str, ...] = ()  # frozen roles that stay in fp32 in any precision of the forward
    loraplus: tuple[str, ...] = ("up",)  # roles with LoRA+'s higher learning rate, if trained
    # role -> projection of its rows, applied in the forward
    constrain: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    # (weights, ranks) -> the ranks that the layers can have
    allowed_ranks: Callable[[Mapping[str, Tensor], Mapping[str, int]], Mapping[str, int]] | None = None
    not_recomputable: str = ""  # why frozen roles cannot be computed again, so that files must have them
    # (part, path, input shape (I[, k, k])) -> key; layers of equal keys share the last down role
    share: Callable[[str, str, tuple[int, ...]], Hashable] | None = None
    joined: bool = (
        False  # files have kohya's names, and FLUX's joined layers; layers that share are its parts
    )

    @property
    def copies(self) -> tuple[str, ...]:
        """The roles of the initial copy."""
        return (*self.copy.up, *self.copy.down) if self.copy else ()

    @property
    def frozen(self) -> frozenset[str]:
        """The roles of the forward that are not trainable."""
        roles = {role for chain in self.chains for role in (*chain.up, *chain.down)}
        return frozenset(roles.union(self.copies)) - set(self.trained)

    def starts(self) -> dict[str, str]:
        """Return the role of the initial copy of each trained role that has one."""
        pairs = zip((*self.chains[0].up, *self.chains[0].down), self.copies, strict=True) if self.copy else ()
        return {role: start for role, start in pairs if role in self.trained}

    def split_up(self, chain: Chain) -> tuple[str | None, str, tuple[str, ...]]:
        """Return a chain's ups as the leading diagonal (O,) or None, the O×R role, and the others."""
        if chain.up[0] in self.diagonal:
            return chain.up[0], chain.up[1], chain.up[2:]
        return None, chain.up[0], chain.up[1:]

    def cores(self) -> set[str]:
        """Return the roles of the chains that are R×R or (R,)."""
        return {role for chain in self.chains for role in (*self.split_up(chain)[2], *chain.down[:-1])}

    def sides(self) -> dict[str, tuple[str, ...]]:
        """Return the dimensions of each role's tensor as words: "outputs", "rank", "inputs".

        The kernel of a convolution counts as inputs, a record has the shape of D, and the ups of experts have
        one more dimension in front.
        """
        shapes: dict[str, tuple[str, ...]] = {}
        for chain in (*((self.copy,) if self.copy else ()), *self.chains):
            rows, up, cores = self.split_up(chain)
            for role in (*cores, *chain.down[:-1]):
                shapes[role] = ("rank",) if role in self.diagonal else ("rank", "rank")
            shapes[chain.down[-1]], shapes[up] = ("rank", "inputs"), ("outputs", "rank")
            shapes |= {rows: ("outputs",)} if rows else {}
        return shapes | dict.fromkeys(self.saved_only, ("rank", "inputs"))

    @property
    def shared(self) -> str | None:
        """The role that layers share, or None."""
        return self.chains[0].down[-1] if self.share else None

    def rank_in(self, role: str, shape: Sequence[int]) -> int | None:
        """Return a layer's rank from the shape of one tensor, or None if the role does not determine it."""
        for chain in self.chains:
            if role == self.split_up(chain)[0]:
                return None
            if role in self.diagonal and role in (*chain.up, *chain.down):
                return shape[-1] * len(self.chains)  # (R,), and (1, R) in LyCORIS' files
            if role in chain.down:
                return shape[0] * len(self.chains)
            if role in chain.up:
                plain = shape[:-2] if len(shape) > 3 else shape  # a convolution's ends in 1, 1
                return plain[-1] * len(self.chains)
        return None


@dataclass(frozen=True)
class Gate:
    """A rank gate: `open(timestep (B,), rank) -> (B,)` is the number of leading ranks that are open.

    `metadata(rank)` are its entries in a file; rank is None if layers differ. `for_rank(rank)` is the gate
    for a network of this rank, in which layers of another rank open the same share.
    """

    open: Callable[[Tensor, int], Tensor]
    metadata: Callable[[int | None], Mapping[str, str]] = lambda rank: {}
    for_rank: Callable[[int], Gate] | None = None


@dataclass(frozen=True)
class Experts:
    """Experts: `count` tensors (E, …) of one up role; `route(x or h (…, K), router (E, K)) -> (…, E)`."""

    count: int
    route: Callable[[Tensor, Tensor], Tensor]
    role: str = "up"
    on: str = "h"  # input of the router: "h" (the projection D x) or "x"
    scope: str = "token"  # weights of each token or pixel, or of each "sample", from its mean


@dataclass(frozen=True)
class Magnitude:
    """g = m/‖W+ΔW‖ per output row, m trained; `detach`: no gradient through the norm (DoRA, §4.3)."""

    detach: bool = True


@dataclass(frozen=True)
class Penalty:
    """A term added to the loss and logged by name: `value(network) -> scalar`.

    Instead of `value`, `prepare(network)` may be given; it returns `value` when the layers have the values
    that training starts from.
    """

    name: str
    value: Callable[[Any], Tensor] | None = None
    prepare: Callable[[Any], Callable[[Any], Tensor]] | None = None


@dataclass(frozen=True)
class WarmupBatches:
    """The batches of a run for a warm-up stage, with the objective and precision of the run."""

    # endless; each item returns the weighted losses (B,) of one batch with gradient, equal at every call
    batches: Callable[[], Iterator[Callable[[], Tensor]]]
    total: Callable[[Tensor], Tensor]  # the sum over processes
    processes: int
    log: Callable[[Mapping[str, float], int], None]  # scalars by name, at a step of the stage
    scaled: bool = False  # gradients are fp16 and underflow unless the loss is scaled
    progress: bool = False  # show a bar


@dataclass(frozen=True)
class Warmup:
    """A stage before step 0 that needs data: `run(network, samples)` changes only values of the adapter."""

    name: str
    run: Callable[[Any, WarmupBatches], None]


@dataclass(frozen=True)
class Updates:
    """The choice of layers that are updated in a step; the forward is unchanged.

    In each step a `share` of the layers is drawn by importance; `role` is not updated in the others. Every
    `every` steps the outputs of `probed` layers are scaled by `suppressed_share`. The increase of a fixed
    loss is the importance of those layers.
    """

    role: str
    share: float
    every: int
    probed: int
    suppressed_share: float = 0.01


# Pairs of slots that exclude each other, and the reason, which also is in the documentation.
CONFLICTS: Mapping[tuple[str, str], str] = {
    ("gate", "magnitude"): "the row norm of W+ΔW would change with every timestep of a batch",
}


@dataclass(frozen=True)
class Method:
    """A name and the slots of a method. `options` are the method's options, as written into files."""

    name: str
    factor: Factor | None = None
    gate: Gate | None = None
    experts: Experts | None = None
    magnitude: Magnitude | None = None
    penalty: tuple[Penalty, ...] = ()
    rates: Mapping[str, float] = field(default_factory=dict)  # role -> multiple of the part's learning rate
    warmup: tuple[Warmup, ...] = ()  # in the order of execution
    updates: Updates | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # warnings about this combination, logged at the start

    def require_factor(self) -> Factor:
        """Return the factor. Raises `Refused` if the slot is empty."""
        if self.factor is None:
            raise Refused(f"{self.name} has no factor; join it with a method that has one, as in `a | b`")
        return self.factor

    def file_roles(self) -> tuple[str, ...]:
        """Return the roles of a layer's tensors in files, without alpha and magnitude."""
        factor = self.require_factor()
        chains = (*factor.chains, *((factor.copy,) if factor.copy else ()))
        roles = [role for chain in chains for role in (*chain.up, *chain.down)]
        return (*dict.fromkeys(roles), *factor.saved_only, *((ROUTER,) if self.experts else ()))

    def for_rank(self, rank: int | None) -> Method:
        """Return this method with its gate set for a network of rank `rank` (None: unknown)."""
        if self.gate is None or self.gate.for_rank is None or rank is None:
            return self
        return dataclasses.replace(self, gate=self.gate.for_rank(rank))

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
        """Return the method that does both. Raises `Refused` if a slot, rate or option of both differs."""
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
    """Raise `Refused` for a file of another method, and for a plain LoRA whose ranks open in pairs."""
    made_by = metadata.get("lowrank.method", method.name)
    if made_by != method.name:
        raise Refused(f"{source} was made by {made_by}, not {method.name}; use --network_module {made_by}")
    if method.gate is not None and "lowrank.exported_from" in metadata and metadata.get("tlora_group") == "2":
        raise Refused(
            f"{source} is an export as a plain LoRA whose ranks open in pairs; use the original file"
        )


def lora_start(weights, ranks, scales) -> Start:
    """Start LoRA: D ~ U(−1/√I, 1/√I), U = 0."""
    values = {}
    for name, weight in weights.items():
        outs, ins = weight.shape
        values[name] = {"down": kaiming(ranks[name], (ins,)), "up": torch.zeros(outs, ranks[name])}
    return values, {}


LORA_FACTOR = Factor(lora_start, trained=("down", "up"))
