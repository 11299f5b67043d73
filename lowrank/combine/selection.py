"""K-LoRA (arXiv 2502.18461): in each layer and at each step, either the style's change or the content's.

With S = the sum of the K largest |ΔW| of a layer, γ = Σ|ΔW content| / Σ|ΔW style| over all layers, and p the
share of the noise schedule that is done, a layer uses the content while S_content/γ > (α·p + β)·S_style. The
right side grows with p, so that each layer changes over once, at a timestep of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lowrank.adapters.clock import Hook
from lowrank.adapters.layer import AdaptedLayer
from lowrank.combine.pair_sum import AttachedPairs, PairSum
from lowrank.combine.rules import RuleOptions
from lowrank.formats.delta import Delta


def top_sum(layer: Delta, count: int) -> float:
    """The sum of the `count` largest magnitudes of ΔW's elements."""
    size = layer.delta().abs().flatten()
    return float(size.topk(min(count, len(size))).values.double().sum())


def changeovers(style: PairSum, content: PairSum, options: RuleOptions) -> dict[str, float]:
    """The share p of the schedule up to which a layer of both uses the content; the style follows.

    Below 0 the layer always uses the style, above 1 always the content.
    """
    pairs = {
        name: (style.parts[name][0][1], content.parts[name][0][1])
        for name in style.parts
        if name in content.parts
    }
    sizes = [[float(layer.delta().abs().double().sum()) for layer in pair] for pair in pairs.values()]
    whole_style, whole_content = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (1.0, 1.0)
    gamma = whole_content / whole_style if whole_style else 1.0
    ends = {}
    for name, (first, second) in pairs.items():
        count = options.top or first.rank * second.rank
        ours, theirs = top_sum(first, count), top_sum(second, count)
        share = theirs / (gamma * ours) if gamma * ours else float("inf")
        ends[name] = (share - options.beta) / options.alpha
    return ends


class Choice(NamedTuple):
    """A layer of the style (0) or the content (1), and the share of the schedule where the style begins."""

    position: int
    layer: AdaptedLayer
    end: float


class Selection:
    """Strengths of layers that follow the timestep. A clock for `adapters.clock.Hook`."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.timestep: Tensor | None = None
        self.steps: Callable[[], Tensor | None] = lambda: None
        self.weights: Sequence[float] = (0.0, 0.0)
        self._choices = list(choices)
        self.set(None)

    def set(self, timestep: Tensor | None) -> None:
        """Choose for timesteps (B,) in 0..1000; without one, the layers' changes are off."""
        self.timestep = timestep
        done = None if timestep is None else 1 - timestep.double() / 1000
        for position, layer, end in self._choices:
            if done is None:
                layer.multiplier = 0.0
                continue
            uses = done >= end if position == 0 else done < end
            shares = self.weights[position] * uses.double()
            layer.multiplier = float(shares[0]) if (shares == shares[0]).all() else shares


class AttachedSelection:
    """A style and a content adapter on a model, one of them in each layer of the denoiser at each step.

    Layers that only one of them has are always on, and so are those of text encoders.
    """

    def __init__(
        self, style: AttachedPairs, content: AttachedPairs, denoiser: nn.Module, options: RuleOptions
    ) -> None:
        ends = changeovers(style.pairs, content.pairs, options)
        inside = set(map(id, denoiser.modules()))
        self._always: list[tuple[int, AdaptedLayer]] = []
        choices = []
        for position, attached in enumerate((style, content)):
            attached.set((1.0,))
            for name, layer in attached.layers():
                if name in ends and id(layer.host) in inside:
                    choices.append(Choice(position, layer, ends[name]))
                else:
                    self._always.append((position, layer))
        self.selection = Selection(choices)
        self._hook = Hook(denoiser, self.selection)
        self.weigh((0.0, 0.0))

    def weigh(self, weights: Sequence[float]) -> None:
        """Set the strengths of both adapters."""
        self.selection.weights = tuple(weights)
        for position, layer in self._always:
            layer.multiplier = weights[position]

    def restore(self) -> None:
        """Remove the hook."""
        self._hook.remove()
