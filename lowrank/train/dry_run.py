"""`--dry_run`: what a run would do, without weights or a GPU: data, buckets, adapter, steps, memory."""

from __future__ import annotations

import torch
from torch import nn

from lowrank.adapters.network import AdapterNetwork
from lowrank.config.train import TrainOptions
from lowrank.data import summary
from lowrank.data.loader import Loader
from lowrank.train import setup, warmup
from lowrank.train.job import RunningJob
from lowrank.train.network_module import KohyaNetwork, optimizer_groups
from lowrank.train.schedule import RunPlan

GIB = 2**30


def show(
    job: RunningJob,
    loader: Loader,
    plan: RunPlan,
    denoiser: nn.Module | None,
    network: KohyaNetwork | None,
    dtype: torch.dtype,
) -> int:
    """Print the tables and return 0; `denoiser` and `network` have no values, or are None (other modules)."""
    print("\n".join(summary.describe(loader)))
    captions = loader.captions()
    print(
        f"captions: {'open-ended' if captions is None else ', '.join(map(repr, captions[:3]))}"
        f"{f' and {len(captions) - 3} more' if captions and len(captions) > 3 else ''}"
    )
    if isinstance(network, AdapterNetwork):
        _show_layers(network, job)
    for stage in warmup.stage_names(network, job.options.abm):
        print(f"before step 1: {stage}")
    print(
        f"steps: {plan.steps} in {plan.epochs} epochs of {len(loader)} batches, {plan.steps_per_epoch} "
        f"steps each; {plan.processes} processes × {plan.accumulation} "
        "micro-batches a step"
    )
    if denoiser is not None and network is not None:
        _show_memory(denoiser, network, job.options, dtype)
    return 0


def _show_layers(network: AdapterNetwork, job: RunningJob) -> None:
    optimizer = job.options.optimizer
    groups, names = optimizer_groups(
        network, optimizer.text_encoder_lr, optimizer.unet_lr, setup.base_rate(job)
    )
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    print(f"adapter: {network.method.name}, {len(network.layers())} layers")
    for layer in network.layers():
        target, alpha = network.targets[layer.name], layer.scale * layer.rank
        layer_rates = sorted({rates.get(id(p), 0.0) for p in layer.parameters()})
        shown = ", ".join(f"{rate:g}" for rate in layer_rates)
        print(f"  {target.native or target.name}  rank {layer.rank}  alpha {alpha:g}  lr {shown}")
    for name, group in zip(names, groups, strict=False):
        count = sum(p.numel() for p in group["params"])
        print(f"group {name.strip()}: {count:,} parameters, lr {group['lr']:g}")


def _show_memory(denoiser: nn.Module, network: nn.Module, options: TrainOptions, dtype: torch.dtype) -> None:
    train, optimizer = options.train, options.optimizer
    trained = sum(p.numel() for p in network.parameters())
    frozen = sum(b.numel() for b in network.buffers())
    base = sum(p.numel() for p in denoiser.parameters())
    width = 1 if train.fp8_base or train.fp8_base_unet else dtype.itemsize
    states = 2 if "8bit" in optimizer.optimizer_type.lower() or optimizer.use_8bit_adam else 8
    parts = {
        "base weights": base * width,
        "frozen factors": frozen * dtype.itemsize,
        "trained factors": trained * 4,
        "gradients": trained * 4,
        "optimizer": trained * states,
    }
    print(f"parameters: {trained:,} trained, {frozen:,} frozen, {base:,} in the base")
    for name, size in parts.items():
        print(f"  {name}: {size / GIB:.2f} GiB")
    print(
        f"  together {sum(parts.values()) / GIB:.2f} GiB, and activations (least with "
        "--gradient_checkpointing)"
    )
