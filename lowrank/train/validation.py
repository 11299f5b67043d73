"""Validation loss: images, noise and timesteps are equal each time, so that only the adapter changes it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lowrank.config.flags_output import Validation
from lowrank.data.loader import Batch, Loader
from lowrank.train.loop import batch_generator
from lowrank.train.watch import evaluation_mode

PLACES = (0.2, 0.4, 0.6, 0.8)  # in the range of noise levels, as kohya's


@dataclass(frozen=True, kw_only=True)
class ValidationLoss:
    """Which images are measured and when. `loader` has the batches of all processes."""

    loader: Loader
    losses: Callable[[Batch, torch.Generator, float], tuple[Tensor, Tensor]]
    seed: int
    every_steps: int | None
    every_epochs: int | None
    limit: int | None = None  # batches

    def due(self, *, epoch: int | None = None, step: int | None = None) -> bool:
        """Whether to measure after this epoch (from 1) or step; without either number, after each epoch."""
        if step is not None:
            return bool(self.every_steps) and step % self.every_steps == 0
        every = self.every_epochs or (None if self.every_steps else 1)
        return bool(every) and epoch is not None and epoch % every == 0

    @torch.no_grad()
    def measure(self, accelerator: Accelerator, network: nn.Module) -> float:
        """The mean loss over images and `PLACES`, over all processes."""
        rank, world = accelerator.process_index, accelerator.num_processes
        sums = torch.zeros(2, device=accelerator.device)
        with evaluation_mode(network):
            for index, batch in enumerate(itertools.islice(self.loader.epoch(0), self.limit)):
                if index % world != rank:
                    continue
                for number, place in enumerate(PLACES):
                    generator = batch_generator(self.seed, -1 - number, batch.position)
                    losses, _ = self.losses(batch, generator, place)
                    sums += torch.stack([losses.sum().float(), torch.tensor(len(losses)).to(sums)])
        total, count = accelerator.reduce(sums, "sum").tolist()  # pyright: ignore[reportAttributeAccessIssue]
        return total / count


def held_out_loss(
    options: Validation,
    loader: Loader | None,
    losses: Callable[[Batch, torch.Generator, float], tuple[Tensor, Tensor]],
    seed: int,
) -> ValidationLoss | None:
    """What a run measures, and when; None where no image is held out."""
    if loader is None:
        return None
    return ValidationLoss(
        loader=loader,
        losses=losses,
        seed=seed if options.validation_seed is None else options.validation_seed,
        every_steps=options.validate_every_n_steps,
        every_epochs=options.validate_every_n_epochs,
        limit=options.max_validation_steps,
    )
