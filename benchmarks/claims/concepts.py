"""EffiLoRA (arXiv 2512.00878): experts that the input chooses learn several concepts better than one LoRA."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.claims.bench import Bench, Examples
from benchmarks.claims.record import Arm, Cell, Claim, Metric, Statement

LOSS = Metric("held-out loss of all concepts")
STYLES = 4  # new styles that one adapter learns at once; each has a word of its own
WORDS = ("<s>", "<t>", "<u>", "<v>")


def several(bench: Bench, seed: int) -> tuple[Examples, Examples]:
    """Training and held-out pictures of several new styles together."""
    order = np.random.default_rng(seed).permutation(bench.world.invented)[:STYLES]
    sets: tuple[list[Examples], list[Examples]] = ([], [])
    for word, index in zip(WORDS, order, strict=False):
        task = bench.world.invented_style(int(index), seed)
        for part, pictures in zip(sets, task, strict=True):
            encoded = bench.encode(pictures)
            part.append(Examples(encoded.latents, [c.replace("<s>", word) for c in encoded.captions]))
    return joined(sets[0]), joined(sets[1])


def joined(parts: list[Examples]) -> Examples:
    """Examples one after the other."""
    return Examples(torch.cat([p.latents for p in parts]), [c for p in parts for c in p.captions])


def measure(bench: Bench, arm: Arm, rate: float, seed: int) -> Cell:
    """Train one adapter on several styles at once."""
    train, test = several(bench, seed)
    with bench.network(arm, seed) as network:
        bench.train(network, rate, seed, train)
        return {LOSS.key: bench.loss(test, 1), "trained values": sum(p.numel() for p in network.parameters())}


RATES = (1e-3, 3e-3, 1e-2, 3e-2)
CLAIM = Claim(
    name="concepts",
    title="EffiLoRA: four new styles in one adapter",
    paper="arXiv 2512.00878",
    arms=(
        Arm("lora r4", rank=4, rates=RATES),
        Arm("lora r7, equal values", rank=7, rates=RATES),
        Arm("effilora r4, 3 experts", "effilora", 4, {"num_experts": "3"}, RATES),
    ),
    tune=LOSS,
    statements=(
        Statement(
            "EffiLoRA has a lower loss than LoRA of equal rank", "effilora r4, 3 experts", "lora r4", LOSS
        ),
        Statement(
            "EffiLoRA has a lower loss than LoRA of about equal size",
            *("effilora r4, 3 experts", "lora r7, equal values", LOSS),
        ),
    ),
    measure=measure,
)
