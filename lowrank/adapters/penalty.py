"""What pulls parameters during training: each is ≥ 0, and 0 at its anchor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


class Spectrum(NamedTuple):
    """A symmetric matrix M = V·diag(v)·Vᵀ + diag(d) that is ≥ 0; leading dimensions are a batch."""

    vectors: Tensor | None  # (…, N, K); None where the matrix is diagonal
    values: Tensor | None  # (…, K)
    diagonal: Tensor | None  # (…, N); None where the vectors say it all

    @property
    def main(self) -> Tensor:
        """The main diagonal of M (…, N)."""
        if self.vectors is None or self.values is None:
            assert self.diagonal is not None  # one of both is there
            return self.diagonal
        low = (self.vectors.square() * self.values[..., None, :]).sum(-1)
        return low if self.diagonal is None else low + self.diagonal

    def form(self, X: Tensor) -> Tensor:
        """Xᵀ M X (…, R, R) for X (…, N, R); M itself is never made."""
        own = None if self.diagonal is None else (X.mT * self.diagonal[..., None, :]) @ X
        if self.vectors is None or self.values is None:
            assert own is not None
            return own
        P = self.vectors.mT @ X  # (…, K, R)
        low = (P.mT * self.values[..., None, :]) @ P
        return low if own is None else low + own


def kronecker(U: Tensor, D: Tensor, S: Spectrum, G: Spectrum) -> Tensor:
    """tr(UᵀGU · DSDᵀ) (…,) of U (…, O, R), D (…, R, I): the square of U·D in the metric G ⊗ S.

    It is vec(UD)ᵀ(S ⊗ G)vec(UD) at r×r work, so that only the product U·D counts and not how it is parted.
    """
    return (G.form(U) * S.form(D.mT)).sum((-2, -1)).clamp_min(0)  # rounding alone could make it negative


def ranks_apart(U: Tensor, D: Tensor, S: Spectrum, G: Spectrum) -> Tensor:
    """Σ_r (UᵀGU)_rr (DSDᵀ)_rr (…,) with D held fixed: the diagonal Laplace of a LoRA around U = 0.

    At U = 0 the loss has no gradient in D, whose precision is therefore 0, and U_or has E[g_o²]·E[(Dx)_r²].
    """
    rows = torch.diagonal(S.form(D.detach().mT), dim1=-2, dim2=-1)
    return (torch.diagonal(G.form(U), dim1=-2, dim2=-1) * rows).sum(-1)
