"""An exponential moving average (EMA) of the trained parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from lowrank.tensors import read_tensors, write_tensors


class Ema:
    """θ̄ ← d·θ̄ + (1 − d)·θ after every step; `applied()` sets the parameters to θ̄ for a block."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = list(parameters), decay
        self.restart()

    def restart(self) -> None:
        """Restart the average from the current parameters."""
        self._means = [p.detach().float().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        for mean, parameter in zip(self._means, self._parameters, strict=True):
            mean.lerp_(parameter.float(), 1 - self._decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Set the parameters to the averages for a block, then restore them bit for bit."""
        raw = [p.detach().clone() for p in self._parameters]
        self._set(self._means)
        try:
            yield
        finally:
            self._set(raw)

    @torch.no_grad()
    def _set(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def save(self, folder: Path) -> None:
        write_tensors(folder / "ema.safetensors", {str(i): mean for i, mean in enumerate(self._means)}, {})

    def load(self, folder: Path) -> None:
        state, _ = read_tensors(folder / "ema.safetensors")
        for i, mean in enumerate(self._means):
            mean.copy_(state[str(i)])
