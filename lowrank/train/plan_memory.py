"""The memory of a run before it starts: each phase of the run on tensors without values.

The functions are those of a run: `load_components`, `TextConditions`, `adapt`, `Forward.losses`, the
optimizer's step. Weights are not read (`lowrank.models.hollow`), and live storages are counted
(`lowrank.plan.live`).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.targets import host_shape
from lowrank.data.loader import Batch, Loader
from lowrank.errors import Refused
from lowrank.models.family import DTYPES, Models, latent_scale
from lowrank.models.frozen import frozen_layers
from lowrank.models.hollow import hollow
from lowrank.models.memory import offload_of
from lowrank.plan.fake import without_values
from lowrank.plan.live import GIB, HOST, LiveMemory, Phase
from lowrank.train import optim, setup
from lowrank.train.attach import adapt, keep_vae, load_components
from lowrank.train.job import RunningJob
from lowrank.train.loop import batch_generator, run_forward
from lowrank.train.network_module import optimizer_groups
from lowrank.train.preview import preview_prompts
from lowrank.train.prompts import Prompt
from lowrank.train.text_conditions import TextConditions

logger = logging.getLogger(__name__)

# What a GPU needs besides live tensors, in bytes. Not measured by this program on a GPU.
CONTEXT = 512 << 20  # CUDA's context and its loaded kernels: 0.4 to 0.6 GiB
WORKSPACES = 128 << 20  # scratch of cuBLAS, cuDNN and attention kernels
START = 41  # bytes per value of the largest weight, while a basis or null space of rank 64 is computed
FRAGMENTS = 0.05  # share of what is not weights: rounding and gaps of torch's allocator


def allowance(phase: Phase) -> dict[str, int]:
    """What a phase needs besides its live tensors, by name."""
    weights = sum(size for part, size in phase.parts if part.startswith("weights"))
    return {
        "CUDA context": CONTEXT,
        "workspaces of kernels": WORKSPACES,
        "gaps between tensors": int(FRAGMENTS * (phase.peak - weights)),
    }


def total(phase: Phase) -> int:
    """The bytes that a GPU needs for a phase."""
    return phase.peak + sum(allowance(phase).values())


@dataclass(frozen=True)
class _Processor:
    """What a phase needs of accelerate's Accelerator; tensors without values are on the CPU."""

    mixed_precision: str
    device: torch.device
    scaler: None = None
    is_main_process: bool = False

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.mixed_precision == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.mixed_precision])


def precision(job: RunningJob) -> str:
    """The precision of a run on a GPU, which may differ from that on this machine."""
    return job.options.train.mixed_precision or job.accelerator.mixed_precision


def plan_memory(
    job: RunningJob,
    models: Models,
    loader: Loader,
    *,
    gpu: bool = True,
    values: bool = False,
    device: str = "cpu",
) -> list[Phase]:
    """The peak of each phase of a run, from the configurations in `models`.

    `gpu` gives tensors the dtypes of autocast on CUDA. With `values` the same functions run on real tensors
    of random weights on `device`, which measures what a plan predicts.
    """
    kind = precision(job)
    processor: Any = _Processor(kind, torch.device(device))
    job = replace(job, family=hollow(job.family), accelerator=processor, sharding=None)
    source = replace(models.source, dtype=DTYPES[kind], device=device)
    models = replace(models, source=source, denoiser=None, vae=None, text_encoders=(), tokenizers=())
    live, mode = LiveMemory(), contextlib.nullcontext() if values else without_values(cuda_autocast=gpu)
    logging.disable(logging.WARNING)  # the run itself logs the same lines
    try:
        with mode, live:
            _run(job, models, loader, preview_prompts(job, models), live)
    finally:
        logging.disable(logging.NOTSET)
    return live.phases


@dataclass(frozen=True)
class Prediction:
    """The planned memory of a run, for the message when its memory has run out.

    `phases` are those of `--vram`; without them they are planned when they are needed.
    """

    job: RunningJob
    models: Models
    loader: Loader
    phases: Sequence[Phase] | None = None

    def of(self, name: str) -> str:
        """A sentence with the predicted peak of a phase, or "" where none can be predicted."""
        gpu = self.job.accelerator.device.type == "cuda"
        if self.job.sharding is not None:  # a plan has the whole base in one process
            return ""
        try:
            phases = self.phases or plan_memory(self.job, self.models, self.loader, gpu=gpu)
        except (Refused, MemoryError, RuntimeError) as error:  # the first error is the one to report
            logger.info("the memory of %s cannot be predicted: %s", name, error)
            return ""
        for phase in phases:
            if phase.name == name:
                need = total(phase) if gpu else phase.peak
                return f"the {name} was predicted to need {need / GIB:.2f} GiB"
        return ""


def _run(
    job: RunningJob, models: Models, loader: Loader, prompts: Sequence[Prompt], live: LiveMemory
) -> None:
    options, family = job.options, job.family
    width, height = largest_bucket(loader)
    caption = "a"
    on_cpu = options.memory.text_encoders_on_cpu
    with live.phase("text encoding"):
        stored = options.memory.text_encoder_storage is not None  # then they are in host memory at first
        with live.part(HOST if on_cpu or stored else "weights of the text encoders"):
            load_components(job, models, ("text",))
        if stored and not on_cpu:
            for encoder in models.text_encoders:
                live.enter((*encoder.parameters(), *encoder.buffers()), "weights of the text encoders")
        with live.part(HOST if on_cpu else "activations of the text encoders"):
            text = TextConditions(
                family,
                models,
                job.switches,
                None if loader.captions() is None else [caption],
                options.trains_text,
                extra=[prompt.prompt for prompt in prompts],
            )
    cached = options.caches_latents or not _fresh(loader)
    with live.phase("VAE encoding"):
        with live.part("weights of the VAE"):
            load_components(job, models, ("vae",))
        with live.part("activations of the VAE"):
            size = options.data.vae_batch_size if cached else options.train.train_batch_size
            family.encode_images(models, torch.zeros(size, 3, height, width))
    keep_vae(models, cached, bool(prompts))
    vae = models.vae
    if cached and vae is not None:
        live.leave(vae.parameters())
    with live.phase("loading"):
        network = _load(job, models, text, live)
    live.watch(models.denoiser, "activations")
    with live.phase("training step"):
        optimizer = _train(job, models, network, text, _batch(job, models, loader, caption, cached), live)
    if prompts:
        if vae is not None:
            live.enter(vae.parameters(), "weights of the VAE")
        with live.phase("sampling preview"), torch.no_grad(), job.accelerator.autocast():
            for prompt in _distinct(prompts):
                _sample(job, models, text, prompt, live)
    del optimizer  # it was alive in the previews


def _load(job: RunningJob, models: Models, text: TextConditions, live: LiveMemory) -> Any:
    """The network on a denoiser that has the storage and the place of the run."""
    memory = job.options.memory
    stored = bool(memory.storage or memory.blocks_to_swap)  # then it is in host memory at first
    with live.part(HOST if stored else "weights of the denoiser"):
        load_components(job, models, ("denoiser",))
    with live.part(HOST if stored else "adapter"):
        network: Any = adapt(job, models, text.encoders)
    live.enter((*network.parameters(), *network.buffers()), "adapter")
    live.enter(models.denoiser.parameters(), "weights of the denoiser")
    packed = (layer.packed for layer in frozen_layers(models.denoiser) if layer.packed is not None)
    live.enter(packed, "weights of the denoiser")
    live.leave(streamed(models.denoiser))
    if (offload := offload_of(models.denoiser)) is not None:
        offload.copied = lambda host: live.leave([host])
    if isinstance(network, AdapterNetwork):  # the start values of all layers, until they are copied
        values = sum(4 * value.numel() for value in (*network.parameters(), *network.buffers()))
        if network.factor.frozen:
            values += START * max(math.prod(host_shape(layer.host)) for layer in network.layers())
        with live.part("start values"):
            torch.empty(max(0, values - (live.bytes if stored else 0)), dtype=torch.uint8)
    return network


def streamed(denoiser: nn.Module) -> list[Tensor]:
    """The weights that are in host memory, and copied to the device ahead of use."""
    streams = {id(layer.stream): layer.stream for layer in frozen_layers(denoiser) if layer.stream}
    return [weight for stream in streams.values() for weight in stream.weights]


def _train(
    job: RunningJob, models: Models, network: Any, text: TextConditions, batch: Batch, live: LiveMemory
) -> torch.optim.Optimizer:
    """A step as it is from the second on: that of the optimizer, which has its state, and both passes."""
    options = job.options
    groups, _ = optimizer_groups(
        network, options.optimizer.text_encoder_lr, options.optimizer.unet_lr, setup.base_rate(job)
    )
    _, _, optimizer = optim.build_optimizer(groups, options.optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: live.relabel([p.grad], "gradients"))
    with live.part("gradients"):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
    with live.part("optimizer"):
        _step(optimizer)
    if options.train.gradient_accumulation_steps == 1:
        optimizer.zero_grad(set_to_none=True)
    forward = run_forward(job, models, network, text)
    network.train()
    with live.part("activations outside the blocks"):
        losses, _ = forward.losses(batch, batch_generator(0, 0, 0))
        loss = losses.mean()
        for penalty in getattr(network, "penalties", dict)().values():
            loss = loss + penalty
        del losses
    with live.part("gradients of activations"):
        loss.backward()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def _step(optimizer: Any) -> None:
    """One step; of bitsandbytes only the state, because its kernels take addresses of memory."""
    if not type(optimizer).__module__.startswith("bitsandbytes"):
        optimizer.step()
        return
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if not optimizer.state[parameter]:
                optimizer.init_state(group, parameter, number, index)


def _sample(job: RunningJob, models: Models, text: TextConditions, prompt: Prompt, live: LiveMemory) -> None:
    """One step of sampling and the decoding: a U-Net guides with a batch of two, FLUX with two passes."""
    family, scale = job.family, latent_scale(models)
    h, w = prompt.height // scale, prompt.width // scale
    rows = 2 if prompt.scale > 1 and family.prediction(models) != "flow" else 1
    with live.part("activations outside the blocks"):
        latents = torch.randn(rows, models.configs["vae"]["latent_channels"], h, w)
        conditions = text((prompt.prompt,) * rows)
        if family.size_conditions is not None:
            sizes = torch.ones(rows, 2)
            conditions |= family.size_conditions(sizes, sizes, sizes)
        family.denoise(models.denoiser, latents, torch.ones(rows), conditions, job.switches)
    with live.part("activations of the VAE"):
        family.decode(models, latents[:1])


def _distinct(prompts: Sequence[Prompt]) -> Iterator[Prompt]:
    """One prompt of each size and guidance."""
    kinds = {(prompt.width, prompt.height, prompt.scale > 1): prompt for prompt in prompts}
    yield from kinds.values()


def _fresh(loader: Loader) -> bool:
    """Whether augmentation makes new pixels, so that latents are encoded at each step."""
    augmentations = [image.subset.augmentation for image in loader.placed]
    return any(augmentation.color_aug or augmentation.random_crop for augmentation in augmentations)


def largest_bucket(loader: Loader) -> tuple[int, int]:
    """The (width, height) with the most pixels."""
    return max((image.where.bucket for image in loader.placed), key=lambda size: size[0] * size[1])


def _batch(job: RunningJob, models: Models, loader: Loader, caption: str, cached: bool) -> Batch:
    """A whole batch of the largest bucket."""
    (width, height), rows, scale = (
        largest_bucket(loader),
        job.options.train.train_batch_size,
        latent_scale(models),
    )
    image = next(place for place in loader.placed if place.where.bucket == (width, height))
    moments = (rows, 2 * models.configs["vae"]["latent_channels"], height // scale, width // scale)
    sizes = torch.ones(rows, 2, dtype=torch.long)
    return Batch(
        0,
        0,
        (image.example,) * rows,
        (caption,) * rows,
        pixels=None if cached else torch.zeros(rows, 3, height, width),
        encoded=torch.zeros(moments) if cached else None,
        loss_weights=torch.ones(rows),
        original_sizes=sizes,
        crop_top_lefts=sizes,
        target_sizes=sizes,
        masks=torch.ones(rows, 1, *moments[2:]) if job.options.data.masked_loss else None,
    )
