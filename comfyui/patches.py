"""A weight patch for ComfyUI: the sum of what several adapters change in one weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import comfy.weight_adapter
import torch
from torch import Tensor

from lowrank.adapters.magnitude import row_norm
from lowrank.formats.delta import Delta
from lowrank.formats.foreign import ForeignLayer

Change: TypeAlias = Delta | ForeignLayer


class Sum(comfy.weight_adapter.WeightAdapterBase):
    """W ← W + strength·Σ share·(W′ − W), every W′ from the same W.

    W′ of DoRA is m/‖W + ΔW‖·(W + ΔW), by the norm of each output row (arXiv 2402.09353, eq. 5). ComfyUI's own
    patch divides by ‖W‖ instead, and a second DoRA patch by the norm of what the first one changed.
    """

    name = "lowrank_sum"

    def __init__(self, parts: Sequence[tuple[Change, float]]) -> None:
        self.loaded_keys, self.parts = set(), list(parts)
        self.weights = tuple(value for part, _ in parts for value in _tensors(part))

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Callable[[Tensor], Tensor],
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        W = weight.float()
        change = sum(share * change_of(part, W) for part, share in self.parts)
        # in place: the weight may be a part of a larger one
        weight += function(strength * change).to(weight.dtype)
        return weight


def _tensors(part: Change) -> list[Tensor]:
    if isinstance(part, ForeignLayer):
        return list(part.tensors.values())
    return [part.up, part.down, *(() if part.magnitude is None else (part.magnitude,))]


def change_of(part: Change, W: Tensor) -> Tensor:
    """W′ − W in the shape of W."""
    if isinstance(part, ForeignLayer):
        on_device = replace(part, tensors={name: value.to(W.device) for name, value in part.tensors.items()})
        change = on_device.change(W)
        assert change is not None  # layers that change only a bias are patched apart
        return change
    up, down = (value.to(W.device, torch.float32) for value in (part.up, part.down))
    change = part.scale * (up @ down)
    if part.magnitude is not None:
        rows = W.flatten(1)
        norm = row_norm(rows, up, down, part.scale)
        g = (part.magnitude.to(rows) / norm.masked_fill(norm == 0, 1))[:, None]
        change = (g - 1) * rows + g * change
    return change.reshape(W.shape)
