"""DoRA (arXiv 2402.09353) and LoRA+ (arXiv 2402.12354): better than LoRA, and over which learning rates."""

from __future__ import annotations

from benchmarks.claims.bench import Bench
from benchmarks.claims.record import Arm, Cell, Claim, Metric, Statement

LOSS = Metric("held-out loss")


def measure(bench: Bench, arm: Arm, rate: float, seed: int) -> Cell:
    """Train one new style from four pictures; the loss is that of other contents in this style."""
    task = bench.world.invented_style(seed % bench.world.invented, seed)
    with bench.network(arm, seed) as network:
        bench.train(network, rate, seed, bench.encode(task.train))
        return {LOSS.key: bench.loss(bench.encode(task.test), 1)}


RATES = (1e-3, 3e-3, 1e-2, 3e-2)
CLAIM = Claim(
    name="rates",
    title="DoRA and LoRA+: held-out loss of a new style, by learning rate",
    paper="arXiv 2402.09353, 2402.12354",
    arms=(
        Arm("lora", rates=RATES),
        Arm("dora", "dora", rates=RATES),
        Arm("lora+, ratio 16", arguments={"loraplus_lr_ratio": "16"}, rates=RATES),
    ),
    tune=LOSS,
    statements=tuple(
        Statement(
            f"{name} has a lower loss than LoRA at a rate of {rate:g}",
            f"{arm} at {rate:g}",
            f"lora at {rate:g}",
            LOSS,
        )
        for name, arm in (("DoRA", "dora"), ("LoRA+", "lora+, ratio 16"))
        for rate in RATES
    ),
    measure=measure,
    every_rate=True,
)
