"""Universal subspaces (arXiv 2512.05117): a basis of many adapters is a good place to train a new one in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.claims.bench import Bench, Examples
from benchmarks.claims.record import Arm, Cell, Claim, Metric, Statement
from lowrank.bases.basis_file import write_basis
from lowrank.combine.shared_basis import Extraction, extract
from lowrank.errors import Refused

LOSS = Metric("held-out loss")
COLLECTION, NEW = 12, 5  # adapters that the basis is made of; styles that it never saw
WIDTH = 14  # K: a core of K × K numbers in each layer, on the demo models about as many as LoRA of rank 1


def basis_file(bench: Bench) -> Path:
    """The basis of adapters for the first styles of the world, made once for each model and size."""
    name = f"{bench.model_hash[:16]}-{bench.world.size}-{bench.sizes.steps}"
    folder = bench.cache / f"collection-{name}"
    path = folder / "basis.safetensors"
    if path.is_file():
        return path
    if bench.world.invented < COLLECTION + NEW:
        raise Refused(
            f"the claim basis needs {COLLECTION + NEW} styles and there are {bench.world.invented}; "
            "give more folders in --styles, or leave the claim out"
        )
    files = []
    for index in range(COLLECTION):
        files.append(folder / f"{index}.safetensors")
        if files[-1].is_file():
            continue
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        with bench.network(Arm("collected", rank=4), index) as network:
            task = bench.world.invented_style(index, 700 + index)
            bench.train(network, 3e-3, 700 + index, bench.encode(task.train))
            network.save_weights(str(files[-1]), None, {})
    extracted = extract(files, Extraction(WIDTH, 1.0, False, True, 4 * WIDTH), progress=False)
    write_basis(path, extracted.layers, extracted.values, "universal", dict(extracted.facts))
    return path


def measure(bench: Bench, arm: Arm, rate: float, seed: int) -> Cell:
    """Train one of the styles that are not in the collection."""
    task = bench.world.invented_style(COLLECTION + seed % NEW, seed)
    data, source = bench.encode(task.train), arm.options.get("basis")
    if source is not None:
        path = str(basis_file(bench)) if source == "collection" else source
        arm = replace(arm, arguments={**arm.arguments, "basis_path": path})
    with bench.network(arm, seed) as network:
        if source == "auto:grad":
            gradient_basis(bench, network, data, seed)
        bench.train(network, rate, seed, data)
        values = sum(p.numel() for p in network.parameters())
        return {LOSS.key: bench.loss(bench.encode(task.test), 1), "trained values": values}


def gradient_basis(bench: Bench, network, data: Examples, seed: int) -> None:
    """Set L and R to the strongest singular directions of the first gradient of each weight."""
    hosts = [layer.host.weight for layer in network.layers()]
    generator = torch.Generator().manual_seed(seed + 5)
    for weight in hosts:
        weight.requires_grad_(True)
    for _ in range(4):
        bench.losses(data, range(len(data.captions)), generator).mean().backward()
    for layer, weight in zip(network.layers(), hosts, strict=True):
        U, _, Vh = torch.linalg.svd(weight.grad.flatten(1), full_matrices=False)
        K = layer.rank
        layer.basis_up.copy_(U[:, :K].reshape(layer.basis_up.shape))
        layer.basis_down.copy_(Vh[:K].reshape(layer.basis_down.shape))
        weight.requires_grad_(False)
        weight.grad = None


RATES = (1e-2, 3e-2, 1e-1)  # a core of K × K needs higher rates than LoRA
CLAIM = Claim(
    name="basis",
    title=f"Universal LoRA: a new style inside a basis of {COLLECTION} adapters",
    paper="arXiv 2512.05117",
    arms=(
        Arm("lora r1", rank=1, rates=(3e-3, 1e-2, 3e-2)),
        Arm("basis of 12 adapters", "universal_lora", WIDTH, rates=RATES, options={"basis": "collection"}),
        Arm("random basis", "universal_lora", WIDTH, rates=RATES, options={"basis": "auto:random"}),
        Arm("gradient basis", "universal_lora", WIDTH, rates=RATES, options={"basis": "auto:grad"}),
        Arm("basis of the weight", "universal_lora", WIDTH, rates=RATES, options={"basis": "auto:weight"}),
    ),
    tune=LOSS,
    statements=(
        Statement(
            "the collection's basis is better than a random one", "basis of 12 adapters", "random basis", LOSS
        ),
        Statement(
            "the collection's basis is better than the task's gradient",
            "basis of 12 adapters",
            "gradient basis",
            LOSS,
        ),
        Statement(
            "the collection's basis is better than LoRA of rank 1", "basis of 12 adapters", "lora r1", LOSS
        ),
    ),
    measure=measure,
)
