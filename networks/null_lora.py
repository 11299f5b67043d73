"""Null-LoRA: restrict ΔW to the directions that a weight uses least (arXiv 2512.15233).

    y = W x + s·(B·diag(n₁)·V_N + U_N·diag(n₂)·A) x        rank R in two halves of h = R/2

V_N (h×I) and U_N (O×h) are frozen: right and left null space of W, completed by its smallest singular
directions where the null space is too small (lowrank/bases/null_space.py). B (O×h) and A (h×I) are trained
from zero, the scales n₁, n₂ (h) from one, so that step 0 is the base model and both B and A have a gradient.
For all output directions u orthogonal to U_N and input directions v orthogonal to V_N, uᵀ ΔW v = 0 at every
step. Each half restricts one side only: the first reads only from V_N, the second writes only to U_N.
`null_strict` restricts both sides: ΔW = s·U_N·C·V_N.

Differences from published code: the null space is exact for non-square W, where a thin SVD does not contain
it, and ΔW is zero at step 0. We had no full text of the paper. From the paper: the frozen halves, a trained
scaling, the null-space constraint, ranks that follow each layer's nullity. Our choice: the formula of n₁ and
n₂ and the rule of `null_adaptive_rank`.
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
from lowrank.tensors import has_values
from networks.universal_lora import Directions

SOURCES = ("weight", "activation")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    null_source: str = "weight"
    """weight: null space of the weight; activation: least active directions in lalora_context_path"""
    null_strict: bool = structural(False)
    """restrict input and output of ΔW to the null space at once (ΔW = s·U_N·C·V_N, only C trained)"""
    null_adaptive_rank: bool = False
    """give each layer a rank in proportion to its nullity; --network_dim is the mean"""
    null_threshold: float = 1e-3
    """null_adaptive_rank counts singular values up to this fraction of the largest as null"""
    svd_cache_path: str | None = None
    """file that caches the null spaces between runs (default: no cache)"""
    lalora_context_path: str | None = None
    """context file made by calc_lalora_context.py, required by null_source=activation"""

    def __post_init__(self) -> None:
        if self.null_source not in SOURCES:
            raise Refused(
                f"null_source {self.null_source!r} is not one of "
                f"{', '.join(SOURCES)}{nearest(self.null_source, SOURCES)}"
            )
        if self.null_source == "activation" and not self.lalora_context_path:
            raise Refused(
                "null_source=activation needs lalora_context_path, a file made by calc_lalora_context.py"
            )
        if not 0 < self.null_threshold < 1:
            raise Refused(f"null_threshold {self.null_threshold:g} is not between 0 and 1; 1e-3 is usual")


def spaces(weights: Mapping[str, Tensor], widths: Mapping[str, int], options: Options) -> Mapping[str, Null]:
    """Return U_N (O, h) and V_N (h, I) by layer name, from the weights or the context file."""
    if options.null_source == "weight":
        return null_spaces(weights, widths, options.svd_cache_path)
    return least_active(options.lalora_context_path or "", weights, widths)


def allowed_ranks(
    weights: Mapping[str, Tensor], ranks: Mapping[str, int], options: Options, directions: Directions | None
) -> dict[str, int]:
    """Return the rank of each layer: even, at least 2, and no more than `directions` has.

    With `null_adaptive_rank` ranks are in proportion to the nullity. Warns if a rank changes.
    """
    even = {name: max(2, rank - rank % 2) for name, rank in ranks.items()}
    changed = [name for name in ranks if even[name] != ranks[name]]
    if changed:
        logger.warning(
            "null_lora needs an even rank: rank %d becomes %d in %d layers, for example %s; give an even one",
            *(ranks[changed[0]], even[changed[0]], len(changed), changed[0]),
        )
    if options.null_adaptive_rank and all(map(has_values, weights.values())):
        nullities = {name: nullity(weights[name], options.null_threshold) for name in ranks}
        mean = sum(nullities.values()) / len(nullities) or 1.0
        for name, rank in even.items():
            limit = min(weights[name].shape) // 2
            even[name] = 2 * max(1, min(round(rank / 2 * nullities[name] / mean), limit))
    if directions is None:
        return even
    halves = directions.allowed_ranks(
        {name: weights[name] for name in ranks}, {name: R // 2 for name, R in even.items()}
    )
    return {name: 2 * h for name, h in halves.items()}


def start(weights, ranks, scales, options: Options, directions: Directions | None) -> Start:
    """Return U_N, V_N and, with `directions`, L and R; trained matrices are zero, scales are one."""
    widths = {name: rank // (1 if options.null_strict else 2) for name, rank in ranks.items()}
    pairs, metadata = directions.pairs(weights, widths) if directions else ({}, {})
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
    return values, metadata


def _not_recomputable(options: Options, directions: Directions | None) -> str:
    if directions and directions.learned:
        return "are found in the training data"
    return "are found in the context file" if options.null_source == "activation" else ""


def factor(options: Options, directions: Directions | None = None) -> Factor:
    """Return U = [B·n₁ | U_N·n₂] and D = [V_N ; A]; with `directions`, B = L·C₁ and A = C₂·R.

    Raises `Refused` for null_strict together with a basis.
    """
    if options.null_strict and directions:
        raise Refused(
            "null_strict=True trains one core between two null spaces, without a basis; give basis_path=none"
        )
    up, down = (
        (("basis_up", "core_up"), ("core_down", "basis_down"))
        if directions
        else (("free_up",), ("free_down",))
    )
    null_factor = partial(
        Factor,
        partial(start, options=options, directions=directions),
        precise=("null_up", "null_down"),
    )
    if options.null_strict:
        chain = Chain(("null_up", "core"), ("null_down",))
        return null_factor(
            trained=("core",), chains=(chain,), loraplus=(), not_recomputable=_not_recomputable(options, None)
        )
    return null_factor(
        trained=(up[-1], "norm_up", "norm_down", down[0]),
        chains=(Chain((*up, "norm_up"), ("null_down",)), Chain(("null_up", "norm_down"), down)),
        diagonal=("norm_up", "norm_down"),
        loraplus=(up[-1],),
        allowed_ranks=partial(allowed_ranks, options=options, directions=directions),
        not_recomputable=_not_recomputable(options, directions),
    )


def method(options: Options) -> Method:
    return Method("null_lora", factor(options))


create_network, create_network_from_weights = bind(method, Options)
