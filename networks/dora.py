"""DoRA: LoRA turns the rows of a weight, and their lengths are trained apart (arXiv 2402.09353, eq. 5).

    y = m ⊙ (W + s·U·D) x / ‖W + s·U·D‖ + b        one norm and one m per output row, m₀ = ‖W‖

The norm takes part in the forward and not in the gradient (the paper's section 4.3). As in the authors' code
and in PEFT, rows are those of the stored weight, one for each output. W + s·U·D is never formed: the branch
is (g − 1) ⊙ W x + g ⊙ s·U·D x with g = m/‖W + s·U·D‖, so a fresh adapter is the base model bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.adapters.method import LORA_FACTOR, Magnitude, Method
from lowrank.adapters.network_module import bind


@dataclass(frozen=True)
class Options:
    """DoRA has none of its own."""


LENGTHS = Method("dora", magnitude=Magnitude())


def method(options: Options) -> Method:
    return Method("dora", LORA_FACTOR, magnitude=LENGTHS.magnitude)


create_network, create_network_from_weights = bind(method, Options)
