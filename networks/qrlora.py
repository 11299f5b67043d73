"""QR-LoRA: train both QR factors of the top-r part of a weight from their values (arXiv 2507.04599).

    W_core = top r of W = Q₀·R₀        y = W x + s·(Q·R − Q₀·R₀) x        Q, R trained from Q₀, R₀

Both factors have gradients of full size from step 0; in LoRA D has none while U = 0. Nothing keeps Q
orthogonal or R triangular during training.

Difference from the official code: it subtracts Q₀·R₀ from W, we subtract it in the forward and leave the base
model unchanged. Q₀ and R₀ are saved in the adapter file. The exact plain LoRA is [Q | Q₀], [R ; −R₀], of rank
2r.
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
    """folder that caches QR bases, default $LOWRANK_CACHE/basis or ~/.cache/lowrank/basis"""


def start(weights, ranks, scales, options: Options) -> Start:
    """Return U = U₀ = Q (O, R) and D = D₀ = R/s (R, I) for each layer."""
    bases, metadata = start_basis(weights, ranks, options.basis_cache)
    values = {}
    for name, (Q, R) in bases.items():
        values[name] = {"up": Q, "down": R / scales[name], "q": Q, "base_r": R / scales[name]}
    return values, metadata


def method(options: Options) -> Method:
    factor = Factor(partial(start, options=options), trained=("down", "up"), copy=Chain(("q",), ("base_r",)))
    return Method("qrlora", factor)


create_network, create_network_from_weights = bind(method, Options, alpha_is_rank=True)
