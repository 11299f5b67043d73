"""The length of each output row, set free (DoRA, arXiv 2402.09353, eq. 5)."""

from __future__ import annotations

from torch import Tensor


def row_norm(weight: Tensor, up: Tensor, down: Tensor, scale: float | Tensor) -> Tensor:
    """‖W + s·U·D‖ per output row, (O,), without forming W + s·U·D.

    W (O, I), U (O, R), D (R, I). The largest new tensor is (O, R), because
    ‖w + s·uD‖² = ‖w‖² + 2s·⟨wDᵀ, u⟩ + s²·u(DDᵀ)uᵀ.
    """
    cross = ((weight @ down.T) * up).sum(1)  # (O,)
    square = ((up @ (down @ down.T)) * up).sum(1)  # (O,)
    return (weight.square().sum(1) + 2 * scale * cross + scale**2 * square).clamp_min(0).sqrt()
