"""Pairs of factors U·D: LoRA's starting values, sums of pairs, the best pair of a lower rank.

Shapes: O outputs, I inputs (times the kernel of a convolution), R rank; up U (O, R), down D (R, I). Functions
from tensors to tensors; nothing here knows a module. Source: LoRA, arXiv 2106.09685 (kaiming D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank.errors import Refused


def kaiming(
    rank: int,
    shape: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """LoRA's D (R, *shape), shape (I,) or (I, kh, kw): uniform within ±1/√fan_in, kaiming's for a = √5."""
    bound = 1 / math.sqrt(math.prod(shape))
    return torch.empty(rank, *shape, dtype=dtype, device=device).uniform_(-bound, bound, generator=generator)


# ------------------------------------------------------------------ top singular subspace


# ------------------------------------------------------------------ QR factors


# ------------------------------------------------------------------ algebra of factor pairs


def concat(parts: Sequence[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One (up, down) for the sum of scale · up · down over `parts`: exact, ranks added, scales in the downs.

    Raises `Refused` when the layers differ in shape.
    """
    outer = {(up.shape[0], *up.shape[2:], *down.shape[1:]) for _, up, down in parts}
    if len(outer) != 1:
        raise Refused(f"layers of shapes {sorted(outer)} cannot be added; give adapters of one base model")
    return torch.cat([up for _, up, _ in parts], dim=1), torch.cat([scale * down for scale, _, down in parts])


def resize_pair(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best (up, down) of a lower rank, balanced, and its relative Frobenius error; no O × I is formed.

    up is (O, R) or (O, R, 1, 1), down (R, I) or (R, I, kh, kw); float64 inside, the inputs' dtypes outside.
    Raises `Refused` for a higher rank.
    """
    q_up, r_up = torch.linalg.qr(up.flatten(1).double())  # (O, k), (k, R)
    q_down, r_down = torch.linalg.qr(down.flatten(1).double().mT)  # (I, l), (l, R)
    u, s, vh = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    if not 1 <= rank <= len(s):
        raise Refused(f"rank {rank} is not between 1 and this adapter layer's {len(s)}; choose one that is")
    root = s[:rank].sqrt()
    new_up = (q_up @ (u[:, :rank] * root)).reshape(up.shape[0], rank, *up.shape[2:])
    new_down = ((q_down @ vh[:rank].mT) * root).mT.reshape(rank, *down.shape[1:])
    lost = (s[rank:].norm() / s.norm()).item() if s[0] > 0 else 0.0
    return new_up.to(up), new_down.to(down).contiguous(), lost
