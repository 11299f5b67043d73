"""The length of each output row, set free (DoRA, arXiv 2402.09353, eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor


def row_norm(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """‖W + s·U·D‖ per output row, (O,), without forming W + s·U·D.

    W (O, I), U (O, R), D (R, I). The largest new tensor is (O, R), because
    ‖w + s·uD‖² = ‖w‖² + 2s·⟨wDᵀ, u⟩ + s²·u(DDᵀ)uᵀ.
    """
    own = torch.linalg.vector_norm(weight, dim=1).square()  # (O,)
    cross = ((weight @ down.T) * up).sum(1)  # (O,)
    square = ((up @ (down @ down.T)) * up).sum(1)  # (O,)
    return (own + 2 * scale * cross + scale**2 * square).clamp_min(0).sqrt()


def in_peft_shape(magnitude: Tensor) -> Tensor:
    """m as PEFT's files hold it: (O, 1) as (O,), and (O, 1, 1, 1) of a convolution as (1, O, 1, 1)."""
    return magnitude.flatten() if magnitude.dim() == 2 else magnitude.transpose(0, 1)
