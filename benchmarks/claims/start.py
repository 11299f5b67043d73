"""ABM-LoRA (arXiv 2511.19145): matching activation signs of a teacher makes the early loss lower.

Compared at equal compute: a step of ABM is a forward of the teacher, and forward and backward of the student,
counted as 4/3 of a training step. Rivals: the same steps of ordinary training, and a start from the teacher's
own file (`--network_weights`).
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.claims.bench import Bench, Examples
from benchmarks.claims.record import Arm, Cell, Claim, Metric, Statement
from lowrank.adapters.network import AdapterNetwork
from lowrank.train.abm_hooks import Boundaries, activations

EARLY, LATE = Metric("held-out loss early"), Metric("held-out loss at the end")
MARGIN = 0.5  # relative to each layer's median
TEACHER = Arm("teacher", rank=4)


def measure(bench: Bench, arm: Arm, rate: float, seed: int) -> Cell:
    """Train a teacher on four pictures of a style, then a new adapter on four others of it."""
    index = seed % bench.world.invented
    first, second = (bench.world.invented_style(index, s) for s in (seed + 300, seed))
    test, data = bench.encode(second.test), bench.encode(second.train)
    steps, kind = bench.sizes.steps, arm.options.get("start")
    with bench.network(TEACHER, seed + 300) as network:
        bench.train(network, 3e-3, seed + 300, bench.encode(first.train))
        taught = [p.detach().clone() for p in network.parameters()]
    spent = steps // 8
    with bench.network(arm, seed) as network:
        if kind == "abm":
            match_signs(bench, network, taught, data, seed, spent)
        if kind == "weights":
            _load(network, taught)
        early = (steps // 4, steps // 4 - round(spent * 4 / 3))[kind == "abm"]
        late = steps if kind != "abm" else steps - round(spent * 4 / 3)
        watched = bench.train(network, rate, seed, data, late, lambda: bench.loss(test, 1), (early,)).watched
        return {EARLY.key: watched[early], LATE.key: bench.loss(test, 1)}


def match_signs(
    bench: Bench, network: AdapterNetwork, taught: list[torch.Tensor], data: Examples, seed: int, steps: int
) -> None:
    """Train a LoRA for some steps on the hinge of the teacher's signs (the paper's stage 1)."""
    places = activations("unet", bench.models.denoiser)
    boundaries = Boundaries(places, MARGIN, True, dict.fromkeys((p.name for p in places), 1.0))
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed + 1)
    with boundaries.watched():
        for _ in range(steps):
            state = generator.get_state()
            own = [p.detach().clone() for p in network.parameters()]
            chosen = torch.randint(len(data.captions), (bench.sizes.batch,), generator=generator).tolist()
            at = generator.get_state()
            _load(network, taught)
            with torch.no_grad():
                boundaries.during("teach", partial(bench.losses, data, chosen, generator))
            _load(network, own)
            generator.set_state(at)
            values = boundaries.during("learn", partial(bench.losses, data, chosen, generator))
            optimizer.zero_grad()
            torch.stack([v for v in values.values() if v.requires_grad]).mean().backward()
            optimizer.step()
            assert not torch.equal(state, generator.get_state())  # each step has its own noise


def _load(network: AdapterNetwork, values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), values, strict=True):
            parameter.copy_(value)


RATES = (3e-3, 1e-2, 3e-2)
CLAIM = Claim(
    name="start",
    title="ABM: early loss at equal compute, with a teacher of the same style",
    paper="arXiv 2511.19145",
    arms=(
        Arm("lora", rank=4, rates=RATES),
        Arm("lora after ABM", rank=4, rates=RATES, options={"start": "abm"}),
        Arm("lora from the teacher's file", rank=4, rates=RATES, options={"start": "weights"}),
    ),
    tune=LATE,
    statements=(
        Statement("ABM has a lower early loss than LoRA at equal compute", "lora after ABM", "lora", EARLY),
        Statement(
            "ABM has a lower early loss than a start from the teacher's file",
            *("lora after ABM", "lora from the teacher's file", EARLY),
        ),
        Statement("ABM has a lower loss than LoRA at the end", "lora after ABM", "lora", LATE),
    ),
    measure=measure,
)
