"""Which layers learn in a step: some, drawn by how much a fixed loss needs them (EffiLoRA's Reducer).

Paper: arXiv 2512.00878. Importance s is the mean of what the held-out loss rose by, in shares of itself, in
the probes that a layer was part of. A probe suppresses layers drawn by σ(−z), and a step trains layers drawn
by σ(z), both without replacement; z is s in standard deviations from its mean over the layers, 0 for those
that no probe has met. The paper probes the least important layers alone, which then rise and fall together;
drawn layers meet others in each probe. What is drawn depends on (seed, step) and s only (decision 4), and s
is kept in the checkpoints, so a resumed run draws what the whole one would have.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean, pstdev

import torch
from accelerate import Accelerator
from torch import Tensor

from lowrank.adapters.layer import AdaptedLayer
from lowrank.adapters.method import Updates
from lowrank.adapters.network import AdapterNetwork
from lowrank.data.loader import Loader
from lowrank.train.loop import Forward, batch_generator
from lowrank.train.validation import ValidationLoss

FILE = "importance.json"
LEARNING, PROBED = -10, -11  # draws are those of these epochs, which nothing else draws
MEMORY = 0.8  # of the importance at each probe; not in the paper


class LayerSampler:
    """Lets the gradients of a step through where its layer was drawn, and probes now and then."""

    def __init__(
        self, updates: Updates, network: AdapterNetwork, held: ValidationLoss, accelerator: Accelerator
    ) -> None:
        self._updates, self._network, self._held, self._accelerator = updates, network, held, accelerator
        self._layers = {layer.name: layer for layer in network.layers()}
        self.importance: dict[str, float] = {}  # s by layer, of those that a probe has met

    def learning(self, step: int) -> set[str]:
        """The layers that learn in a step (from 0)."""
        count = max(1, round(self._updates.share * len(self._layers)))
        return self._drawn(LEARNING, step, count, 1.0)

    def let_through(self, step: int) -> dict[str, float]:
        """After a step's backward: probe if it is due, drop the gradients of layers that were not drawn.

        Returns what there is to log.
        """
        scalars = self.probe(step) if step and step % self._updates.every == 0 else {}
        for name in self._layers.keys() - self.learning(step):
            self._layers[name].roles()[self._updates.role].grad = None  # optimizers pass over it
        return scalars

    @torch.no_grad()
    def probe(self, step: int) -> dict[str, float]:
        """Measure what the loss rises by when some layers are suppressed, and remember it as theirs."""
        updates, held = self._updates, self._held
        chosen = self._drawn(PROBED, step, max(1, min(updates.probed, len(self._layers) // 2)), -1.0)
        before = held.measure(self._accelerator, self._network)
        with faint((self._layers[name] for name in sorted(chosen)), updates.faint):
            after = held.measure(self._accelerator, self._network)
        rise = (after - before) / before
        for name in sorted(chosen) if math.isfinite(rise) else ():  # in fp16 a loss may overflow
            had = self.importance.get(name)
            self.importance[name] = rise if had is None else MEMORY * had + (1 - MEMORY) * rise
        return {"updates/loss_rise": rise}

    def _drawn(self, epoch: int, step: int, count: int, sign: float) -> set[str]:
        names = list(self._layers)
        generator = batch_generator(self._held.seed, epoch, step)
        odds = torch.sigmoid(sign * _standard([self.importance.get(name) for name in names]))
        return {names[i] for i in torch.multinomial(odds, count, generator=generator).tolist()}

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(self.importance, indent=1))

    def load(self, folder: Path) -> None:
        self.importance = json.loads((folder / FILE).read_text())


def _standard(values: list[float | None]) -> Tensor:
    """z (L,) in float64: standard deviations from the mean, 0 for None and where all are alike."""
    known = [value for value in values if value is not None]
    spread = pstdev(known) if known else 0.0
    mean = fmean(known) if known else 0.0
    return torch.tensor(
        [0.0 if value is None or not spread else (value - mean) / spread for value in values],
        dtype=torch.float64,
    )


@contextlib.contextmanager
def faint(layers: Iterable[AdaptedLayer], share: float) -> Iterator[None]:
    """The layers at a share of their strength for a block."""
    before = [(layer, layer.multiplier) for layer in layers]
    for layer, multiplier in before:
        layer.multiplier = share * multiplier
    try:
        yield
    finally:
        for layer, multiplier in before:
            layer.multiplier = multiplier


def layer_sampler(
    network: object, forward: Forward, held: Loader | None, training: Loader, seed: int
) -> LayerSampler | None:
    """The sampler that a network's method asks for, if any; it measures one batch, held out if any is."""
    if not isinstance(network, AdapterNetwork) or network.method.updates is None:
        return None
    measured = training.shard(0, 1) if held is None else held
    fixed = ValidationLoss(
        loader=measured, losses=forward.losses, seed=seed, every_steps=None, every_epochs=None, limit=1
    )
    return LayerSampler(network.method.updates, network, fixed, forward.accelerator)
