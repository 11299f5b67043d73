"""Validation loss: with the same images, noise and timesteps each time, only the adapter changes it."""

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

NOISE_LEVELS = (0.2, 0.4, 0.6, 0.8)  # shares of the range of timesteps, as in kohya's scripts


@dataclass(frozen=True, kw_only=True)
class ValidationLoss:
    """The images to measure, and when. `loader` has the batches of all processes."""

    loader: Loader
    losses: Callable[[Batch, torch.Generator, float], tuple[Tensor, Tensor]]
    seed: int
    every_steps: int | None = None
    every_epochs: int | None = None
    limit: int | None = None  # batches
    together: bool = False  # every process measures every batch, because they share one sharded model

    @torch.no_grad()
    def measure(self, accelerator: Accelerator, network: nn.Module) -> float:
        """The mean loss over images and `NOISE_LEVELS`, over all processes."""
        rank, world = (0, 1) if self.together else (accelerator.process_index, accelerator.num_processes)
        sums = torch.zeros(2, device=accelerator.device)
        with evaluation_mode(network):
            for index, batch in enumerate(itertools.islice(self.loader.epoch(0), self.limit)):
                if index % world != rank:
                    continue
                for number, level in enumerate(NOISE_LEVELS):
                    generator = batch_generator(self.seed, -1 - number, batch.position)
                    losses, _ = self.losses(batch, generator, level)
                    sums += torch.stack([losses.sum().float(), torch.tensor(len(losses)).to(sums)])
        total, count = accelerator.reduce(sums, "sum").tolist()  # pyright: ignore[reportAttributeAccessIssue]
        return total / count


def validation_loss(
    options: Validation,
    loader: Loader | None,
    losses: Callable[[Batch, torch.Generator, float], tuple[Tensor, Tensor]],
    seed: int,
    together: bool = False,
) -> ValidationLoss | None:
    """The validation loss of a run, by default after every epoch; None if no image is held out."""
    if loader is None:
        return None
    return ValidationLoss(
        loader=loader,
        losses=losses,
        seed=seed if options.validation_seed is None else options.validation_seed,
        every_steps=options.validate_every_n_steps,
        every_epochs=options.validate_every_n_epochs or (None if options.validate_every_n_steps else 1),
        limit=options.max_validation_steps,
        together=together,
    )
