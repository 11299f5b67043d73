"""The scorer: a small ResNet that says which content, style and background a picture shows.

It is transformers' `ResNetForImageClassification` with one label per content, style and background, all in
one output; a label is "content: dog" and so on. It learns every content and style, the held-out ones too.
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
    """A ResNet of four basic blocks: pictures (B, 3, 64, 64) in [−1, 1], 45 logits out."""
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
    """(B, 45) logits as one tensor for each of content, style and background."""
    return dict(zip(LABELS, logits.split([len(labels) for labels in LABELS.values()], dim=1), strict=True))


def answers(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """The right label numbers of scenes, (B,) for each kind."""
    return {
        kind: torch.tensor([labels.index(getattr(s, kind)) for s in scenes])
        for kind, labels in LABELS.items()
    }


def train(
    model: Any, pictures: np.ndarray, scenes: Sequence[Scene], folder: Path, device: str, minutes=None
) -> dict:
    """Cross-entropy of the three questions on pictures that are blurred, shifted, noisy and off in colour."""
    model.to(device)
    right = answers(scenes)

    def loss(step: int) -> dict[str, Tensor]:
        rng, generator = at_step(PLAN.seed, step)
        chosen = rng.integers(len(pictures), size=BATCH)
        x = _worn(to_tensor(pictures[chosen], device), generator)
        logits = heads(model(x).logits)
        each = {kind: F.cross_entropy(logits[kind], right[kind][chosen].to(device)) for kind in LABELS}
        return {"loss": sum(each.values()), **each}  # pyright: ignore[reportReturnType]

    return fit("scorer", PLAN, {"scorer": model}, loss, folder, minutes)


def _worn(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures as a generator might draw them: some soft, some noisy, a few pixels away, off in colour."""
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
    """The scorer in fp32, ready to read pictures."""
    from transformers import ResNetForImageClassification

    return ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def read(model: Any, pictures: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each kind the label numbers (N,) of pictures (N, 64, 64, 3), and their probabilities (N,)."""
    found = {kind: ([], []) for kind in LABELS}
    for x in to_tensor(pictures, next(model.parameters()).device).split(256):
        for kind, logits in heads(model(x).logits.float()).items():
            best = logits.softmax(1).max(1)
            found[kind][0].append(best.indices.cpu())
            found[kind][1].append(best.values.cpu())
    return {kind: (torch.cat(i).numpy(), torch.cat(p).numpy()) for kind, (i, p) in found.items()}


def score(model: Any, pictures: np.ndarray, scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """Per picture whether content, style and background are right, (N,) booleans."""
    seen = read(model, pictures)
    return {kind: seen[kind][0] == right.numpy() for kind, right in answers(scenes).items()}
