"""Warm-up stages before step 0: they read the run's batches and change only the adapter's values.

They run once, after --network_weights are loaded, and never in a resumed run, whose checkpoint holds what
they made. Their noise is drawn from streams of their own (decision 4), so that a run trains on what it would
have trained on without them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from lowrank.adapters.method import Warmup, WarmupBatches
from lowrank.adapters.network import AdapterNetwork
from lowrank.config.flags_training import Abm
from lowrank.data.loader import Batch
from lowrank.train.loop import Run, batch_generator

logger = logging.getLogger(__name__)

NOISE = -1000  # a stage's noise in its epoch e is that of epoch NOISE − e, which nothing else draws


def stage_names(network: Any, abm: Abm) -> tuple[str, ...]:
    """The names of the stages, in the order they run: the method's own, then ABM."""
    stages = tuple(stage.name for stage in _network_stages(network))
    return (*stages, abm_name(abm)) if abm.abm_enabled else stages


def abm_name(abm: Abm) -> str:
    return f"ABM, {abm.abm_steps} steps, teacher {abm.abm_teacher}"


def _network_stages(network: Any) -> tuple[Warmup, ...]:
    return network.method.warmup if isinstance(network, AdapterNetwork) else ()


def warm_up(run: Run, abm: Warmup | None) -> None:
    """Run the method's stages, then ABM. Raises `Refused` as they do."""
    stages = (*_network_stages(run.network), *([abm] if abm else []))
    for stage in stages:
        run.log.message(f"warm-up: {stage.name}")
        with _left_as_it_was(run):
            stage.run(run.network, samples(run))
            _agree(run)


def training_batches(run: Run) -> Iterator[Batch]:
    """The training's batches of this process, epoch after epoch without end."""
    for epoch in itertools.count():
        yield from run.batches(epoch)


def noise(run: Run, batch: Batch) -> torch.Generator:
    """The stream of a batch in a stage; torch's global one is seeded too, for dropout."""
    return batch_generator(run.seed, NOISE - batch.epoch, batch.position)


def samples(run: Run) -> WarmupBatches:
    """The batches, losses and logging that a stage gets from a run."""
    accelerator = run.accelerator

    def losses(batch: Batch) -> Callable[[], Tensor]:
        weights = batch.loss_weights.to(accelerator.device)
        return lambda: run.forward.losses(batch, noise(run, batch))[0] * weights

    def total(tensor: Tensor) -> Tensor:
        summed: Any = accelerator.reduce(tensor, "sum")
        return summed

    return WarmupBatches(
        batches=lambda: map(losses, training_batches(run)),
        total=total,
        processes=accelerator.num_processes,
        log=lambda values, step: log(run, values, step),
        scaled=accelerator.scaler is not None,
        progress=accelerator.is_main_process,
    )


def log(run: Run, values: Mapping[str, float], step: int) -> None:
    """Scalars for the trackers, under the stage's own steps."""
    run.accelerator.log({f"warm-up/{name}": value for name, value in values.items()}, step=step)


@contextlib.contextmanager
def _left_as_it_was(run: Run) -> Iterator[None]:
    """Restore random streams, gradients, training mode and requires_grad after a stage."""
    network: nn.Module = run.network
    training, trained = network.training, [p.requires_grad for p in network.parameters()]
    on_gpu = run.accelerator.device.type == "cuda"
    with torch.random.fork_rng([run.accelerator.device.index or 0] if on_gpu else []):
        network.train()
        try:
            yield
        finally:
            network.train(training)
            network.zero_grad(set_to_none=True)
            for parameter, was in zip(network.parameters(), trained, strict=True):
                parameter.requires_grad_(was)


@torch.no_grad()
def _agree(run: Run) -> None:
    """Give every process the values of the first one, bit for bit."""
    if run.accelerator.num_processes > 1:
        for tensor in (*run.network.parameters(), *run.network.buffers()):
            value: Any = broadcast(tensor.detach().clone())
            tensor.copy_(value)
