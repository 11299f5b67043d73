"""`--dry_run`: what a run would do, without weights or a GPU: data, buckets, adapter, steps, memory."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lowrank.adapters.network import AdapterNetwork
from lowrank.config.command_line import Parsed
from lowrank.data import summary
from lowrank.data.loader import Loader
from lowrank.train import network_module, setup, warmup
from lowrank.train.schedule import plan_run

GIB = 2**30


def show(
    parsed: Parsed,
    loader: Loader,
    denoiser: nn.Module | None,
    network: Any,
    accelerator: Accelerator,
    dtype: torch.dtype,
) -> int:
    """Print the tables and return 0; `denoiser` and `network` have no values, or are None (other modules)."""
    told = summary.dataset_summary(loader)
    for number, dataset in enumerate(told["datasets"]):
        print(
            f"dataset {number}: {dataset['resolution'][0]}×{dataset['resolution'][1]}, batch "
            f"{dataset['batch_size']}"
        )
        for place in dataset["folders"]:
            kind = "regularisation" if place["is_reg"] else "training"
            print(f"  {place['image_dir']}: {place['images']} {kind} images × {place['repeats']}")
        for bucket, count in dataset["buckets"].items():
            print(f"  bucket {bucket}: {count}")
    captions = loader.captions()
    print(
        f"captions: {'open-ended' if captions is None else ', '.join(map(repr, captions[:3]))}"
        f"{f' and {len(captions) - 3} more' if captions and len(captions) > 3 else ''}"
    )
    if isinstance(network, AdapterNetwork):
        _show_layers(network, parsed, setup.rate(parsed, accelerator))
    for stage in warmup.told(network, parsed.abm):
        print(f"before step 1: {stage}")
    steps = plan_run(
        len(loader),
        accelerator.num_processes,
        parsed.value("gradient_accumulation_steps"),
        parsed.value("max_train_steps"),
        parsed.value("max_train_epochs"),
    )
    print(
        f"steps: {steps.steps} in {steps.epochs} epochs of {len(loader)} batches, {steps.steps_per_epoch} "
        f"steps each; {accelerator.num_processes} processes × {parsed.value('gradient_accumulation_steps')} "
        "micro-batches a step"
    )
    if denoiser is not None:
        _show_memory(denoiser, network, parsed, dtype)
    return 0


def _show_layers(network: AdapterNetwork, parsed: Parsed, rate: float) -> None:
    groups, names = network_module.optimizer_groups(
        network, parsed.value("text_encoder_lr"), parsed.value("unet_lr"), rate
    )
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    print(f"adapter: {network.method.name}, {len(network.layers())} layers")
    for layer in network.layers():
        target, alpha = network.targets[layer.name], layer.scale * layer.rank
        own = sorted({rates.get(id(p), 0.0) for p in layer.parameters()})
        told = ", ".join(f"{one:g}" for one in own)
        print(f"  {target.native or target.name}  rank {layer.rank}  alpha {alpha:g}  lr {told}")
    for name, group in zip(names, groups, strict=False):
        count = sum(p.numel() for p in group["params"])
        print(f"group {name.strip()}: {count:,} parameters, lr {group['lr']:g}")


def _show_memory(denoiser: nn.Module, network: nn.Module, parsed: Parsed, dtype: torch.dtype) -> None:
    trained = sum(p.numel() for p in network.parameters())
    frozen = sum(b.numel() for b in network.buffers())
    base = sum(p.numel() for p in denoiser.parameters())
    width = 1 if parsed.value("fp8_base") or parsed.value("fp8_base_unet") else dtype.itemsize
    states = 2 if "8bit" in parsed.value("optimizer_type").lower() or parsed.value("use_8bit_adam") else 8
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
