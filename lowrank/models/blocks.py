"""The blocks of a denoiser, and how its base is stored and placed.

Blocks are what a model repeats: FLUX's double and single blocks, a U-Net's residual and transformer blocks.
Their linear layers and convolutions hold nearly all weights. What is outside of them (first and last
projections, embeddings of time and text) is small, sensitive, and keeps its precision.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from lowrank.errors import Refused
from lowrank.models import frozen
from lowrank.models.place import BUFFERS, Stream
from lowrank.models.storage import Format, plain_kind

logger = logging.getLogger(__name__)

_RESIDENT = 2  # blocks of each kind that stay on the device, as in kohya's scripts
_UNET_BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock")


def stacks(denoiser: Any) -> list[list[nn.Module]]:
    """The blocks by kind, in the order of use: FLUX's double and single ones, a U-Net's in one list."""
    if hasattr(denoiser, "transformer_blocks"):
        return [list(denoiser.transformer_blocks), list(denoiser.single_transformer_blocks)]
    levels = (*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks)
    blocks = (part for level in levels if level is not None for part in level.modules())
    return [[block for block in blocks if type(block).__name__ in _UNET_BLOCKS]]


def containers(denoiser: Any) -> list[nn.Module]:
    """The parts of a denoiser whose layers can be stored in another kind: all blocks, and what joins them."""
    if hasattr(denoiser, "transformer_blocks"):
        return [denoiser.transformer_blocks, denoiser.single_transformer_blocks]
    parts = (denoiser.down_blocks, denoiser.mid_block, denoiser.up_blocks)
    return [part for part in parts if part is not None]


def swapped(denoiser: nn.Module, count: int) -> list[nn.Module]:
    """The blocks whose weights `--blocks_to_swap count` keeps in host memory: the last ones of each kind.

    FLUX's are counted as in kohya's scripts: half of them double blocks, and two single blocks for each other
    one. Raises `Refused` if fewer than two blocks of a kind would stay on the device.
    """
    kinds = stacks(denoiser)
    counts = [count] if len(kinds) == 1 else [count // 2, (count - count // 2) * 2]
    if any(number > len(blocks) - _RESIDENT for number, blocks in zip(counts, kinds, strict=True)):
        most = most_swapped(denoiser)
        has = (
            f"{len(kinds[0])} blocks"
            if len(kinds) == 1
            else f"{len(kinds[0])} double and {len(kinds[1])} single blocks, of which two count as one"
        )
        raise Refused(
            f"--blocks_to_swap {count} exceeds {most}: this model has {has}, and {_RESIDENT} of each kind "
            f"stay on the device; give {most} or less"
        )
    return [
        block
        for number, blocks in zip(counts, kinds, strict=True)
        for block in blocks[len(blocks) - number :]
    ]


def most_swapped(denoiser: nn.Module) -> int:
    """The largest --blocks_to_swap of a denoiser."""
    free = [max(0, len(blocks) - _RESIDENT) for blocks in stacks(denoiser)]
    if len(free) == 1:
        return free[0]
    double, single = free
    return next(n for n in range(2 * double + 1, -1, -1) if n // 2 <= double and (n - n // 2) * 2 <= single)


def freeze_base(denoiser: nn.Module) -> None:
    """Turn the layers in the denoiser's blocks into frozen ones, with unchanged weights.

    Do it before adapters are attached; they chain the forward that a layer has then. Raises `Refused` for a
    base that another library has quantised.
    """
    for container in containers(denoiser):
        for name, module in list(container.named_modules()):
            if frozen.is_frozen(module):
                continue
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.is_floating_point():
                raise Refused(
                    f"the base is quantised already ({name} is {type(module.weight).__name__}), so "
                    "--fp8_base, --base_storage and --blocks_to_swap do not apply; leave them out"
                )
            if frozen.can_freeze(module):
                frozen.freeze(module)


def store_base(
    denoiser: nn.Module, kind: str | None, blocks_to_swap: int = 0, device: torch.device | str = "cpu"
) -> Stream | None:
    """Store the frozen layers of the blocks in a kind of `storage.KINDS` (None: as they are), and stream the
    weights of `blocks_to_swap` blocks from host memory to `device`; returns the stream, or None without one.
    """
    for layer in frozen.frozen_layers(containers(denoiser)):
        frozen.store(layer, kind)
    if not blocks_to_swap:
        return None
    place = Stream(device)
    for layer in frozen.frozen_layers(swapped(denoiser, blocks_to_swap)):
        frozen.stream(layer, place)
    logger.info(
        "%d blocks swapped: %.2f GiB in host memory, %.2f GiB of buffers on the device",
        *(blocks_to_swap, place.host_bytes / 2**30, place.device_bytes / 2**30),
    )
    return place


def base_bytes(
    denoiser: nn.Module, dtype: torch.dtype, kind: str | None = None, blocks_to_swap: int = 0
) -> tuple[int, int]:
    """Bytes of the weights (on the device, in host memory) of a denoiser stored so, from its shapes alone."""
    outside = sum(p.numel() for p in denoiser.parameters()) * dtype.itemsize
    streamed = swapped(denoiser, blocks_to_swap) if blocks_to_swap else []
    host = {layer for block in streamed for layer in block.modules()}
    sizes: dict[nn.Module, int] = {}
    for container in containers(denoiser):
        for layer in filter(frozen.can_freeze, container.modules()):
            weight: Any = layer.weight
            sizes[layer] = Format(kind or plain_kind(dtype), tuple(weight.shape), dtype).bytes
            outside -= weight.numel() * dtype.itemsize
    on_host = [size for layer, size in sizes.items() if layer in host]
    buffers = BUFFERS * max(on_host, default=0)
    return outside + sum(sizes.values()) - sum(on_host) + buffers, sum(on_host)
