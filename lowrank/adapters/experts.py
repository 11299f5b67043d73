"""Several ups behind one down, mixed per position by a router (HydraLoRA, arXiv 2404.19245; EffiLoRA).

Σₑ wₑ(x) Uₑ h is one product of R·E-wide values with the ups side by side, [U₁ | … | U_E]·(w ⊗ h), so that
nothing O-wide is made for each expert.
"""

from __future__ import annotations

from torch import Tensor


def softmax_router(h: Tensor, router: Tensor) -> Tensor:
    """Weights (…, E) of the experts for inputs h (…, K) and a router (E, K); they sum to 1."""
    return (h @ router.mT).softmax(dim=-1)


def pooled(x: Tensor) -> Tensor:
    """The mean over a sample's positions: x (B, …, K) → (B, 1, …, K), or x itself where there are none."""
    return x.mean(tuple(range(1, x.dim() - 1)), keepdim=True) if x.dim() > 2 else x


def widen(h: Tensor, weights: Tensor) -> Tensor:
    """w ⊗ h: h (…, R), weights (…, E) → (…, E·R), each expert's share of h beside the next one's."""
    return (weights.to(h.dtype)[..., None] * h[..., None, :]).flatten(-2)


def beside(ups: Tensor) -> Tensor:
    """[U₁ | … | U_E]: ups (E, O, R[, 1, 1]) → (O, E·R[, 1, 1])."""
    return ups.movedim(0, 1).flatten(1, 2)
