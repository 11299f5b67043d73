"""Singular components of a weight: where T-LoRA's orthogonal factors start (arXiv 2507.05964)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PARTS = ("principal", "middle", "last")  # of singular components, largest first


def component_slice(sig_type: str, count: int, rank: int) -> slice:
    """Return the slice of `rank` of `count` singular components, largest first, that `sig_type` selects.

    "middle" begins at ⌈(count − rank)/2⌉, as in the authors' code.
    """
    begin = {"principal": 0, "middle": math.ceil((count - rank) / 2), "last": count - rank}[sig_type]
    return slice(begin, begin + rank)


def singular_components(weight: Tensor, sig_type: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return P (O, R), Λ (R,), Q (R, I): singular components of W (O, I), by the SVD that LyCORIS computes.

    If rank > min(O, I), which only LyCORIS' files have, all components are returned, padded with zeros.
    """
    P, S, Q = torch.linalg.svd(weight.float(), full_matrices=False)
    if len(S) < rank:
        more = rank - len(S)
        return F.pad(P, (0, more)), F.pad(S, (0, more)), F.pad(Q, (0, 0, 0, more))
    chosen = component_slice(sig_type, len(S), rank)
    return P[:, chosen], S[chosen], Q[chosen]
