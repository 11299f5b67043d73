"""ΔR: train only what is written into a layer's strongest output directions (QR-LoRA, arXiv 2507.04599).

    W_core = top r of W = Q·R        y = (W_res + s·Q(R + ΔR)) x = W x + s·Q·ΔR x

Q (O×R) and R are frozen, ΔR (R×I) starts at zero and is all that is trained: half of LoRA's parameters over
FLUX. Two adapters of one base share Q, so they are added by adding their ΔR, and cos(ΔR₁, ΔR₂) is exactly
cos(ΔW₁, ΔW₂).

Unlike the official code W is never edited: with Q and R frozen, W_res + sQR is W itself, so no residual is
rounded into the base or needed again, and ΔR is not swamped by R in bf16. R is written to files for their
readers and not used.
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
    """start at the base model; False starts at a random ΔR, the official code's default"""
    delta_scale: float = 0.01
    """standard deviation of that random ΔR"""
    basis_cache: str | None = None
    """folder for bases, computed once per weight and rank"""


def start(weights, ranks, scales, options: Options) -> Start:
    """Q, R/s and ΔR = 0."""
    bases, facts = start_basis(weights, ranks, options.basis_cache)
    values = {}
    for name, (Q, R) in bases.items():
        delta = torch.zeros_like(R) if options.use_zero_init else torch.randn_like(R) * options.delta_scale
        values[name] = {"q": Q, "base_r": R / scales[name], "delta_r": delta}
    return values, facts


def factor(options: Options) -> Factor:
    return Factor(
        partial(start, options=options),
        trained=("delta_r",),
        chains=(Chain(("q",), ("delta_r",)),),
        record=("base_r",),
    )


def method(options: Options) -> Method:
    return Method("delta_r", factor(options))


create_network, create_network_from_weights = bind(method, Options, alpha_is_rank=True)
