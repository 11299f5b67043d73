"""Penalties on parameters: terms added to the loss, each ≥ 0 and 0 at its anchor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def quadratic(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor], precisions: Sequence[Tensor | float]
) -> Tensor:
    """Return ½ Σ p·(θ − θ₀)², a Gaussian prior around the anchors; precisions are broadcast."""
    terms = [
        (p * (theta - anchor).square()).sum()
        for theta, anchor, p in zip(parameters, anchors, precisions, strict=True)
    ]
    return 0.5 * torch.stack(terms).sum()


class Spectrum(NamedTuple):
    """A symmetric positive semidefinite matrix M = V·diag(v)·Vᵀ + diag(d); leading dimensions are a batch."""

    vectors: Tensor | None  # (…, N, K); None if the matrix is diagonal
    values: Tensor | None  # (…, K)
    diagonal: Tensor | None  # (…, N); None if d = 0

    @property
    def main(self) -> Tensor:
        """The main diagonal of M (…, N)."""
        if self.vectors is None or self.values is None:
            assert self.diagonal is not None  # vectors or diagonal is given
            return self.diagonal
        low = (self.vectors.square() * self.values[..., None, :]).sum(-1)
        return low if self.diagonal is None else low + self.diagonal

    def form(self, X: Tensor) -> Tensor:
        """Return Xᵀ M X (…, R, R) for X (…, N, R), without forming M."""
        diagonal = None if self.diagonal is None else (X.mT * self.diagonal[..., None, :]) @ X
        if self.vectors is None or self.values is None:
            assert diagonal is not None
            return diagonal
        P = self.vectors.mT @ X  # (…, K, R)
        low = (P.mT * self.values[..., None, :]) @ P
        return low if diagonal is None else low + diagonal


def kronecker(U: Tensor, D: Tensor, S: Spectrum, G: Spectrum) -> Tensor:
    """Return tr(UᵀGU · DSDᵀ) (…,) for U (…, O, R), D (…, R, I): the squared norm of U·D in the metric S ⊗ G.

    It equals vec(UD)ᵀ(S ⊗ G)vec(UD), computed with r×r matrices, and depends on the product U·D only.
    """
    return (G.form(U) * S.form(D.mT)).sum((-2, -1)).clamp_min(0)  # rounding can make it negative


def ranks_apart(U: Tensor, h: Tensor, G: Spectrum) -> Tensor:
    """Return Σ_r (UᵀGU)_rr·h_r (…,) for U (…, O, R) and h (…, R), where h_r = E[(D₀x)_r²].

    The penalty of U alone, rank by rank, at the D₀ where training starts: the diagonal of U's curvature in
    Kronecker factors. At U = 0 the loss has no gradient in D, so D has none.
    """
    return (torch.diagonal(G.form(U), dim1=-2, dim2=-1) * h).sum(-1)
