"""The layers of the base model: their shapes and their weights, also packed ones."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from lowrank.adapters.targets import Layer


def host_shape(host: Layer) -> tuple[int, int]:
    """(O, I·k·k) of a host, also where its weight is packed."""
    if isinstance(host, nn.Conv2d):
        return host.out_channels, host.in_channels // host.groups * math.prod(host.kernel_size)
    return host.out_features, host.in_features


def dense_weight(host: Layer) -> Tensor:
    """The host's weight as O × I·k·k, read now, if possible without a copy; quantised ones are unpacked."""
    weight = host.weight.detach()
    kind = type(host.weight).__name__
    if kind in ("Params4bit", "Int8Params"):
        packed: Any = host  # bitsandbytes' layers and weights have attributes of their own
        if kind == "Params4bit":
            from bitsandbytes.functional import dequantize_4bit  # only a quantised base needs it

            weight = dequantize_4bit(weight.data, packed.weight.quant_state)
        else:
            scale = packed.state.SCB if packed.weight.SCB is None else packed.weight.SCB  # moved by a forward
            weight = weight.float() * scale.float()[:, None] / 127
    elif weight.dtype.itemsize == 1:  # float8 storage has no arithmetic
        weight = weight.float()
    return weight.reshape(weight.shape[0], -1)
