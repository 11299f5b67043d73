"""What pulls parameters during training: each is ≥ 0, and 0 at its anchor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def quadratic(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor], precisions: Sequence[Tensor | float]
) -> Tensor:
    """½ Σ p·(θ − θ₀)², a Gaussian prior around the anchors; precisions broadcast against the parameters."""
    terms = [
        (p * (theta - anchor).square()).sum()
        for theta, anchor, p in zip(parameters, anchors, precisions, strict=True)
    ]
    return 0.5 * torch.stack(terms).sum()


def orthogonality(matrix: Tensor) -> Tensor:
    """‖MᵀM − I‖²_F of a tall matrix (O, R), or ‖MMᵀ − I‖²_F of a wide one."""
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    return (gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)).square().sum()
