"""Names in original Stable Diffusion files (CompVis' latent-diffusion, Stability's generative-models) of what
diffusers' U-Nets call otherwise.

One table serves readers of checkpoints in the original layout, writers of merged ones, and SDXL adapter keys,
which kohya's trainers write with the original block names.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_LEVELS = 8  # more than any U-Net has


@dataclass(frozen=True)
class Blocks:
    """What the numbering of a U-Net's original blocks depends on."""

    layers: int  # resnets per block on the way down; one more on the way up
    attending: frozenset[int]  # blocks on the way up that attend

    @classmethod
    def of(cls, unet: Any) -> Blocks:
        """The numbering of diffusers' UNet2DConditionModel."""
        ups = enumerate(unet.up_blocks)
        return cls(
            len(unet.down_blocks[0].resnets),
            frozenset(i for i, block in ups if getattr(block, "attentions", None)),
        )


SDXL = Blocks(2, frozenset({0, 1}))


@functools.cache
def table(blocks: Blocks) -> Mapping[str, str]:
    """The original name of every module of diffusers' U-Net whose name differs; what lies inside an attention
    block has one name."""
    names = {f"mid_block.{ours}": f"middle_block.{theirs}" for ours, theirs in _MIDDLE.items()}
    step = blocks.layers + 1
    for i in range(_LEVELS):
        for kind, place in (("resnets", 0), ("attentions", 1)):
            for j in range(step):
                names[f"up_blocks.{i}.{kind}.{j}"] = f"output_blocks.{step * i + j}.{place}"
            for j in range(blocks.layers):
                names[f"down_blocks.{i}.{kind}.{j}"] = f"input_blocks.{step * i + j + 1}.{place}"
        names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{step * (i + 1)}.0.op"
        place = 1 + (i in blocks.attending)
        names[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{step * i + blocks.layers}.{place}"
    inside = {
        f"{ours}.{part}": f"{theirs}.{original}"
        for ours, theirs in names.items()
        if ".resnets." in ours
        for part, original in _RESNET.items()
    }
    return {**_TOP, **names, **inside}


@functools.cache
def _reverse(layers: int) -> Mapping[str, str]:
    """diffusers' names by the original ones, wherever an upsampler stands: after an attention or without."""
    names = {theirs: ours for ours, theirs in table(Blocks(layers, frozenset())).items()}
    for i in range(_LEVELS):
        for place in (1, 2):
            original = f"output_blocks.{(layers + 1) * i + layers}.{place}.conv"
            names[original] = f"up_blocks.{i}.upsamplers.0.conv"
    attending = Blocks(layers, frozenset(range(_LEVELS)))
    return names | {theirs: ours for ours, theirs in table(attending).items() if ".upsamplers." not in ours}


@functools.cache
def _flat_sdxl() -> Mapping[str, str]:
    return {ours.replace(".", "_"): theirs.replace(".", "_") for ours, theirs in table(SDXL).items()}


def _spelled(path: str, names: Mapping[str, str], separator: str = ".") -> str:
    """The path with the longest beginning that is in `names` replaced."""
    head, tail = path, ""
    while head and head not in names:
        head, between, last = head.rpartition(separator)
        tail = between + last + tail
    return names[head] + tail if head else path


def unet_name(path: str, blocks: Blocks) -> str:
    """The original name of a module or tensor of diffusers' U-Net: `down_blocks.1.attentions.0.norm` is
    `input_blocks.4.1.norm` where blocks have two layers."""
    return _spelled(path, table(blocks))


def flat_sdxl_name(flat: str) -> str:
    """`unet_name` of SDXL for a path whose dots are underscores: `down_blocks_1_attentions_0_norm` is
    `input_blocks_4_1_norm`, and names that are original already stay."""
    return _spelled(flat, _flat_sdxl(), "_")


def diffusers_name(path: str, layers: int = 2) -> str:
    """The reverse of `unet_name`: `input_blocks.4.1.norm` is `down_blocks.1.attentions.0.norm`."""
    return _spelled(path, _reverse(layers))


_DOWN = re.compile(r"input_blocks\.(\d+)\.0\.op\.")


def layers_of(names: Iterable[str]) -> int:
    """Resnets per block of an original U-Net, by where its first downsampler stands; SD's 2 without one."""
    return min((int(found[1]) for name in names if (found := _DOWN.search(name))), default=3) - 1
