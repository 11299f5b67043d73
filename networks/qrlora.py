"""QR-LoRA: both factors of a layer's strongest part, trained from where they stand (arXiv 2507.04599).

    W_core = top r of W = Q₀·R₀        y = W x + s·(Q·R − Q₀·R₀) x        Q, R trained from Q₀, R₀

It starts with gradients of full size in both factors, which LoRA's U = 0 denies one of them. Nothing keeps Q
orthogonal or R triangular after step 0. The initial copy is subtracted in the forward instead of from W, as
the official code does, so the base stays whole; Q₀ and R₀ are part of the file, and the exact plain LoRA is
[Q | Q₀], [R ; −R₀] of rank 2r.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from lowrank.adapters.method import Chain, Factor, Method, Start
from lowrank.adapters.network_module import bind
from lowrank.bases.qr_basis import start_basis


@dataclass(frozen=True)
class Options:
    basis_cache: str | None = None
    """folder for bases, computed once per weight and rank"""


def start(weights, ranks, scales, options: Options) -> Start:
    """U = U₀ = Q, D = D₀ = R/s."""
    bases, facts = start_basis(weights, ranks, options.basis_cache)
    values = {}
    for name, (Q, R) in bases.items():
        values[name] = {"up": Q, "down": R / scales[name], "q": Q, "base_r": R / scales[name]}
    return values, facts


def method(options: Options) -> Method:
    factor = Factor(partial(start, options=options), trained=("down", "up"), copy=Chain(("q",), ("base_r",)))
    return Method("qrlora", factor)


create_network, create_network_from_weights = bind(method, Options, alpha_is_rank=True)
