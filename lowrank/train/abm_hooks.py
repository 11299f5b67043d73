"""Pre-activations: where a model has them, what a teacher's are, and how far from them a student's are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# By class the children whose output goes into a nonlinearity; True where only its second half does.
PREACTIVATIONS: Mapping[str, Mapping[str, bool]] = {
    "GEGLU": {"proj": True},  # U-Nets' feed-forward: value, gate
    "GELU": {"proj": False},  # FLUX's feed-forward in double blocks
    "FluxSingleTransformerBlock": {"proj_mlp": False},
    "ResnetBlock2D": {"norm1": False, "norm2": False},
    "UNet2DConditionModel": {"conv_norm_out": False},
    "TimestepEmbedding": {"linear_1": False},
    "PixArtAlphaTextProjection": {"linear_1": False},  # FLUX's pooled text
    "CLIPMLP": {"fc1": False},
}


def hinge(z: Tensor, positive: Tensor, margin: Tensor | float) -> Tensor:
    """mean max(0, m − τ z)², a scalar in fp32; τ is 1 where `positive` and −1 elsewhere; z of any shape."""
    return (margin - torch.where(positive, z, -z).float()).clamp_min(0).square().mean()


def depth_weights(count: int, strategy: str) -> list[float]:
    """w_l of `count` layers, shallowest first: 1, (l+1)/L, or ((l+1)/L)²."""
    power = {"uniform": 0, "linear": 1, "quadratic": 2}[strategy]
    return [((index + 1) / count) ** power for index in range(count)]


# ------------------------------------------------------------------ pre-activations


class Activation(NamedTuple):
    """Where a pre-activation is: the output of `module`, or its second half."""

    name: str
    module: nn.Module
    half: bool

    def read(self, out: Tensor) -> Tensor:
        return out.chunk(2, dim=-1)[1] if self.half else out


def activations(part: str, root: nn.Module) -> list[Activation]:
    """Every pre-activation of a model, by `PREACTIVATIONS`."""
    return [
        Activation(f"{part}.{path}.{child}", inner, half)
        for path, owner in root.named_modules()
        for child, half in PREACTIVATIONS.get(type(owner).__name__, {}).items()
        if isinstance(inner := getattr(owner, child, None), nn.Module)
    ]


class _Stop(Exception):
    """The last pre-activation is known; the rest of the forward is not needed."""


@dataclass
class Boundaries:
    """Hooks on pre-activations: what the teacher's are, and how far from them the student's are.

    A layer's loss is computed where the layer runs, so that under gradient checkpointing nothing is kept and
    all is computed again in the backward, whose calls are not counted a second time.
    """

    places: Sequence[Activation]
    margin: float
    relative: bool
    weights: Mapping[str, float] = field(default_factory=dict)  # none: survey
    _aims: dict[str, tuple[Tensor, Tensor | float]] = field(default_factory=dict)  # signs, margins
    _values: dict[str, Tensor] | None = None  # by name in order of the forward; None: do not count
    _mode: str = "off"

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        handles = [place.module.register_forward_hook(partial(self._see, place)) for place in self.places]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def during(self, mode: str, forward: Callable[[], Any]) -> dict[str, Tensor]:
        """What a forward shows, by place in the order it reaches them.

        "survey": whether a trained parameter is before it; "teach" and "learn": remember, and compare with
        what was remembered, up to the last place; "count": the share of signs that differ, to the end.
        """
        self._mode, self._values = mode, {}
        with contextlib.suppress(_Stop):
            forward()
        values, self._values = self._values, None
        return values

    def _see(self, place: Activation, _module: nn.Module, _arguments: tuple, out: Tensor) -> None:
        z, name = place.read(out), place.name
        if self._mode == "survey":
            value = torch.tensor(z.requires_grad)
        elif self._mode == "teach":
            value = z.detach()
            median = value.abs().float().median() if self.relative else 1.0
            self._aims[name] = value > 0, self.margin * median
        elif self._mode == "count":
            value = ((z > 0) != self._aims[name][0]).float().mean()
        else:
            value = self.weights[name] * hinge(z, *self._aims[name])
        if self._values is None:  # a recomputation
            return
        self._values[name] = value
        if self._mode in ("teach", "learn") and len(self._values) == len(self.places):
            raise _Stop
