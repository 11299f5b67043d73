"""LoRA-FA: LoRA whose down projection stays frozen at its random start (arXiv 2308.03303).

    y = W x + s·U·D x        U (O×r) trained from 0; D (r×I) random as in LoRA, frozen

Half of the trained parameters and optimizer states of a LoRA, and for the gradient of U only the projection
D x (r numbers per token) has to be kept instead of x. A file has U and D and is a plain LoRA for every
program.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowrank.adapters.method import LORA_FACTOR, Method
from lowrank.adapters.network_module import bind


@dataclass(frozen=True)
class Options:
    """No options beyond those of every network."""


FACTOR = replace(LORA_FACTOR, trained=("up",), not_recomputable="are drawn at random and stored in this file")


def method(options: Options) -> Method:
    return Method("lora_fa", FACTOR)


create_network, create_network_from_weights = bind(method, Options)
