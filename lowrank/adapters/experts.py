"""Several ups behind one down, mixed per position by a router (HydraLoRA, arXiv 2404.19245; EffiLoRA)."""

from __future__ import annotations

from torch import Tensor, einsum


def softmax_router(h: Tensor, router: Tensor) -> Tensor:
    """Weights (…, E) of the experts for inputs h (…, K) and a router (E, K); they sum to 1."""
    return einsum("...k,ek->...e", h, router).softmax(dim=-1)


def mixture(h: Tensor, ups: Tensor, weights: Tensor) -> Tensor:
    """Σₑ wₑ(x) Uₑ h: h (…, R), ups (E, O, R), weights (…, E) → (…, O)."""
    return einsum("...r,eor,...e->...o", h, ups, weights)
