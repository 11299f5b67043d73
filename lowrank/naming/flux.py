"""Names in Black Forest Labs' FLUX (github.com/black-forest-labs/flux, model.py) and in diffusers.

Used for BFL's checkpoints and for adapters of kohya's trainers and ComfyUI, whose keys have BFL's names. Some
modules of BFL join the rows of several modules of diffusers.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# module name in diffusers -> in BFL
TOP = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
}
DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
SINGLE = {
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
# joined module of BFL -> diffusers' modules in the order of their rows, with their share of the rows
JOINED = {
    "img_attn.qkv": (("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1)),
    "txt_attn.qkv": (("attn.add_q_proj", 1), ("attn.add_k_proj", 1), ("attn.add_v_proj", 1)),
    "linear1": (("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1), ("proj_mlp", 4)),
}
SWAPPED = "final_layer.adaLN_modulation.1"  # rows: shift, scale; in diffusers' norm_out.linear: scale, shift
_THEIRS = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)$")
_OURS = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)$")


class Piece(NamedTuple):
    """The rows of a BFL module that are one module of diffusers."""

    module: str  # name in BFL
    start: int  # first row, as a share: rows · start / total
    stop: int  # end of the rows, as a share
    total: int


def joined_rows(path: str) -> Piece | None:
    """Return BFL's name and rows of a module of diffusers' FLUX; None if it is not a module of FLUX."""
    match = _OURS.match(path)
    if not match:
        if path == "norm_out.linear":
            return Piece(SWAPPED, 0, 1, 1)
        return Piece(TOP[path], 0, 1, 1) if path in TOP else None
    kind = "single" if match[1] else "double"
    prefix = f"{kind}_blocks.{match[2]}"
    for module, parts in JOINED.items():
        at, total = 0, sum(share for _, share in parts)
        for ours, share in parts if (module == "linear1") == (kind == "single") else ():
            if ours == match[3]:
                return Piece(f"{prefix}.{module}", at, at + share, total)
            at += share
    theirs = (SINGLE if kind == "single" else DOUBLE).get(match[3])
    # modules that BFL does not join
    return Piece(f"{prefix}.{theirs}", 0, 1, 1) if theirs else None


def modules(module: str) -> list[tuple[str, Piece]]:
    """Return diffusers' modules of a BFL module, in the order of their rows; empty if not of FLUX."""
    match = _THEIRS.match(module)
    if not match:
        ours = ["norm_out.linear"] if module == SWAPPED else [o for o, t in TOP.items() if t == module]
        return [(path, Piece(module, 0, 1, 1)) for path in ours]
    kind, number, name = match.groups()
    prefix = f"{'single_' if kind == 'single' else ''}transformer_blocks.{number}"
    if name in JOINED and (name == "linear1") == (kind == "single"):
        at, total, pieces = 0, sum(share for _, share in JOINED[name]), []
        for ours, share in JOINED[name]:
            pieces.append((f"{prefix}.{ours}", Piece(module, at, at + share, total)))
            at += share
        return pieces
    table = DOUBLE if kind == "double" else SINGLE
    return [(f"{prefix}.{o}", Piece(module, 0, 1, 1)) for o, theirs in table.items() if theirs == name]
