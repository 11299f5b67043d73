"""Experts: several ups with one down, mixed by a router (HydraLoRA, arXiv 2404.19245; EffiLoRA, 2512.00878).

Σₑ wₑ(x) Uₑ h is computed as one product, [U₁ | … | U_E]·(w ⊗ h), so that no O-wide tensor is made per expert.
"""

from __future__ import annotations

from torch import Tensor


def softmax_router(h: Tensor, router: Tensor) -> Tensor:
    """Return the weights (…, E) of the experts, which sum to 1, for inputs h (…, K) and a router (E, K)."""
    return (h @ router.mT).softmax(dim=-1)


def pooled(x: Tensor) -> Tensor:
    """Average over the tokens of a sample: x (B, …, K) → (B, 1, …, K); a 2-d x is returned unchanged."""
    return x.mean(tuple(range(1, x.dim() - 1)), keepdim=True) if x.dim() > 2 else x


def mixed_hidden(h: Tensor, weights: Tensor) -> Tensor:
    """Return w ⊗ h (…, E·R), the blocks wₑ·h side by side, for h (…, R) and weights (…, E)."""
    return (weights.to(h.dtype)[..., None] * h[..., None, :]).flatten(-2)


def stacked_ups(ups: Tensor) -> Tensor:
    """Concatenate ups to [U₁ | … | U_E]: ups (E, O, R[, 1, 1]) → (O, E·R[, 1, 1])."""
    return ups.movedim(0, 1).flatten(1, 2)
