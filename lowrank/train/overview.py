"""What a run will train, in a few lines before its first step: layers by kind."""

from __future__ import annotations

from collections import Counter

from torch import nn

from lowrank.adapters.network import AdapterNetwork
from lowrank.train.network_module import KohyaNetwork

_PARTS = {"unet": "denoiser", "te": "text encoder", "te1": "text encoder 1", "te2": "text encoder 2"}
_KINDS = (  # of layers, by a part of their path; the first that fits
    ("attention", ("attn", ".to_", "self_attn")),
    ("feed-forward", (".ff", "ff_context", "mlp", ".net.", "linear1", "linear2")),
    ("modulation", ("norm", ".mod", "modulation")),
    ("time and text embedding", ("time", "embed")),
    ("projection in and out", ("proj_in", "proj_out")),
)


def layer_kind(path: str, module: nn.Module) -> str:
    """The kind of a layer, for people: attention, feed-forward, convolution, …"""
    if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
        return "convolution"
    dotted = f".{path}"
    return next((kind for kind, marks in _KINDS if any(mark in dotted for mark in marks)), "other")


def describe_layers(network: KohyaNetwork) -> list[str]:
    """A line for each part of the model: how many of its layers are adapted, by kind."""
    if not isinstance(network, AdapterNetwork):
        return []
    counts: dict[str, Counter[str]] = {}
    for layer in network.layers():
        target = network.targets[layer.name]
        counts.setdefault(target.part, Counter())[layer_kind(target.path, target.module)] += 1
    return [
        f"{_PARTS.get(part, part)}: {sum(kinds.values())} layers "
        f"({', '.join(f'{kind} {count}' for kind, count in kinds.most_common())})"
        for part, kinds in counts.items()
    ]
