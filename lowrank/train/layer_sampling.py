"""Train only some layers in each step, drawn by importance (the Reducer of EffiLoRA).

Paper: arXiv 2512.00878. The importance s of a layer is the mean relative rise of a fixed loss in the probes
that suppressed the layer. A probe suppresses layers drawn by σ(−z), and a step trains layers drawn by σ(z),
both without replacement; z is s in standard deviations from its mean over the layers, 0 for layers without a
probe. The paper always probes the least important layers together, so that they always get equal values;
here each probe draws another set. The draw depends only on (seed, step) and s (decision 4), and
checkpoints keep s, so that a resumed run draws the same layers.
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
from lowrank.files import read_json
from lowrank.train.loop import Forward, batch_generator
from lowrank.train.validation import ValidationLoss

FILE = "importance.json"
LEARNING, PROBED = -10, -11  # epochs of the random streams; no other draw uses them
MEMORY = 0.8  # weight of the previous importance at each probe; not in the paper


class LayerSampler:
    """Removes the gradients of layers that a step does not train, and measures importance at intervals."""

    def __init__(
        self, updates: Updates, network: AdapterNetwork, validation: ValidationLoss, accelerator: Accelerator
    ) -> None:
        self._updates, self._network, self._validation, self._accelerator = (
            updates,
            network,
            validation,
            accelerator,
        )
        self._layers = {layer.name: layer for layer in network.layers()}
        self.importance: dict[str, float] = {}  # s by layer, of those with a probe

    def learning(self, step: int) -> set[str]:
        """The names of the layers that a step (from 0) trains."""
        count = max(1, round(self._updates.share * len(self._layers)))
        return self._drawn(LEARNING, step, count, 1.0)

    def mask_gradients(self, step: int) -> dict[str, float]:
        """Probe if it is due and remove the gradients of layers that this step does not train.

        Called after the backward of a step. Returns scalars to log.
        """
        scalars = self.probe(step) if step and step % self._updates.every == 0 else {}
        for name in self._layers.keys() - self.learning(step):
            self._layers[name].roles()[self._updates.role].grad = None  # optimizers skip it
        return scalars

    @torch.no_grad()
    def probe(self, step: int) -> dict[str, float]:
        """Suppress some layers, measure the rise of the loss, and update the importance of those layers."""
        updates, validation = self._updates, self._validation
        chosen = self._drawn(PROBED, step, max(1, min(updates.probed, len(self._layers) // 2)), -1.0)
        full = validation.measure(self._accelerator, self._network)
        with suppressed((self._layers[name] for name in sorted(chosen)), updates.suppressed_share):
            after = validation.measure(self._accelerator, self._network)
        rise = (after - full) / full
        for name in sorted(chosen) if math.isfinite(rise) else ():  # a loss in fp16 may overflow
            before = self.importance.get(name)
            self.importance[name] = rise if before is None else MEMORY * before + (1 - MEMORY) * rise
        return {"updates/loss_rise": rise}

    def _drawn(self, epoch: int, step: int, count: int, sign: float) -> set[str]:
        names = list(self._layers)
        generator = batch_generator(self._validation.seed, epoch, step)
        odds = torch.sigmoid(sign * _standard([self.importance.get(name) for name in names]))
        return {names[i] for i in torch.multinomial(odds, count, generator=generator).tolist()}

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(self.importance, indent=1))

    def load(self, folder: Path) -> None:
        self.importance = read_json(folder / FILE, "the importance of layers", way_out="use another state")


def _standard(values: list[float | None]) -> Tensor:
    """z (L,) in float64: standard deviations from the mean; 0 for None and where all values are equal."""
    known = [value for value in values if value is not None] or [0.0]
    spread, mean = pstdev(known), fmean(known)
    return torch.tensor(
        [0.0 if value is None or not spread else (value - mean) / spread for value in values],
        dtype=torch.float64,
    )


@contextlib.contextmanager
def suppressed(layers: Iterable[AdaptedLayer], share: float) -> Iterator[None]:
    """Scale the multipliers of layers by `share` for a block."""
    before = [(layer, layer.multiplier) for layer in layers]
    for layer, multiplier in before:
        layer.multiplier = share * multiplier
    try:
        yield
    finally:
        for layer, multiplier in before:
            layer.multiplier = multiplier


def layer_sampler(
    network: object,
    forward: Forward,
    held_out: Loader | None,
    training: Loader,
    seed: int,
    together: bool = False,
) -> LayerSampler | None:
    """The layer sampler of a method with `updates`, else None; it measures one batch, preferably held out."""
    if not isinstance(network, AdapterNetwork) or network.method.updates is None:
        return None
    measured = training.shard(0, 1) if held_out is None else held_out
    fixed = ValidationLoss(loader=measured, losses=forward.losses, seed=seed, limit=1, together=together)
    return LayerSampler(network.method.updates, network, fixed, forward.accelerator)
