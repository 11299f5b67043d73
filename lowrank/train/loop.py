"""The training loop: draw noise, predict, compare, step.

Randomness is stateless: the noise, timestep and dropout of a batch depend only on (seed, epoch, position), so
a resumed run, another number of processes, or a validation in between changes nothing.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch import Tensor, nn

from lowrank.data.loader import Batch, Loader
from lowrank.errors import Refused
from lowrank.models.family import Models
from lowrank.objective.objective import Draw, Objective
from lowrank.train.checkpoints import Progress
from lowrank.train.job import RunningJob
from lowrank.train.log import Meter, RunLog
from lowrank.train.network_module import KohyaNetwork
from lowrank.train.text_conditions import TextConditions
from lowrank.train.watch import first_not_finite


@dataclass(frozen=True, kw_only=True)
class Forward:
    """The losses of a batch, computed alike by training, validation and warm-up stages."""

    accelerator: Accelerator
    network: KohyaNetwork
    objective: Objective
    latents: Callable[[Batch, torch.Generator], Tensor]
    conditions: Callable[[Batch], Mapping[str, Tensor]]
    denoise: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]  # (noisy, timesteps, conditions)

    def losses(
        self, batch: Batch, generator: torch.Generator, at: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses (B,) without loss weights, and timesteps (B,); `at` in [0, 1] fixes the noise level."""
        latents = self.latents(batch, generator)  # (B, C, h, w)
        drawn = self.objective.draw(latents, generator, at)
        with self.accelerator.autocast(), at_timesteps(self.network, drawn.timesteps):
            conditions = self.conditions(batch)
            prediction = self.denoise(drawn.noisy, drawn.timesteps, conditions)
        if batch.preserved is not None:
            drawn = self._preserving(batch.preserved.to(latents.device), drawn, conditions)
        mask = None if batch.masks is None else _fit(batch.masks.to(latents.device), latents)
        return self.objective.losses(prediction, drawn, mask=mask), drawn.timesteps

    @torch.no_grad()
    def _preserving(self, chosen: Tensor, drawn: Draw, conditions: Mapping[str, Tensor]) -> Draw:
        """The draw with the base's own prediction as the target of the `chosen` samples (B,).

        sd-scripts' differential output preservation: the adapter is off for one more pass of these samples.
        """
        part = Draw(*(value[chosen.to(value.device)] for value in drawn))
        inputs = {name: value[chosen.to(value.device)] for name, value in conditions.items()}
        self.network.set_multiplier(0.0)
        try:
            with self.accelerator.autocast(), at_timesteps(self.network, part.timesteps):
                prediction = self.denoise(part.noisy, part.timesteps, inputs)
        finally:
            self.network.set_multiplier(1.0)
        target = drawn.target.clone()
        target[chosen.to(target.device)] = self.objective.compared(prediction, part).to(target)
        return drawn._replace(target=target)


def run_forward(job: RunningJob, models: Models, network: KohyaNetwork, text: TextConditions) -> Forward:
    """The forward of a job: latents are drawn from the moments for each batch, text may be cached."""
    family, device = job.family, job.accelerator.device

    def latents(batch: Batch, generator: torch.Generator) -> Tensor:
        moments = batch.encoded
        if moments is None:
            assert batch.pixels is not None  # a batch has pixels or encodings
            with torch.no_grad():
                moments = family.encode_images(models, batch.pixels)
        return family.latents(models, moments.to(device), generator)

    def conditions(batch: Batch) -> dict[str, Tensor]:
        encoded = text(batch.captions)
        if family.size_conditions is None:
            return encoded
        sizes = family.size_conditions(batch.original_sizes, batch.crop_top_lefts, batch.target_sizes)
        return encoded | {name: value.to(device) for name, value in sizes.items()}

    def denoise(noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        return family.denoise(models.denoiser, noisy, timesteps, conditions, job.switches)

    return Forward(
        accelerator=job.accelerator,
        network=network,
        objective=job.objective,
        latents=latents,
        conditions=conditions,
        denoise=denoise,
    )


@dataclass(kw_only=True)
class Run:
    """Everything that the loop uses."""

    forward: Forward
    denoiser: nn.Module
    text_encoders: list[nn.Module]
    loader: Loader
    optimizer: AcceleratedOptimizer
    scheduler: AcceleratedScheduler
    group_names: list[str]
    steps: int
    epochs: int
    seed: int
    max_grad_norm: float
    scale_weight_norms: float | None
    log: RunLog
    after_step: Callable[[Progress], bool]  # saves and draws; True to stop
    after_epoch: Callable[[Progress], None]
    last_checkpoint: Callable[[], Path | None]
    # called with the step before the optimizer uses the gradients: may drop some, returns scalars to log
    mask_gradients: Callable[[int], dict[str, float]] | None
    sharded: bool = False  # every process must take part in every forward of the denoiser

    @property
    def accelerator(self) -> Accelerator:
        return self.forward.accelerator

    @property
    def network(self) -> KohyaNetwork:
        return self.forward.network

    def batches(self, epoch: int, position: int = 0) -> Iterator[Batch]:
        """This process's batches of an epoch, from a position on."""
        per_step = self.accelerator.gradient_accumulation_steps * self.accelerator.num_processes
        return self.loader.epoch(epoch, position, max_train_steps=self.steps, batches_per_step=per_step)


class MicroBatchLosses(NamedTuple):
    """The losses of one micro-batch: the scalar to differentiate, its parts, and each sample's."""

    total: Tensor
    components: dict[str, Tensor]
    per_sample: Tensor  # (B,) without loss weights
    timesteps: Tensor  # (B,) 0..1000


def loss_components(network: KohyaNetwork) -> tuple[str, ...]:
    """Names of the parts of the loss: training images, regularisation images, the method's penalties."""
    return ("mse", "prior", *(penalty.name for penalty in _penalties(network)))


def _penalties(network: KohyaNetwork) -> tuple:
    return getattr(getattr(network, "method", None), "penalty", ())


def batch_generator(seed: int, epoch: int, position: int) -> torch.Generator:
    """The generator of one batch; also seeds the global generators of torch (dropout), Python and numpy.

    Networks of other programs draw from the last two: DyLoRA chooses a rank with `random`.
    """
    digest = hashlib.sha256(f"{seed},{epoch},{position}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[8:15], "big"))
    random.seed(digest[16:24])
    np.random.seed(int.from_bytes(digest[24:28], "big"))
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def at_timesteps(network: KohyaNetwork, timesteps: Tensor) -> AbstractContextManager:
    """Set the timesteps on a network of ours for a block; foreign network modules do not use them."""
    denoise_at = getattr(network, "denoise_at", None)
    return denoise_at(timesteps) if denoise_at else nullcontext()


def micro_step(run: Run, batch: Batch) -> MicroBatchLosses:
    """Loss of one batch, differentiable in the network's parameters."""
    device = run.accelerator.device
    losses, timesteps = run.forward.losses(batch, batch_generator(run.seed, batch.epoch, batch.position))
    weighted = losses * batch.loss_weights.to(device)
    is_reg = torch.tensor([example.is_reg for example in batch.examples], device=device)
    parts = {
        "mse": (weighted * ~is_reg).sum() / len(losses),
        "prior": (weighted * is_reg).sum() / len(losses),
    }
    if _penalties(run.network):
        parts |= run.network.penalties()
    return MicroBatchLosses(torch.stack(list(parts.values())).sum(), parts, losses, timesteps)


def _fit(masks: Tensor, latents: Tensor) -> Tensor:
    if masks.shape[-2:] == latents.shape[-2:]:
        return masks
    return nn.functional.adaptive_avg_pool2d(
        masks, (latents.shape[-2], latents.shape[-1])
    )  # the area average, as in the cache


def average_gradients(accelerator: Accelerator, parameters: list[nn.Parameter]) -> None:
    """Average the gradients over processes in one message.

    DistributedDataParallel cannot do it: the network's own forward is never called, so its hooks do not run.
    """
    if accelerator.num_processes == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat: Any = accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), "mean")
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def train(run: Run, progress: Progress) -> Progress:
    """Train until `run.steps` optimizer steps are done, or `run.after_step` stops the run.

    Raises `Refused` at the first loss or gradient that is not finite.
    """
    accelerator, network = run.accelerator, run.network
    meter = Meter(loss_components(network), accelerator.device)
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    images = 0
    micros: list[tuple[Batch, Tensor]] = []  # of the current step, with their losses
    run.log.begin(progress.step)
    while progress.step < run.steps:
        if len(run.loader) > accelerator.gradient_accumulation_steps:  # one-step epochs: the bar is enough
            run.log.message(f"\nepoch {progress.epoch + 1}/{run.epochs}")  # GUIs read this line
        network.on_epoch_start(run.text_encoders, run.denoiser)
        for batch in run.batches(progress.epoch, progress.position):
            if hasattr(network, "on_step_start"):
                network.on_step_start(run.text_encoders, run.denoiser)
            with accelerator.accumulate(network):
                micro = micro_step(run, batch)
                accelerator.backward(micro.total)
                meter.add(micro.components, micro.per_sample, micro.timesteps)
                micros.append((batch, micro.total.detach()))
                images += len(batch.examples) * accelerator.num_processes
                if accelerator.sync_gradients:
                    extra = run.mask_gradients(progress.step) if run.mask_gradients else {}
                    average_gradients(accelerator, parameters)
                    losses, norm = _clip_and_read(run, progress, parameters, meter, micros)
                    extra |= norm
                    micros.clear()
                run.optimizer.step()
                run.scheduler.step()
                run.optimizer.zero_grad(set_to_none=True)
            progress.position += 1
            if accelerator.sync_gradients:
                progress.step += 1
                if run.scale_weight_norms:
                    extra |= _limit_norms(network, run.scale_weight_norms, accelerator.device)
                named = list(zip(run.group_names, run.optimizer.param_groups, strict=False))
                rates = {name: group["lr"] for name, group in named}
                # Prodigy and D-Adaptation estimate a factor d of the rate
                extra |= {f"lr/d*lr/{name.strip()}": g["d"] * g["lr"] for name, g in named if "d" in g}
                run.log.step(progress.step, progress.epoch + 1, losses, rates, images, extra)
                images = 0
                if run.after_step(progress) or progress.step >= run.steps:
                    return progress
        progress.epoch, progress.position = progress.epoch + 1, 0
        run.after_epoch(progress)
    return progress


def _clip_and_read(
    run: Run,
    progress: Progress,
    parameters: list[nn.Parameter],
    meter: Meter,
    micros: Sequence[tuple[Batch, Tensor]],
) -> tuple[dict[str, float | None], dict[str, float]]:
    """Clip the gradients; return the step's mean losses, and the gradient norm to log.

    The host reads all values of a step here, in one transfer, and waits for the device nowhere else in it.
    Raises `Refused` for a loss or gradient that is not finite, before the optimizer uses the gradient.
    """
    totals = [total for _, total in micros]
    norms: list[Any] = []
    if run.max_grad_norm:
        norms.append(run.accelerator.clip_grad_norm_(parameters, run.max_grad_norm))
    losses, values = meter.read_with(run.accelerator, [*totals, *norms])
    for (batch, _), total in zip(micros, values, strict=False):
        if not math.isfinite(total):
            _refuse_not_finite(run, progress, batch, "the loss")
    if not math.isfinite(losses["loss"] or 0.0):
        raise Refused(
            f"the loss of another process is not finite at step {progress.step + 1}; its message names the "
            "module and the images"
        )
    norm = values[len(totals) :]
    # with a gradient scaler (fp16) an overflow is normal: the scaler skips the step and lowers its scale
    if run.accelerator.scaler is None and not all(map(math.isfinite, norm)):
        _refuse_not_finite(run, progress, micros[-1][0], "the gradient")
    return losses, {"norm/gradient": norm[0]} if norm else {}


def _limit_norms(network: KohyaNetwork, limit: float, device: torch.device) -> dict[str, float]:
    scaled, mean, largest = network.apply_max_norm_regularization(limit, device)
    return {
        "max_norm/keys_scaled": scaled,
        "max_norm/average_key_norm": mean,  # the name in kohya's trainers up to 0.9
        "norm/avg_key_norm": mean,
        "max_norm/max_key_norm": largest,
    }


def _refuse_not_finite(run: Run, progress: Progress, batch: Batch, what: str) -> NoReturn:
    if run.sharded:
        module = "a module that is not searched for in a sharded model"
    else:
        module = first_not_finite(run.denoiser, lambda: micro_step(run, batch))
    images = ", ".join(str(example.path) for example in batch.examples)
    checkpoint = run.last_checkpoint()
    kept = f"the last checkpoint is {checkpoint}" if checkpoint else "no checkpoint has been written yet"
    raise Refused(
        f"{what} is not finite at step {progress.step + 1}: first in {module}, with {images}; {kept}; lower "
        "--learning_rate, use --mixed_precision bf16, or remove the image"
    )
