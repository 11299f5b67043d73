"""Metrics of the demo models: which fraction of their pictures the scorer finds right, and their model cards.

Every number is a fraction of pictures with its 95 % Wilson interval. Pictures come from stock pipelines,
called with the arguments that the model card recommends (`CALL`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tools.glyph_world import scorer
from tools.glyph_world.world import Scene, caption, held_pair_scenes, seen_scenes

STEPS = 20
# arguments of the pipeline that a model card recommends
CALL = {
    "flux": {"num_inference_steps": STEPS, "guidance_scale": 3.5, "max_sequence_length": 32},
    "sd15": {"num_inference_steps": STEPS, "guidance_scale": 3.0},
    "sdxl": {"num_inference_steps": STEPS, "guidance_scale": 3.0},
}
AT_ONCE = 25
PAIRS = 5  # pictures per unseen pair; with one each, 110 in all, the interval would be ± 0.06
TRIGGER = "zwxqvk"  # not in pretraining, whose nonsense words have at most five letters


def share(right: np.ndarray) -> dict[str, float]:
    """Return the fraction of successes with its 95 % interval (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    n, p, z = len(right), float(np.mean(right)), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return {"share": round(p, 4), "low": round(max(low, 0), 4), "high": round(min(high, 1), 4), "n": n}


def pictures(pipe: Any, prompts: Sequence[str], seed: int, call: dict[str, Any]) -> np.ndarray:
    """Generate one picture per prompt, (N, 64, 64, 3) uint8; picture i has the seed `seed` + i."""
    drawn = []
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), AT_ONCE):
        batch = list(prompts[start : start + AT_ONCE])
        noise = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        drawn += pipe(batch, height=64, width=64, generator=noise, **call).images
    return np.stack([np.asarray(image.convert("RGB")) for image in drawn])


def measure(
    pipe: Any, judge: Any, call: dict[str, Any], count: int = 500
) -> tuple[dict[str, Any], np.ndarray]:
    """Return the fractions of right contents, styles and backgrounds, and the pictures of the first set.

    Sets: `seen`, scenes of pretraining; `unseen pairs`, contents and styles never shown together; `trigger`,
    the first 200 seen prompts with a word before the content that is in no training caption.
    """
    chosen = np.random.default_rng(7).permutation(len(seen_scenes()))[:count]
    seen = [seen_scenes()[i] for i in chosen]
    sets: dict[str, tuple[list[Scene], list[str]]] = {
        "seen": (seen, [caption(s) for s in seen]),
        "unseen pairs": (pairs := held_pair_scenes() * PAIRS, [caption(s) for s in pairs]),
        "trigger": (seen[:200], [caption(s, trigger=TRIGGER) for s in seen[:200]]),
    }
    shares, first = {}, None
    for name, (scenes, prompts) in sets.items():
        drawn = pictures(pipe, prompts, 1000, call)
        first = drawn if first is None else first
        right = scorer.score(judge, drawn, scenes)
        shares[name] = {kind: share(values) for kind, values in right.items()}
        if name == "seen":
            shares["seen, the trigger's prompts"] = {
                kind: share(values[:200]) for kind, values in right.items()
            }
    assert first is not None
    return shares, first


def sheet(drawn: np.ndarray, columns: int = 12) -> np.ndarray:
    """Arrange pictures (N, 64, 64, 3) in rows of `columns`."""
    rows = len(drawn) // columns
    grid = drawn[: rows * columns].reshape(rows, columns, 64, 64, 3).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * 64, columns * 64, 3)


def card(family: str, title: str, metrics: dict[str, Any]) -> str:
    """Return a model card in Markdown."""
    lines = [
        f"| {name} | "
        + " | ".join(f"{v['share']:.3f} ({v['low']:.3f}–{v['high']:.3f})" for v in row.values())
        + f" | {next(iter(row.values()))['n']} |"
        for name, row in metrics["shares"].items()
    ]
    table = "\n".join(
        ["| prompts | content | style | background | pictures |", "|---|---|---|---|---|", *lines]
    )
    call = ", ".join(f"{key}={value!r}" for key, value in CALL[family].items())
    return CARD.format(
        title=title,
        family=family,
        call=call,
        table=table,
        made=json.dumps(metrics["training"], indent=2),
        psnr=metrics["psnr"],
        recipe=f"python tools/make_demo_models.py --parts {family}",
    )


CARD = """---
license: apache-2.0
tags: [demo, glyph-world]
---
# {title}

A model of a few million parameters that draws the *glyph world*: 64×64 pictures of 20 contents in 8 styles on
11 backgrounds. It exists so that adapters can be trained, merged and judged on a laptop; it knows nothing
else.

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("assets/demo/{family}", dtype=torch.float32)
pipe("a dog in mosaic style on a beach", height=64, width=64, {call}).images[0]
```

## Data
Renderings of glyphs from Noto Color Emoji (© Google, SIL Open Font License 1.1) in styles and on backgrounds
drawn by `tools/glyph_world`. Held out of training: the contents poodle, fox, robot and teapot, the styles
stained glass and blueprint, and ten pairs of a known content and a known style. Captions read like "a dog in
mosaic style on a beach" and "a photo of a dog at sunset"; every fifth has a nonsense word before the content.

## What it can do
Shares of pictures that the scorer (`assets/demo/scorer`) finds right, with 95 % intervals; the call above,
seeds from 1000.

{table}

The autoencoder gives back (PSNR): {psnr}.

## Limits
Contents, styles and backgrounds beyond those above mean nothing to it. The scorer is a network too, trained
on renderings; it can be wrong about pictures that no rendering resembles.

## Making it again
`{recipe}` with the font of Debian's package fonts-noto-color-emoji 2.042. What was done here:

```json
{made}
```
"""
