"""A run's first number that is not finite: where it arose, and the error that ends the run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank.errors import Refused


@contextlib.contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for a block, then whatever it was."""
    before = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(before)


def first_not_finite(denoiser: nn.Module, again: Callable[[], object]) -> str:
    """Run the step once more without gradient and name the first module whose output is not finite."""
    found: list[str] = []

    def watch(name: str):
        def hook(_module, _inputs, output):
            tensors = [
                t
                for t in (output if isinstance(output, (tuple, list)) else [output])
                if isinstance(t, Tensor)
            ]
            if not found and any(not torch.isfinite(t).all() for t in tensors):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in denoiser.named_modules() if name]
    try:
        with torch.no_grad():
            again()
    finally:
        for handle in handles:
            handle.remove()
    return f"module {found[0]}" if found else "the loss itself (every module's output is finite)"


def refuse_not_finite(what: str, step: int, images: Sequence[Path], where: str, kept: Path | None) -> None:
    """Stop the run: one sentence with step, module and image, and what is left to go on from."""
    checkpoint = f"the last good checkpoint is {kept}" if kept else "no checkpoint had been written yet"
    raise Refused(
        f"{what} is not finite at step {step}: first in {where}, with {', '.join(str(i) for i in images)}; "
        f"{checkpoint}; lower --learning_rate, use --mixed_precision bf16, or remove the image"
    )
