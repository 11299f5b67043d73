"""`--dry_run`: what a run would do, without weights or a GPU: data, buckets, adapter, steps, memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lowrank.adapters.network import AdapterNetwork
from lowrank.data import summary
from lowrank.data.loader import Loader
from lowrank.plan.live import GIB, Phase
from lowrank.train import plan_memory, setup, warmup
from lowrank.train.job import RunningJob
from lowrank.train.network_module import KohyaNetwork, optimizer_groups
from lowrank.train.schedule import RunPlan

LARGEST = 5  # parts of a peak that are shown


def show(
    job: RunningJob,
    loader: Loader,
    plan: RunPlan,
    denoiser: nn.Module | None,
    network: KohyaNetwork | None,
    phases: Sequence[Phase],
) -> int:
    """Print the tables and return 0; `denoiser` and `network` have no values, or are None (other modules)."""
    facts = summary.dataset_summary(loader)
    for number, dataset in enumerate(facts["datasets"]):
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
        _show_layers(network, job)
    for stage in warmup.stage_names(network, job.options.abm):
        print(f"before step 1: {stage}")
    print(
        f"steps: {plan.steps} in {plan.epochs} epochs of {len(loader)} batches, {plan.steps_per_epoch} "
        f"steps each; {plan.processes} processes × {plan.accumulation} "
        "micro-batches a step"
    )
    if denoiser is not None and network is not None:
        _show_memory(phases, denoiser, network)
    else:
        print("memory: not predicted, because network modules of other programs may need values")
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


def _show_memory(phases: Sequence[Phase], denoiser: nn.Module, network: nn.Module) -> None:
    trained = sum(p.numel() for p in network.parameters())
    frozen = sum(b.numel() for b in network.buffers())
    base = sum(p.numel() for p in denoiser.parameters())
    print(f"parameters: {trained:,} trained, {frozen:,} frozen, {base:,} in the base")
    print("memory of the GPU, predicted from the run's own functions without values (GiB):")
    for phase in phases:
        parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in phase.parts[:LARGEST])
        print(f"  {phase.name} {phase.peak / GIB:.2f}: {parts}")
    most = max(phases, key=plan_memory.total)
    extra = plan_memory.allowance(most)
    print(f"  allowance: {', '.join(f'{name} {size / GIB:.2f}' for name, size in extra.items())}")
    print(f"  together {plan_memory.total(most) / GIB:.2f} in the phase {most.name}")
