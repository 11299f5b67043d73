"""Forward hooks that record a teacher's pre-activations and compare a student's with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# class -> children whose output enters a nonlinearity; True: only the second half of the output does
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
    """A pre-activation: the output of `module`, or its second half."""

    name: str
    module: nn.Module
    half: bool

    def read(self, out: Tensor) -> Tensor:
        return out.chunk(2, dim=-1)[1] if self.half else out


def activations(part: str, root: nn.Module) -> list[Activation]:
    """List the pre-activations of a model by `PREACTIVATIONS`."""
    return [
        Activation(f"{part}.{path}.{child}", inner, half)
        for path, owner in root.named_modules()
        for child, half in PREACTIVATIONS.get(type(owner).__name__, {}).items()
        if isinstance(inner := getattr(owner, child, None), nn.Module)
    ]


class _Stop(Exception):
    """Ends a forward after its last pre-activation."""


@dataclass
class Boundaries:
    """Hooks that record the teacher's pre-activations and compute the student's loss against them.

    The loss of a layer is computed inside its forward. Gradient checkpointing therefore keeps no activation
    and computes the loss again in the backward; such repeated calls are not counted.
    """

    places: Sequence[Activation]
    margin: float
    relative: bool
    weights: Mapping[str, float] = field(default_factory=dict)  # empty during the survey
    _aims: dict[str, tuple[Tensor, Tensor | float]] = field(default_factory=dict)  # signs, margins
    _values: dict[str, Tensor] | None = (
        None  # by name in the order of the forward; None: no forward is recorded
    )
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
        """Run a forward and return one value per activation, in the order of the forward.

        "survey": whether a trained parameter comes before it. "teach": record the teacher, "learn": the loss
        against the record; both end the forward after the last activation. "count": the share of differing
        signs, with the complete forward.
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
