"""Principal directions of columns that come piece by piece, and of those left when a piece is taken away.

n: length of a column, m: directions kept. float64 throughout.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.bases.basis_file import DEPENDENT


class Side(NamedTuple):
    """Principal directions of all columns of one side."""

    vectors: Tensor  # (n, m) orthonormal
    values: Tensor  # (m,) singular values, largest first
    energy: float  # Σ of all squared singular values, also of those that are not kept

    def shares(self) -> Tensor:
        """(m,) of the energy in the first 1, 2, … directions."""
        return self.values.square().cumsum(0) / self.energy


class Sketch:
    """The columns of one side: all of them up to 2·size, then their `size` principal ones."""

    def __init__(self, size: int) -> None:
        self.size, self.energy, self.exact = size, 0.0, True
        self._columns: list[Tensor] = []  # (n, c) each

    def add(self, columns: Tensor) -> None:
        """Take in (n, c) in float64."""
        self.energy += columns.square().sum().item()
        self._columns.append(columns.contiguous())
        if sum(x.shape[1] for x in self._columns) > 2 * self.size:
            vectors, values = _principal(torch.cat(self._columns, dim=1))
            self.exact &= len(values) <= self.size
            self._columns = [(vectors * values)[:, : self.size].contiguous()]

    def side(self) -> Side:
        """What was collected, as directions whose largest entry is positive; the columns are let go."""
        vectors, values = _principal(torch.cat(self._columns, dim=1))
        self._columns.clear()
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        return Side(vectors * largest.sign(), values, self.energy)


def _principal(columns: Tensor) -> tuple[Tensor, Tensor]:
    """(n, m) orthonormal directions of (n, c) and their (m,) singular values, without those of rounding."""
    q, r = torch.linalg.qr(columns)
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    kept = s > DEPENDENT * s[0]
    return q @ u[:, kept], s[kept]


def without(side: Side, part: Tensor, share: float, count: int) -> Tensor:
    """(m, K) coordinates, among the directions of `side`, of the top `count` once one LoRA is taken away.

    `part` (r, m) is that LoRA's columns in these coordinates. diag(s²) − share·partᵀpart is the others'
    energy; exact where the sketch is.
    """
    remaining = side.values.square().diag() - share * part.T @ part
    values, vectors = torch.linalg.eigh(remaining)
    kept = (values > DEPENDENT**2 * side.values[0] ** 2).nonzero().flatten().flip(0)[:count]
    return vectors[:, kept]
