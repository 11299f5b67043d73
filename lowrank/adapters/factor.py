"""Pairs of factors U·D: LoRA's starting values, sums of pairs, and the best pair of a lower rank.

Functions of tensors. Shapes: O outputs, I inputs (times the kernel of a convolution), R rank; up U (O, R),
down D (R, I). Source: LoRA, arXiv 2106.09685 (kaiming D).
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
    """Draw LoRA's D (R, *shape), shape (I,) or (I, kh, kw), uniform in ±1/√fan_in (kaiming with a = √5)."""
    bound = 1 / math.sqrt(math.prod(shape))
    return torch.empty(rank, *shape, dtype=dtype, device=device).uniform_(-bound, bound, generator=generator)


def concat(parts: Sequence[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the (up, down) of the sum of scale · up · down over `parts`: exact, of the added ranks.

    Scales are multiplied into down. Raises `Refused` if the layers differ in shape.
    """
    shapes = {(up.shape[0], *up.shape[2:], *down.shape[1:]) for _, up, down in parts}
    if len(shapes) != 1:
        raise Refused(f"layers of shapes {sorted(shapes)} cannot be added; give adapters of one base model")
    return torch.cat([up for _, up, _ in parts], dim=1), torch.cat([scale * down for scale, _, down in parts])


def resize_pair(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the best (up, down) of a lower rank and its relative Frobenius error, without forming O × I.

    up is (O, R) or (O, R, 1, 1), down (R, I) or (R, I, kh, kw). The singular values are split evenly between
    both. Computed in float64, returned in the dtypes of the inputs.
    Raises `Refused` for a higher rank.
    """
    q_up, r_up = torch.linalg.qr(up.flatten(1).double())  # (O, k), (k, R)
    q_down, r_down = torch.linalg.qr(down.flatten(1).double().mT)  # (I, l), (l, R)
    u, s, vh = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    if not 1 <= rank <= len(s):
        raise Refused(f"rank {rank} is not between 1 and {len(s)}, the rank of this layer; give another rank")
    root = s[:rank].sqrt()
    new_up = (q_up @ (u[:, :rank] * root)).reshape(up.shape[0], rank, *up.shape[2:])
    new_down = ((q_down @ vh[:rank].mT) * root).mT.reshape(rank, *down.shape[1:])
    error = (s[rank:].norm() / s.norm()).item() if s[0] > 0 else 0.0
    return new_up.to(up), new_down.to(down).contiguous(), error
