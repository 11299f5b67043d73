"""ZipLoRA (arXiv 2311.13600): coefficients for the columns of each ΔW, trained on the model itself.

ΔW = ΔW_style·diag(m₁) + ΔW_content·diag(m₂), from m = 1. The loss asks that the merged model answers as the
style alone where the style is asked for, as the content alone where the content is, and that both use other
columns: |D − D_style|² + |D − D_content|² + λ·Σ_layers mean|m₁·m₂|. The questions are the denoiser's calls
while each adapter draws its own prompt, so that no training picture is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank.combine.pair_sum import AttachedPairs
from lowrank.combine.rules import RuleOptions


class Call(NamedTuple):
    """One call of a denoiser, and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    answer: Tensor


def answer_of(output: Any) -> Tensor:
    """The prediction in what a denoiser returns: a tensor, a tuple, or an output with `sample`."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


@contextlib.contextmanager
def recorded(denoiser: nn.Module) -> Iterator[list[Call]]:
    """The calls of a denoiser within the block."""
    calls: list[Call] = []

    def record(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        calls.append(Call(args, dict(kwargs), answer_of(output).detach().clone()))

    handle = denoiser.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def learn_columns(
    attached: AttachedPairs, denoiser: nn.Module, calls: Sequence[Sequence[Call]], options: RuleOptions
) -> list[float]:
    """Train the coefficients of the layers of all adapters into `attached.pairs`; returns the losses.

    `calls` has, for each adapter in order, calls of the denoiser with this adapter alone.
    """
    pairs, count = attached.pairs, len(calls)
    inside = set(map(id, denoiser.modules()))
    layers = [
        (name, layer)
        for name, layer in attached.layers()
        if len(pairs.parts[name]) == count and id(layer.host) in inside
    ]
    columns: dict[str, list[nn.Parameter]] = {}
    parts: dict[str, list[Tensor]] = {}
    for name, layer in layers:
        device = layer.get_buffer("down").device
        parts[name] = [pair.scale * pair.down.to(device, torch.float32) for _, pair in pairs.parts[name]]
        columns[name] = [nn.Parameter(torch.ones(part.shape[1], device=device)) for part in parts[name]]
    optimizer = torch.optim.Adam([m for ms in columns.values() for m in ms], lr=options.rate)
    draw = torch.Generator().manual_seed(options.seed)
    attached.set([1.0] * count)
    losses = []
    for _ in range(options.steps):
        for name, layer in layers:
            buffer = layer.get_buffer("down")
            merged = torch.cat([p * m for p, m in zip(parts[name], columns[name], strict=True)])
            layer.down = merged.to(buffer.dtype).reshape(buffer.shape)
        penalty = torch.stack([(ms[0] * ms[1]).abs().mean() for ms in columns.values()]).sum()
        loss = options.penalty * penalty
        for asked in calls:
            call = asked[int(torch.randint(len(asked), (), generator=draw))]
            answer = answer_of(denoiser(*call.args, **call.kwargs))
            loss = loss + (answer.float() - call.answer.float()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    for _, layer in layers:
        layer.down = layer.get_buffer("down").detach()
    pairs.columns = {name: [m.detach().cpu() for m in ms] for name, ms in columns.items()}
    return losses
