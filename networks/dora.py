"""DoRA: LoRA for the direction of each weight row, a trained m for its length (arXiv 2402.09353, eq. 5).

    y = m ⊙ (W + s·U·D) x / ‖W + s·U·D‖ + b        norm per output row; m (O,) trained from m₀ = ‖W‖

The norm is treated as a constant in the backward pass (section 4.3 of the paper). The paper's columns
are the rows of torch's weight (one per output), as in the authors' code and in PEFT. W + s·U·D is never
formed: with g = m/‖W + s·U·D‖ the branch computes (g − 1) ⊙ W x + g ⊙ s·U·D x, which is exactly 0 for a new
adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.adapters.method import LORA_FACTOR, Magnitude, Method
from lowrank.adapters.network_module import bind


@dataclass(frozen=True)
class Options:
    """No options beyond those of every network."""


LENGTHS = Method("dora", magnitude=Magnitude())


def method(options: Options) -> Method:
    return Method("dora", LORA_FACTOR, magnitude=LENGTHS.magnitude)


create_network, create_network_from_weights = bind(method, Options)
