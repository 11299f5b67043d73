"""LoRA's factor, U·D with U = 0, for every method that is built on it (Hu et al., arXiv 2106.09685, eq. 3).

It is no part of networks/lora.py because in a kohya checkout `networks.lora` is kohya's.
"""

from __future__ import annotations

import torch

from lowrank.adapters.factor import kaiming
from lowrank.adapters.method import Factor, Start


def start(weights, ranks, scales) -> Start:
    """D ~ U(−1/√I, 1/√I), U = 0."""
    values = {}
    for name, weight in weights.items():
        outs, ins = weight.shape
        values[name] = {"down": kaiming(ranks[name], (ins,)), "up": torch.zeros(outs, ranks[name])}
    return values, {}


FACTOR = Factor(start, trained=("down", "up"))
