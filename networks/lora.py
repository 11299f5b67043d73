"""LoRA: a trained down and a trained up beside the layer (Hu et al., arXiv 2106.09685, eq. 3).

    y = W x + s·U·D x        D kaiming-uniform, U = 0, s = alpha/rank

Argument names and start values are those of kohya sd-scripts' networks.lora, and so are keys in its hosts.
On a diffusers FLUX, whose q, k and v are separate layers, files have PEFT's keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowrank.adapters.factor import kaiming
from lowrank.adapters.kohya import bind
from lowrank.adapters.method import Factor, Method, Start


@dataclass(frozen=True)
class Options:
    """LoRA has none of its own."""


def start(weights, ranks, scales) -> Start:
    """D ~ U(−1/√I, 1/√I), U = 0."""
    values = {}
    for name, weight in weights.items():
        outs, ins = weight.shape
        values[name] = {"down": kaiming(ranks[name], (ins,)), "up": torch.zeros(outs, ranks[name])}
    return values, {}


def method(options: Options) -> Method:
    return Method("lora", Factor(start, trained=("down", "up")))


create_network, create_network_from_weights = bind(method, Options)
