"""T-LoRA (arXiv 2507.05964): from one picture, keep the subject and follow the prompt better than LoRA."""

from __future__ import annotations

from benchmarks.claims.bench import Bench
from benchmarks.claims.record import Arm, Cell, Claim, Metric, Statement
from lowrank.errors import Refused

IDENTITY, PROMPT = Metric("content right", True), Metric("prompt right", True)
BOTH = Metric("content and prompt right", True)
STEPS = 2  # times the steps of the other claims: one picture has to be learned


def measure(bench: Bench, arm: Arm, rate: float, seed: int) -> Cell:
    """Train one content from one picture; draw it with words that name known styles or places."""
    if not bench.judge.reads_words:
        raise Refused("the claim one_picture scores prompts, which DINO cannot; use --scorer clip")
    names, words = bench.world.contents, bench.world.words
    name = names[seed % len(names)]
    with bench.network(arm, seed) as network:
        bench.train(
            network,
            rate,
            seed,
            bench.encode(bench.world.content(name, seed).train),
            STEPS * bench.sizes.steps,
        )
        drawn = bench.draw([bench.world.content_prompt(name, w) for w in words], 40 + seed)
    content = bench.judge.content(drawn, name)
    prompt = [bool(bench.judge.words(drawn[i : i + 1], w, words)[0]) for i, w in enumerate(words)]
    return {
        IDENTITY.key: float(content.mean()),
        PROMPT.key: sum(prompt) / len(prompt),
        BOTH.key: float((content & prompt).mean()),
    }


RATES = (3e-3, 1e-2, 3e-2)
LORAS = {rank: f"lora r{rank}" for rank in (4, 16)}
CLAIM = Claim(
    name="one_picture",
    title="T-LoRA: one picture, subject against prompt",
    paper="arXiv 2507.05964",
    arms=(
        Arm(LORAS[4], rank=4, rates=RATES),
        Arm(LORAS[16], rank=16, rates=RATES),
        Arm("t-lora r4, min 2", "tlora", 4, {"orthogonal": "False", "tlora_min_rank": "2"}, RATES),
        Arm("t-lora r16, min 8", "tlora", 16, {"orthogonal": "False", "tlora_min_rank": "8"}, RATES),
        Arm("t-lora r16, min 2", "tlora", 16, {"orthogonal": "False", "tlora_min_rank": "2"}, RATES),
        Arm("t-lora r16, min 8, orthogonal", "tlora", 16, {"tlora_min_rank": "8"}, RATES),
    ),
    tune=BOTH,
    statements=(
        Statement("T-LoRA follows prompts better than LoRA, rank 4", "t-lora r4, min 2", LORAS[4], PROMPT),
        Statement("T-LoRA follows prompts better than LoRA, rank 16", "t-lora r16, min 8", LORAS[16], PROMPT),
        Statement(
            "T-LoRA with min rank 2 follows prompts better than LoRA, rank 16",
            "t-lora r16, min 2",
            LORAS[16],
            PROMPT,
        ),
        Statement(
            "orthogonal T-LoRA follows prompts better than LoRA, rank 16",
            "t-lora r16, min 8, orthogonal",
            LORAS[16],
            PROMPT,
        ),
        Statement(
            "T-LoRA has content and prompt right more often than LoRA, rank 16",
            "t-lora r16, min 8",
            LORAS[16],
            BOTH,
        ),
        Statement(
            "T-LoRA keeps the content better than LoRA, rank 16", "t-lora r16, min 8", LORAS[16], IDENTITY
        ),
    ),
    measure=measure,
)
