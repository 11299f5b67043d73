"""The scorer: a small ResNet that classifies the content, style and background of a picture.

It is transformers' `ResNetForImageClassification` with one output per content, style and background; labels
are "content: dog" and so on. It is trained on all contents and styles, including the held-out ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.glyph_world.autoencoder import to_tensor
from tools.glyph_world.training import Plan, at_step, fit
from tools.glyph_world.world import BACKGROUNDS, CONTENTS, STYLES, Scene

LABELS = {"content": tuple(CONTENTS), "style": STYLES, "background": tuple(BACKGROUNDS)}
PLAN = Plan(steps=5000, lr=2e-3, weight_decay=0.02, decay=0.995)
BATCH = 64


def scorer() -> Any:
    """Return a ResNet of four basic blocks, from pictures (B, 3, 64, 64) in [−1, 1] to 45 logits."""
    from transformers import ResNetConfig, ResNetForImageClassification

    names = [f"{kind}: {name}" for kind, labels in LABELS.items() for name in labels]
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 48, 64, 96],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )
    )


def heads(logits: Tensor) -> dict[str, Tensor]:
    """Split (B, 45) logits into content, style and background."""
    return dict(zip(LABELS, logits.split([len(labels) for labels in LABELS.values()], dim=1), strict=True))


def answers(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Return the label indices (B,) of scenes, for content, style and background."""
    return {
        kind: torch.tensor([labels.index(getattr(s, kind)) for s in scenes])
        for kind, labels in LABELS.items()
    }


def train(
    model: Any, pictures: np.ndarray, scenes: Sequence[Scene], folder: Path, device: str, minutes=None
) -> dict:
    """Train with the sum of three cross-entropies on blurred, noisy, shifted and recoloured pictures."""
    model.to(device)
    right = answers(scenes)

    def loss(step: int) -> dict[str, Tensor]:
        rng, generator = at_step(PLAN.seed, step)
        chosen = rng.integers(len(pictures), size=BATCH)
        x = _augmented(to_tensor(pictures[chosen], device), generator)
        logits = heads(model(x).logits)
        each = {kind: F.cross_entropy(logits[kind], right[kind][chosen].to(device)) for kind in LABELS}
        return {"loss": sum(each.values()), **each}  # pyright: ignore[reportReturnType]

    return fit("scorer", PLAN, {"scorer": model}, loss, folder, minutes)


def _augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, noise, recolour and shift pictures at random, as a generative model might."""
    u = torch.rand(len(x), 6, generator=generator).to(x.device)[..., None, None, None]
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, (u[:, 0] * 1.6 - 0.6).clamp(0, 1))
    x = x + (u[:, 1] - 0.6).clamp(min=0) * 0.5 * torch.randn(x.shape, generator=generator).to(x)
    x = x * (0.85 + 0.3 * u[:, 2]) + (0.2 * u[:, 3] - 0.1)
    down, right = (int(v) for v in torch.randint(-4, 5, (2,), generator=generator))
    x = F.pad(x, (4, 4, 4, 4), mode="replicate")[
        ..., 4 + down : 4 + down + x.shape[-2], 4 + right : 4 + right + x.shape[-1]
    ]
    return x.clamp(-1, 1)


def load(folder: Path) -> Any:
    """Load the scorer in fp32 for inference."""
    from transformers import ResNetForImageClassification

    return ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def read(model: Any, pictures: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return for each kind the labels (N,) of pictures (N, 64, 64, 3) and their probabilities (N,)."""
    results = {kind: ([], []) for kind in LABELS}
    for x in to_tensor(pictures, next(model.parameters()).device).split(256):
        for kind, logits in heads(model(x).logits.float()).items():
            best = logits.softmax(1).max(1)
            results[kind][0].append(best.indices.cpu())
            results[kind][1].append(best.values.cpu())
    return {kind: (torch.cat(i).numpy(), torch.cat(p).numpy()) for kind, (i, p) in results.items()}


def score(model: Any, pictures: np.ndarray, scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """Return whether content, style and background of each picture are right, (N,) booleans."""
    labels = read(model, pictures)
    return {kind: labels[kind][0] == right.numpy() for kind, right in answers(scenes).items()}
