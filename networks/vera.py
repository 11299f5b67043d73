"""VeRA: train two vectors per layer between random matrices that layers share (arXiv 2310.11454, eq. 2).

    y = W x + s·Λ_b·B·Λ_d·A x        b (O,) trained from 0, d (R,) trained from 0.1; s = alpha/R, default 1

A (R×I) and B (O×R) are frozen, drawn with Kaiming's uniform distribution (√(6/fan_in)) from a seed and the
shape, so that all layers of one shape have the same A and B. O + R numbers are trained per layer, so R can be
far larger than the rank of a LoRA (the paper uses 256 to 1024).

Differences from the authors' code: there, one A and one B of the largest size are sliced for each layer; here
each shape has its own. Files contain A and B, for other programs; with --network_args save_basis=none they
are left out and drawn again from the seed.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowrank.adapters.method import Chain, Factor, Method, Start, structural
from lowrank.adapters.network_module import bind


@dataclass(frozen=True)
class Options:
    vera_seed: int = structural(0)
    """seed of the frozen random matrices A and B"""
    vera_d_init: float = 0.1
    """start value of the trained vector d"""


def frozen_matrix(name: str, rows: int, columns: int, seed: int) -> Tensor:
    """Draw A or B (`name`) of shape (rows, columns), uniform in ±√(6/columns), from the seed alone."""
    digest = hashlib.sha256(f"{seed} {name} {rows} {columns}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    bound = math.sqrt(6 / columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


def start(weights, ranks, scales, options: Options) -> Start:
    """Return A (R, I), d (R,), B (O, R) and b (O,) for each layer."""
    values, drawn = {}, {}
    for name, weight in weights.items():
        (outs, ins), rank = weight.shape, ranks[name]
        for matrix in (("A", rank, ins), ("B", outs, rank)):
            if matrix not in drawn:
                drawn[matrix] = frozen_matrix(*matrix, options.vera_seed)
        values[name] = {
            "vera_A": drawn["A", rank, ins],
            "vera_B": drawn["B", outs, rank],
            "vera_lambda_d": torch.full((rank,), options.vera_d_init),
            "vera_lambda_b": torch.zeros(outs),
        }
    return values, {}


def method(options: Options) -> Method:
    factor = Factor(
        partial(start, options=options),
        trained=("vera_lambda_d", "vera_lambda_b"),
        chains=(Chain(("vera_lambda_b", "vera_B", "vera_lambda_d"), ("vera_A",)),),
        diagonal=("vera_lambda_d", "vera_lambda_b"),
        common=("vera_A", "vera_B"),
        loraplus=(),
    )
    return Method("vera", factor)


create_network, create_network_from_weights = bind(method, Options, alpha_is_rank=True)
