"""ΔR: train an update whose outputs lie in a layer's strongest output directions (QR-LoRA, arXiv 2507.04599).

    W_core = top-r part of W = Q·R = s·Q·D₀        y = W x + s·Q·ΔR x

r is the rank, s = alpha/r. Q (O×r) and D₀ = R/s (r×I) are frozen. Only ΔR (r×I) is trained, from zero: r·I
numbers instead of the r·(O + I) of a LoRA of equal rank, so half of them where I = O on average, as on FLUX.
Adapters of one base model in one dtype, with equal rank, share Q (`qr_basis.weight_key`). Adding their ΔW
then means adding their ΔR, and cos(ΔR₁, ΔR₂) = cos(ΔW₁, ΔW₂) exactly.

Difference from the official code: W is not replaced by the residual W_res = W − W_core. The official forward
W_res x + s·Q·(D₀ + ΔR) x equals ours, because s·Q·D₀ = W_core. So no residual has to be rounded, stored or
loaded, and in bf16 a small ΔR is not rounded away against a large R. Files contain D₀ (`base_r`) for other
programs that need it; our forward does not use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from lowrank.adapters.method import Chain, Factor, Method, Start
from lowrank.adapters.network_module import bind
from lowrank.bases.qr_basis import start_basis


@dataclass(frozen=True)
class Options:
    use_zero_init: bool = True
    """start with ΔR = 0, so that step 0 is the base model; False: random ΔR, as in the official code"""
    delta_scale: float = 0.01
    """standard deviation of the random ΔR that use_zero_init=False starts with"""
    basis_cache: str | None = None
    """folder that caches QR bases, default $LOWRANK_CACHE/basis or ~/.cache/lowrank/basis"""


def start(weights, ranks, scales, options: Options) -> Start:
    """Return Q (O, r), R/s (r, I) and ΔR (r, I) for each layer; ΔR is zero or random (`use_zero_init`)."""
    bases, metadata = start_basis(weights, ranks, options.basis_cache)
    values = {}
    for name, (Q, R) in bases.items():
        delta = torch.zeros_like(R) if options.use_zero_init else torch.randn_like(R) * options.delta_scale
        values[name] = {"q": Q, "base_r": R / scales[name], "delta_r": delta}
    return values, metadata


def factor(options: Options) -> Factor:
    """U = Q is frozen, D = ΔR is trained; R/s is saved and not used in the forward."""
    return Factor(
        partial(start, options=options),
        trained=("delta_r",),
        chains=(Chain(("q",), ("delta_r",)),),
        saved_only=("base_r",),
    )


def method(options: Options) -> Method:
    return Method("delta_r", factor(options))


create_network, create_network_from_weights = bind(method, Options, alpha_is_rank=True)
