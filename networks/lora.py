"""LoRA: a trained down and a trained up beside the layer (Hu et al., arXiv 2106.09685, eq. 3).

    y = W x + s·U·D x        D kaiming-uniform, U = 0, s = alpha/rank

Argument names and start values are those of kohya sd-scripts' networks.lora, and so are keys in its hosts.
On a diffusers FLUX, whose q, k and v are separate layers, files have PEFT's keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.adapters.method import LORA_FACTOR, Method
from lowrank.adapters.network_module import bind


@dataclass(frozen=True)
class Options:
    """LoRA has none of its own."""


def method(options: Options) -> Method:
    return Method("lora", LORA_FACTOR)


create_network, create_network_from_weights = bind(method, Options)
