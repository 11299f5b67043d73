"""Null-LoRA: train only into and out of the directions that a weight uses least (arXiv 2512.15233).

    y = W x + s·(B·diag(n₁)·V_N + U_N·diag(n₂)·A) x        rank R from two halves of h = R/2

V_N (h×I) and U_N (O×h) are frozen: the right and left null space of W, and where it is too small its smallest
singular directions. B (O×h), A (h×I) start at zero and the norms n at one, so that the start is the base and
both gradients are alive. For the directions U_top, V_top that W does use, U_topᵀ ΔW V_top = 0 whatever is
learned. `null_strict` keeps both sides: ΔW = s·U_N·C·V_N.

Unlike the code we know of the null space is exact for non-square layers, where a thin SVD has none of it, and
nothing is added before step 0. The paper was readable only in part: the norms and the rank rule are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowrank.adapters.method import Chain, Factor, Method, Start, structural
from lowrank.adapters.network_module import bind
from lowrank.bases.null_space import Null, least_active, null_spaces, nullity
from lowrank.errors import Refused, nearest
from networks.universal_lora import Directions

SOURCES = ("weight", "activation")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    null_source: str = "weight"
    """null space of the weight, or of the activations and gradients in a curvature file (activation)"""
    null_strict: bool = structural(False)
    """ΔW = s·U_N·C·V_N: nothing is read from or written to what the weight uses"""
    null_adaptive_rank: bool = False
    """ranks in proportion to each layer's nullity, the same in the mean"""
    null_threshold: float = 1e-3
    """singular values up to this share of the largest count as null"""
    svd_cache_path: str | None = None
    """file that keeps the null spaces between runs"""
    lalora_context_path: str | None = None
    """curvature file, made by calc_lalora_context.py"""

    def __post_init__(self) -> None:
        if self.null_source not in SOURCES:
            raise Refused(
                f"null_source {self.null_source!r} is not one of "
                f"{', '.join(SOURCES)}{nearest(self.null_source, SOURCES)}"
            )
        if self.null_source == "activation" and not self.lalora_context_path:
            raise Refused(
                "null_source=activation needs lalora_context_path, a file that calc_lalora_context.py made"
            )
        if not 0 < self.null_threshold < 1:
            raise Refused(
                f"null_threshold {self.null_threshold:g} is not a share between 0 and 1; 1e-3 is usual"
            )


def spaces(weights: Mapping[str, Tensor], widths: Mapping[str, int], options: Options) -> Mapping[str, Null]:
    """U_N (O, h) and V_N (h, I) by layer."""
    if options.null_source == "weight":
        return null_spaces(weights, widths, options.svd_cache_path)
    return least_active(options.lalora_context_path or "", weights, widths)


def fit(
    weights: Mapping[str, Tensor], ranks: Mapping[str, int], options: Options, directions: Directions | None
) -> dict[str, int]:
    """Even ranks; with `null_adaptive_rank` in proportion to the nullity, at least 2."""
    even = {name: max(2, rank - rank % 2) for name, rank in ranks.items()}
    changed = [name for name in ranks if even[name] != ranks[name]]
    if changed:
        logger.warning(
            "null_lora has two halves: rank %d becomes %d in %d layers, for example %s; give an even one",
            *(ranks[changed[0]], even[changed[0]], len(changed), changed[0]),
        )
    if options.null_adaptive_rank and not any(weight.is_meta for weight in weights.values()):
        found = {name: nullity(weights[name], options.null_threshold) for name in ranks}
        mean = sum(found.values()) / len(found) or 1.0
        for name, rank in even.items():
            most = min(weights[name].shape) // 2
            even[name] = 2 * max(1, min(round(rank / 2 * found[name] / mean), most))
    if directions is None:
        return even
    wanted = {name: weights[name] for name in ranks}
    return {
        name: 2 * h for name, h in directions.fit(wanted, {name: R // 2 for name, R in even.items()}).items()
    }


def start(weights, ranks, scales, options: Options, directions: Directions | None) -> Start:
    """U_N, V_N, and the basis if there is one; zeros where we train, ones for the norms."""
    widths = {name: rank // (1 if options.null_strict else 2) for name, rank in ranks.items()}
    pairs, facts = directions.pairs(weights, widths) if directions else ({}, {})
    values = {}
    for name, null in spaces(weights, widths, options).items():
        O, h, I = *null.up.shape, null.down.shape[1]
        values[name] = {"null_up": null.up, "null_down": null.down}
        if options.null_strict:
            values[name] |= {"core": torch.zeros(h, h)}
            continue
        values[name] |= {"norm_up": torch.ones(h), "norm_down": torch.ones(h)}
        if directions:
            L, R = pairs[name]
            cores = {"core_up": torch.zeros(h, h), "core_down": torch.zeros(h, h)}
            values[name] |= {"basis_up": L, "basis_down": R, **cores}
        else:
            values[name] |= {"free_up": torch.zeros(O, h), "free_down": torch.zeros(h, I)}
    return values, facts


def _unique(options: Options, directions: Directions | None) -> str:
    if directions and directions.learned:
        return "are found in the training data"
    return "are found in the context file" if options.null_source == "activation" else ""


def factor(options: Options, directions: Directions | None = None) -> Factor:
    """The cross-frozen factor; `directions` writes B as L·C₁ and A as C₂·R."""
    if options.null_strict and directions:
        raise Refused(
            "null_strict trains one core between null spaces and has no use for a basis; give basis_path=none"
        )
    up, down = (
        (("basis_up", "core_up"), ("core_down", "basis_down"))
        if directions
        else (("free_up",), ("free_down",))
    )
    made = partial(
        Factor,
        partial(start, options=options, directions=directions),
        precise=("null_up", "null_down"),
    )
    if options.null_strict:
        chain = Chain(("null_up", "core"), ("null_down",))
        return made(trained=("core",), chains=(chain,), plus=(), unique=_unique(options, None))
    return made(
        trained=(up[-1], "norm_up", "norm_down", down[0]),
        chains=(Chain((*up, "norm_up"), ("null_down",)), Chain(("null_up", "norm_down"), down)),
        diagonal=("norm_up", "norm_down"),
        plus=(up[-1],),
        fit=partial(fit, options=options, directions=directions),
        unique=_unique(options, directions),
    )


def method(options: Options) -> Method:
    return Method("null_lora", factor(options))


create_network, create_network_from_weights = bind(method, Options)
