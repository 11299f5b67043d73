"""LoRA: a trained down D and a trained up U beside a frozen weight W (Hu et al., arXiv 2106.09685, eq. 3).

    y = W x + s·U·D x        D kaiming-uniform, U = 0, s = alpha/rank

Argument names, starting values and file keys are those of kohya sd-scripts' networks.lora. On a diffusers
FLUX, where q, k and v are separate layers, file keys are PEFT's.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.adapters.method import LORA_FACTOR, Method
from lowrank.adapters.network_module import bind


@dataclass(frozen=True)
class Options:
    """No options beyond those of every network."""


def method(options: Options) -> Method:
    return Method("lora", LORA_FACTOR)


create_network, create_network_from_weights = bind(method, Options)
