"""QR-LoRA: train both QR factors of the top-r part of a weight from their values (arXiv 2507.04599).

    W_core = top-r part of W = Q·R = s·U₀·D₀        y = W x + s·(U·D − U₀·D₀) x

U (O×r) and D (r×I) are trained from U₀ = Q and D₀ = R/s. In LoRA the gradient of D is 0 at step 0, because
U = 0; here neither gradient is 0. Nothing keeps U orthogonal or D triangular during training.

Difference from the official code: it subtracts W_core from W. We subtract s·U₀·D₀ in the forward and leave
the base model unchanged. U₀ and D₀ are saved in the adapter file. The exact plain LoRA has rank 2r: up
[U | U−U₀], down [D−D₀ ; D₀].
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
    """Return U = U₀ = Q (O, r) and D = D₀ = R/s (r, I) for each layer."""
    bases, metadata = start_basis(weights, ranks, options.basis_cache)
    values = {}
    for name, (Q, R) in bases.items():
        values[name] = {"up": Q, "down": R / scales[name], "q": Q, "base_r": R / scales[name]}
    return values, metadata


def method(options: Options) -> Method:
    factor = Factor(partial(start, options=options), trained=("down", "up"), copy=Chain(("q",), ("base_r",)))
    return Method("qrlora", factor)


create_network, create_network_from_weights = bind(method, Options, alpha_is_rank=True)
