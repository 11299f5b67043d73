"""Evaluation mode, and the search for the module whose output is not finite."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put the network into evaluation mode for a block, then restore its mode."""
    before = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(before)


def first_not_finite(denoiser: nn.Module, repeat: Callable[[], object]) -> str:
    """Call `repeat`, the failed step, without gradients; name the first module whose output is not finite."""
    names: list[str] = []

    def watch(name: str):
        def hook(_module, _inputs, output):
            outputs = output if isinstance(output, (tuple, list)) else [output]
            if any(isinstance(value, Tensor) and not torch.isfinite(value).all() for value in outputs):
                names.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in denoiser.named_modules() if name]
    try:
        with torch.no_grad():
            repeat()
    finally:
        for handle in handles:
            handle.remove()
    return f"module {names[0]}" if names else "the loss itself (the output of every module is finite)"
