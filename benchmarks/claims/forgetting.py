"""Null-LoRA (arXiv 2512.15233) and LaLoRA (arXiv 2512.17720): more of the target for less forgetting.

The held-out loss of the target and the loss of general pictures are watched during training. Numbers are
compared at an equal target loss, read from each arm's path, so that early stopping is part of every arm.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims.bench import Bench
from benchmarks.claims.record import Arm, Cell, Claim, Metric, Statement
from lowrank.adapters.targets import find
from lowrank.laplace.context_file import GAUSS_NEWTON, write_context
from lowrank.laplace.fisher import Fisher, gauss_newton_draw

FORGOTTEN = Metric("rise of the general loss at equal target loss")
TARGET = Metric("target loss at the end")
SHARE = 0.6  # of the plain LoRA's gain: the target loss at which arms are compared
MEASURED = 48  # general pictures that the curvature is measured on, in batches of 8


def context_file(bench: Bench) -> Path:
    """The curvature of the base's loss on general pictures, measured once for each model and size."""
    path = bench.cache / f"context-{bench.model_hash[:16]}-{bench.world.size}.safetensors"
    if path.is_file():
        return path
    denoiser, general = bench.models.denoiser, bench.encode(bench.world.source(77, MEASURED))
    fisher = Fisher(find("unet", denoiser), "kfac", 0, 0, bench.device)
    generator = torch.Generator().manual_seed(7)
    with fisher.watching():
        for start in range(0, len(general.captions), 8):
            chosen = range(start, min(start + 8, len(general.captions)))
            fisher.add(len(chosen), lambda chosen=chosen: _numbers(bench, general, chosen, generator), 32.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"lowrank.base_hash": bench.model_hash, "lowrank.fisher": GAUSS_NEWTON}
    write_context(path, fisher.context(facts))
    return path


def _numbers(bench: Bench, general: Any, chosen: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    drawn = bench.objective.draw(general.latents[list(chosen)], generator)
    text = bench.text([general.captions[i] for i in chosen])
    f = bench.family.denoise(bench.models.denoiser, drawn.noisy, drawn.timesteps, text, bench.options)
    signs = torch.randint(0, 2, f.shape, generator=generator).mul(2).sub(1).to(f)
    return gauss_newton_draw(lambda prediction: bench.objective.losses(prediction, drawn), f, signs)


def measure(bench: Bench, arm: Arm, rate: float, seed: int) -> Cell:
    """Train one new style; watch its held-out loss and the loss of general pictures along the way."""
    task = bench.world.invented_style(seed % bench.world.invented, seed)
    test, general = bench.encode(task.test), bench.encode(bench.world.source(500 + seed))
    if arm.options.get("context"):
        arguments = {**arm.arguments, "lalora_context_path": str(context_file(bench))}
        arm = Arm(arm.name, arm.module, arm.rank, arguments)

    def watch() -> list[float]:
        return [bench.loss(test, 1), bench.loss(general, 1)]

    steps = bench.sizes.steps
    path = [watch()]
    with bench.network(arm, seed) as network:
        at = tuple(sorted({max(1, steps * part // 6) for part in range(1, 7)}))
        path += bench.train(network, rate, seed, bench.encode(task.train), steps, watch, at).watched.values()
        values = sum(p.numel() for p in network.parameters())
    return {TARGET.key: path[-1][0], "path": path, "trained values": values}


def settle(cells: dict[str, Cell]) -> None:
    """Read every arm's general loss where its target loss reaches a share of the plain LoRA's gain."""
    if "lora r4" not in cells:  # left out with --arms
        return
    path = cells["lora r4"]["path"]
    level = path[0][0] - SHARE * (path[0][0] - min(target for target, _ in path))
    for cell in cells.values():
        cell[FORGOTTEN.key] = rise_at(cell["path"], level)


def rise_at(path: Sequence[Sequence[float]], level: float) -> float | None:
    """The second number's rise where the first falls to `level`, between points; None if it never does."""
    for before, after in itertools.pairwise(path):
        if before[0] >= level >= after[0]:
            share = (before[0] - level) / (before[0] - after[0]) if before[0] > after[0] else 0.0
            return before[1] + share * (after[1] - before[1]) - path[0][1]
    return None


RATES = (3e-3, 1e-2, 3e-2)
CONTEXT = {"context": True}
RIVALS = ("lora r4", "lora r4, L2")
CLAIM = Claim(
    name="forgetting",
    title="Null-LoRA and LaLoRA: a new style against general pictures",
    paper="arXiv 2512.15233, 2512.17720",
    arms=(
        Arm("lora r4", rank=4, rates=RATES),
        Arm("lora r4, L2", "lalora", 4, {"lalora_lambda": "0.01", "lalora_isotropic": "True"}, RATES),
        Arm("lalora r4, λ .001", "lalora", 4, {"lalora_lambda": "0.001"}, RATES, options=CONTEXT),
        Arm("lalora r4, λ .01", "lalora", 4, {"lalora_lambda": "0.01"}, RATES, options=CONTEXT),
        Arm("null r8, weight", "null_lora", 8, rates=RATES),
        Arm(
            "null r8, activation",
            "null_lora",
            8,
            {"null_source": "activation"},
            RATES,
            options={"context": True},
        ),
    ),
    tune=TARGET,
    statements=tuple(
        Statement(f"{name} forgets less than {rival} at equal target loss", name, rival, FORGOTTEN)
        for name in ("lalora r4, λ .001", "lalora r4, λ .01", "null r8, weight", "null r8, activation")
        for rival in RIVALS
    ),
    measure=measure,
    settle=settle,
)
