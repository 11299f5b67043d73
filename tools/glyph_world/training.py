"""The training loop of all demo models: cosine learning rate, averaged weights, checkpoints, a progress bar.

Batches depend only on the seed and the step, so that a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.errors import Refused
from lowrank.files import atomic


@dataclass(frozen=True)
class Plan:
    """Number of steps, learning rate and other settings of a training."""

    steps: int
    lr: float
    warmup: int = 200
    floor: float = 0.02  # final learning rate, as a fraction of lr
    decay: float = 0.998  # of the averaged weights
    weight_decay: float = 0.01
    save_every: float = 120.0  # seconds
    seed: int = 0

    def rate(self, step: int) -> float:
        """Return the learning rate at a step, as a fraction of `lr`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def at_step(seed: int, step: int) -> tuple[np.random.Generator, torch.Generator]:
    """Return the random generators of one step, for numpy and for torch (on the CPU)."""
    rng = np.random.default_rng((seed, step))
    return rng, torch.Generator().manual_seed(int(rng.integers(2**62)))


def load_weights(modules: Mapping[str, nn.Module], folder: Path) -> None:
    """Load the weights of a published pipeline in `folder` into its modules, to train from them.

    Raises `Refused` if a module's folder or weights are missing.
    """
    from safetensors.torch import load_model

    for name, module in modules.items():
        files = sorted((folder / name).glob("*.safetensors"))
        if not files:
            raise Refused(
                f"--start {folder.parent} has no weights of {folder.name}/{name}; leave --start out"
            )
        load_model(module, files[0])


def fit(
    name: str,
    plan: Plan,
    modules: Mapping[str, nn.Module],
    loss: Callable[[int], dict[str, Tensor]],
    folder: Path,
    minutes: float | None = None,
) -> dict:
    """Train `modules` on `loss(step)["loss"]`, load the averaged weights into them, and return a summary.

    Resumes from a checkpoint in `folder`. `minutes` stops early; the schedule is still that of `plan.steps`,
    so a stopped run can be resumed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = nn.ModuleDict(dict(modules))
    averaged = {key: value.detach().clone() for key, value in model.state_dict().items()}
    optimizer = _optimizer(model, plan)
    path, first, spent = folder / f"{name}.pt", 0, 0.0
    if path.is_file():
        averaged, first, spent = _resume(path, model, optimizer)

    def save(step: int, seconds: float) -> None:
        state = {"model": model.state_dict(), "averaged": averaged, "optimizer": optimizer.state_dict()}
        with atomic(path) as part:
            torch.save({**state, "step": step, "seconds": seconds}, part)

    model.train()
    started = saved = time.monotonic()
    smooth: dict[str, float] = {}
    done = first
    bar = tqdm(range(first, plan.steps), initial=first, total=plan.steps, desc=name, mininterval=5)
    with (folder / f"{name}.jsonl").open("a") as log:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = plan.lr * plan.rate(step)
            values = loss(step)
            optimizer.zero_grad(set_to_none=True)
            values["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            _average(averaged, model, min(plan.decay, (1 + step) / (10 + step)))
            done = step + 1
            for key, value in values.items():
                smooth[key] = 0.98 * smooth.get(key, value.item()) + 0.02 * value.item()
            if done % 100 == 0:
                seconds = spent + time.monotonic() - started
                log.write(json.dumps({"step": done, "seconds": round(seconds, 1), **smooth}) + "\n")
                log.flush()
                bar.set_postfix({key: f"{value:.4f}" for key, value in smooth.items()}, refresh=False)
            if time.monotonic() - saved > plan.save_every:
                save(done, spent + time.monotonic() - started)
                saved = time.monotonic()
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                break
    seconds = spent + time.monotonic() - started
    save(done, seconds)
    model.load_state_dict(averaged)
    model.eval()
    losses = {key: round(v, 5) for key, v in smooth.items()}
    return {"steps": done, "minutes": round(seconds / 60, 1), **losses}


def _resume(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], int, float]:
    """Load a checkpoint; return the averaged weights, the step and the seconds spent."""
    state = torch.load(path, weights_only=True, map_location=next(model.parameters()).device)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["averaged"], state["step"], state["seconds"]


def _optimizer(model: nn.Module, plan: Plan) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and kernels only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.99))


@torch.no_grad()
def _average(averaged: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the model's, in place; integer tensors stay unchanged."""
    current = model.state_dict()
    floating = [key for key in averaged if averaged[key].is_floating_point()]
    torch._foreach_lerp_([averaged[k] for k in floating], [current[k] for k in floating], 1 - decay)
