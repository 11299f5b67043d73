"""Names in original Stable Diffusion files, and their counterparts in diffusers and transformers.

Original names are those of CompVis' latent-diffusion and Stability's generative-models. Two readers use these
tables: checkpoints in the original layout, and SDXL adapters, whose keys in kohya's files have the original
block names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
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
_IN_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(.*)$")
_IN_MIDDLE = re.compile(r"mid_block\.((?:resnets|attentions)\.\d+)(.*)$")


@dataclass(frozen=True)
class Blocks:
    """The structure of a U-Net that determines the numbers of its original blocks."""

    layers: int  # resnets per down block; an up block has one more
    attending: frozenset[int]  # indices of up blocks with attention

    @classmethod
    def of(cls, unet: Any) -> Blocks:
        """Return the structure of diffusers' UNet2DConditionModel `unet`."""
        ups = enumerate(unet.up_blocks)
        return cls(
            len(unet.down_blocks[0].resnets),
            frozenset(i for i, block in ups if getattr(block, "attentions", None)),
        )


SDXL = Blocks(2, frozenset({0, 1}))


def sdxl_blocks(per_block: int) -> Blocks:
    """Return SDXL's structure with another number of layers in a block, as smaller models of it have."""
    return Blocks(per_block, SDXL.attending)


def unet_name(path: str, blocks: Blocks) -> str:
    """Return the original name of a module or tensor of diffusers' U-Net.

    `down_blocks.1.attentions.0.norm` is `input_blocks.4.1.norm` if blocks have two layers. Names inside an
    attention block are equal in both.
    """
    if match := _IN_MIDDLE.match(path):
        kind, suffix = match.groups()
        return f"middle_block.{_MIDDLE[kind]}{_inside(kind, suffix)}"
    if match := _IN_BLOCK.match(path):
        side, i, kind, j, suffix = match[1], int(match[2]), match[3], int(match[4]), match[5]
        first = (blocks.layers + 1) * i
        inner = _inside(kind, suffix)
        if side == "down":
            if kind == "downsamplers":
                return f"input_blocks.{first + blocks.layers + 1}.0.op{inner.removeprefix('.conv')}"
            return f"input_blocks.{first + j + 1}.{int(kind == 'attentions')}{inner}"
        if kind == "upsamplers":
            return f"output_blocks.{first + blocks.layers}.{1 + (i in blocks.attending)}{inner}"
        return f"output_blocks.{first + j}.{int(kind == 'attentions')}{inner}"
    for ours, theirs in _TOP.items():
        if path == ours or path.startswith(f"{ours}."):
            return theirs + path[len(ours) :]
    return path


_FLAT = re.compile(
    r"(?:(?P<side>down|up)_blocks_(?P<i>\d+)|mid_block)_(?P<kind>resnets|attentions|downsamplers|upsamplers)"
    r"_(?P<j>\d+)(?P<suffix>_.*)$"
)


def flat_sdxl_name(flat: str, per_block: int = 2) -> str:
    """Return `unet_name` of SDXL for a path with underscores instead of dots.

    `down_blocks_1_attentions_0_norm` is `input_blocks_4_1_norm` if blocks have two layers; original names are
    returned unchanged.
    """
    if match := _FLAT.match(flat):
        block = f"{match['side']}_blocks.{match['i']}" if match["side"] else "mid_block"
        path = f"{block}.{match['kind']}.{match['j']}.{match['suffix'][1:]}"
        return unet_name(path, sdxl_blocks(per_block)).replace(".", "_")
    return {ours.replace(".", "_"): theirs.replace(".", "_") for ours, theirs in _TOP.items()}.get(flat, flat)


_DOWN = re.compile(r"input_blocks\.(\d+)\.0\.op\.")


def layers_of(names: Iterable[str]) -> int:
    """Return the resnets per block of an original U-Net, from its first downsampler; 2 without one."""
    return min((int(match[1]) for name in names if (match := _DOWN.search(name))), default=3) - 1


_NUMBERED = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)(?:\.(.+))?$")
_MIDDLE_NUMBERED = re.compile(r"middle_block\.(\d)(?:\.(.+))?$")


def diffusers_name(path: str, layers: int = 2) -> str:
    """Return diffusers' name of an original U-Net module, the inverse of `unet_name`.

    `input_blocks.4.1.norm` is `down_blocks.1.attentions.0.norm`.
    """
    if match := _MIDDLE_NUMBERED.match(path):
        kind = next((ours for ours, theirs in _MIDDLE.items() if theirs == match[1]), None)
        return path if kind is None else f"mid_block.{kind}{_outside(kind, match[2])}"
    if (match := _NUMBERED.match(path)) and path != "input_blocks.0.0":
        side, number, place, suffix = match[1], int(match[2]), int(match[3]), match[4] or ""
        if side == "input":
            i, j = divmod(number - 1, layers + 1)
            if suffix == "op":
                return f"down_blocks.{i}.downsamplers.0.conv"
            block = f"down_blocks.{i}"
        else:
            i, j = divmod(number, layers + 1)
            if place and suffix == "conv":
                return f"up_blocks.{i}.upsamplers.0.conv"
            block = f"up_blocks.{i}"
        kind = f"attentions.{j}" if place else f"resnets.{j}"
        return f"{block}.{kind}{_outside(kind, suffix)}"
    return next((ours for ours, theirs in _TOP.items() if theirs == path), path)


def _outside(kind: str, suffix: str | None) -> str:
    if not suffix:
        return ""
    known = {theirs: ours for ours, theirs in _RESNET.items()} if kind.startswith("resnets") else {}
    return f".{known.get(suffix, suffix)}"


def _inside(kind: str, suffix: str) -> str:
    if not kind.startswith("resnets"):
        return suffix
    part, dot, tail = suffix.removeprefix(".").partition(".")
    return f".{_RESNET.get(part, part)}{dot}{tail}" if part else suffix
