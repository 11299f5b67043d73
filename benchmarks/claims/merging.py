"""QR-LoRA (arXiv 2507.04599): adapters on one frozen Q can be added with less interference than LoRAs.

Each seed has its own pair of content and style, and draws both by one prompt that no adapter was trained on.
Controls take the claim apart: a random frozen Q, the singular vectors U_r in its place (the same span), the
input side in place of the output side, and a LoRA of equal rank, which has about twice the trained values.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.claims.bench import Bench
from benchmarks.claims.record import Arm, Cell, Claim, Metric, Statement
from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.targets import original_weight

SUM = Metric("both right, sum", True)
WEIGHTS = ((1.0, 1.0), (1.0, 1.4), (1.4, 1.0))  # strengths of style and content; the best balance counts
ALL_RULES = ("concat", "svd", "ties", "dare_linear", "magnitude_prune", "orthogonal", "klora", "ziplora")
CONTENT_STEPS, STYLE_STEPS = 2, 2  # times the steps of the other claims


def random_q(network: AdapterNetwork) -> None:
    """Put random orthonormal columns in place of Q."""
    for layer in network.layers():
        q = layer.get_buffer("q")
        layer.load({"q": torch.linalg.qr(torch.randn(q.flatten(1).shape))[0].reshape(q.shape)})


def singular_q(network: AdapterNetwork) -> None:
    """Put the r strongest left singular vectors of W in place of Q."""
    for layer in network.layers():
        q = layer.get_buffer("q")
        U = torch.linalg.svd(original_weight(layer.host).flatten(1), full_matrices=False)[0]
        layer.load({"q": U[:, : layer.rank].reshape(q.shape)})


def input_side(network: AdapterNetwork) -> None:
    """Freeze the down at the r strongest right singular vectors of W."""
    for layer in network.layers():
        down = layer.get_buffer("down")
        Vh = torch.linalg.svd(original_weight(layer.host).flatten(1), full_matrices=False)[2]
        layer.load({"down": Vh[: layer.rank].reshape(down.shape)})


def measure(bench: Bench, arm: Arm, rate: float, seed: int) -> Cell:
    """Train a content and a style, and draw both together by each rule."""
    world, judge, steps = bench.world, bench.judge, bench.sizes.steps
    content = world.contents[seed % len(world.contents)]
    style = world.styles[(seed // len(world.contents) + seed) % len(world.styles)]
    adapters, values = {}, 0
    for kind, task, times in (
        ("style", world.style(style, seed, 1), STYLE_STEPS),
        ("content", world.content(content, seed), CONTENT_STEPS),
    ):
        with bench.network(arm, seed) as network:
            bench.train(network, rate, seed, bench.encode(task.train), times * steps)
            adapters[kind] = bench.adapter(network, f"{kind} of seed {seed}")
            values = sum(p.numel() for p in network.parameters())
    both, prompts = (
        [adapters["style"], adapters["content"]],
        [world.both_prompt(content)] * bench.sizes.pictures,
    )

    def right(rule: str, weights: tuple[float, float]) -> float:
        drawn = bench.draw_merged(both, weights, rule, prompts, 60 + seed)
        return float(np.mean(judge.content(drawn, content) & judge.style(drawn, style)))

    cell: Cell = {"trained values": values}
    shares = {weights: right("sum", weights) for weights in WEIGHTS}
    cell[SUM.key], cell["both right, sum at 1, 1"] = max(shares.values()), shares[WEIGHTS[0]]
    best = max(shares, key=shares.__getitem__)  # a rule has the balance that is best for the sum
    for rule in arm.options.get("rules", ()) if seed < bench.sizes.seeds else ():
        cell[f"both right, {rule}"] = right(rule, best)
    return cell


RATES = (3e-3, 1e-2, 3e-2)
CLAIM = Claim(
    name="merging",
    title="ΔR against LoRA: content and style in one picture",
    paper="arXiv 2507.04599",
    arms=(
        Arm("lora r8", rank=8, rates=RATES, options={"rules": ALL_RULES}),
        Arm("delta_r r16", "delta_r", 16, rates=RATES, options={"rules": ALL_RULES}),
        Arm("delta_r_triu r16", "delta_r_triu", 16, rates=RATES),
        Arm("qrlora r8", "qrlora", 8, rates=(1e-3, 3e-3, 1e-2)),
        Arm("random Q r16", "delta_r", 16, rates=RATES, prepare=random_q),
        Arm("U_r r16", "delta_r", 16, rates=RATES, prepare=singular_q),
        Arm("input side r16", "lora_fa", 16, rates=RATES, prepare=input_side),
        Arm("lora r16, equal rank", rank=16, rates=RATES),
    ),
    tune=SUM,
    statements=(
        *(
            Statement(f"{arm} has both right more often than LoRA of equal size", arm, "lora r8", SUM)
            for arm in ("delta_r r16", "delta_r_triu r16", "qrlora r8")
        ),
        *(
            Statement(f"ΔR has both right more often than {arm}", "delta_r r16", arm, SUM)
            for arm in ("random Q r16", "U_r r16", "input side r16", "lora r16, equal rank")
        ),
        *(
            Statement(
                f"ΔR has both right more often than LoRA, by {rule}",
                "delta_r r16",
                "lora r8",
                Metric(f"both right, {rule}", True),
            )
            for rule in ALL_RULES
        ),
    ),
    measure=measure,
)
