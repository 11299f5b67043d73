"""DoRA's magnitude: a trained length of each output row (arXiv 2402.09353, eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor


def row_norm(weight: Tensor, up: Tensor, down: Tensor, scale: float, squares: Tensor | None = None) -> Tensor:
    """Return ‖W + s·U·D‖ per output row, (O,), without forming W + s·U·D.

    W (O, I), U (O, R), D (R, I). The largest new tensor is (O, R):
    ‖w + s·uD‖² = ‖w‖² + 2s·⟨wDᵀ, u⟩ + s²·u(DDᵀ)uᵀ. `squares` (O,) are ‖w‖² if they are known: those of the
    weight before it was quantised, so that m is a length of the rows that the adapter is used with.
    """
    base = torch.linalg.vector_norm(weight, dim=1).square() if squares is None else squares  # (O,)
    cross = ((weight @ down.T) * up).sum(1)  # (O,)
    square = ((up @ (down @ down.T)) * up).sum(1)  # (O,)
    return (base + 2 * scale * cross + scale**2 * square).clamp_min(0).sqrt()


def in_peft_shape(magnitude: Tensor) -> Tensor:
    """Return m in the shape of PEFT's files: (O, 1) as (O,), or (O, 1, 1, 1) as (1, O, 1, 1)."""
    return magnitude.flatten() if magnitude.dim() == 2 else magnitude.transpose(0, 1)
