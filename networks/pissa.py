"""PiSSA: train the principal singular components of a weight from their values (arXiv 2404.02948).

    W_top = top-r part of W = s·U₀·D₀        y = W x + s·(U·D − U₀·D₀) x

    PiSSA (default)         W_top = P Σ Vᵀ, U₀ = P √(Σ/s), D₀ = √(Σ/s) Vᵀ        (section 3)
    OLoRA (arXiv 2406.01775)  W = Q R, U₀ = the first r columns of Q, D₀ = the first r rows of R

U (O×r) and D (r×I) are trained. In LoRA the gradient of D is 0 at step 0, because U = 0; here neither
gradient is 0.

Difference from the official codes: they subtract the start from W and round W again. We subtract s·U₀·D₀ in
the forward and leave the base model unchanged. U₀ and D₀ are saved in the adapter file. The exact plain LoRA
has rank 2r: up [U | U−U₀], down [D−D₀ ; D₀].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowrank.adapters.method import Chain, Factor, Method, Start, structural
from lowrank.adapters.network_module import bind
from lowrank.bases.qr_basis import basis_hash, check_rank, start_basis
from lowrank.errors import Refused, nearest

STARTS = ("pissa", "olora")


@dataclass(frozen=True)
class Options:
    pissa_init: str = structural("pissa")
    """start values: pissa (singular components of the weight) or olora (its QR factors)"""
    basis_cache: str | None = None
    """folder that caches decompositions, default $LOWRANK_CACHE/basis or ~/.cache/lowrank/basis"""

    def __post_init__(self) -> None:
        if self.pissa_init not in STARTS:
            raise Refused(
                f"pissa_init {self.pissa_init!r} is not one of {', '.join(STARTS)}"
                f"{nearest(self.pissa_init, STARTS)}"
            )


def pissa(Q: Tensor, R: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return U₀ (O, r) and D₀ (r, I) with s·U₀·D₀ = Q·R, Q orthonormal, singular values split evenly."""
    P, S, V = torch.linalg.svd(R.double(), full_matrices=False)
    root = (S / scale).sqrt()
    return (Q.double() @ P * root).to(Q), (root[:, None] * V).to(R)


def olora(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the first `rank` columns of Q and rows of R of W = Q·R, from the first columns of W alone."""
    Q = torch.linalg.qr(W[:, :rank].double())[0]
    return Q.to(W), (Q.mT @ W.double()).to(W)


def start(weights, ranks, scales, options: Options) -> Start:
    """Return U = U₀ (O, r) and D = D₀ (r, I) for each layer."""
    if options.pissa_init == "pissa":
        bases, metadata = start_basis(weights, ranks, options.basis_cache)
        pairs = {name: pissa(Q, R, scales[name]) for name, (Q, R) in bases.items()}
    else:
        pairs = {}
        for name in weights:
            check_rank(weights[name], ranks[name], name)
            pairs[name] = olora(weights[name].float(), ranks[name])
        metadata = {"basis_hash": basis_hash(weights, ranks)}
    return {
        name: {"up": U, "down": D, "base_up": U, "base_down": D} for name, (U, D) in pairs.items()
    }, metadata


def method(options: Options) -> Method:
    factor = Factor(
        partial(start, options=options), trained=("down", "up"), copy=Chain(("base_up",), ("base_down",))
    )
    return Method("pissa", factor)


create_network, create_network_from_weights = bind(method, Options, alpha_is_rank=True)
