"""QR-LoRA (arXiv 2507.04599, section 4): training Q and R from the weight's own factors converges faster."""

from __future__ import annotations

from statistics import fmean

from benchmarks.claims.bench import Bench
from benchmarks.claims.record import Arm, Cell, Claim, Metric, Statement

EARLY, LATE = Metric("held-out loss after a quarter"), Metric("held-out loss at the end")


def measure(bench: Bench, arm: Arm, rate: float, seed: int) -> Cell:
    """Train one new style; the losses are those of other contents in it."""
    task = bench.world.invented_style(seed % bench.world.invented, seed)
    test, early = bench.encode(task.test), bench.sizes.steps // 4
    with bench.network(arm, seed) as network:
        trained = bench.train(
            network, rate, seed, bench.encode(task.train), None, lambda: bench.loss(test, 1), (early,)
        )
        return {
            EARLY.key: trained.watched[early],
            LATE.key: bench.loss(test, 1),
            "mean training loss": fmean(trained.losses),
        }


RATES, SMALL = (1e-3, 3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3, 1e-2)  # starts from the weight are larger
CLAIM = Claim(
    name="convergence",
    title="QR-LoRA: training Q and R from the weight, against LoRA and PiSSA",
    paper="arXiv 2507.04599",
    arms=(
        Arm("lora", rates=RATES),
        Arm("qrlora", "qrlora", rates=SMALL),
        Arm("pissa", "pissa", rates=SMALL),
    ),
    tune=LATE,
    statements=(
        Statement("QR-LoRA has a lower loss than LoRA after a quarter of the steps", "qrlora", "lora", EARLY),
        Statement("QR-LoRA has a lower loss than LoRA at the end", "qrlora", "lora", LATE),
        Statement(
            "QR-LoRA has a lower loss than PiSSA after a quarter of the steps", "qrlora", "pissa", EARLY
        ),
    ),
    measure=measure,
)
