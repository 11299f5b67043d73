"""SD 1.x, SD 2.x and SDXL from one checkpoint file in the original layout.

Sizes are read off the tensors' shapes, so that a file of any width and depth loads; what shapes do not tell
(noise schedule, latents' scaling, activation) is in configs/models/*.json. Names: `lowrank.naming.unet`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lowrank.errors import Refused
from lowrank.models import published
from lowrank.models.components import reading
from lowrank.models.single import Checkpoint, clip_config, fill, filled_encoder
from lowrank.naming import unet as unet_names

UNET = "model.diffusion_model."
# where files keep their text encoders, and whether these have OpenCLIP's names
ENCODERS = {
    "sd15": (("cond_stage_model.transformer.", False),),
    "sd2": (("cond_stage_model.model.", True),),
    "sdxl": (("conditioner.embedders.0.transformer.", False), ("conditioner.embedders.1.model.", True)),
}
_INPUT = re.compile(r"input_blocks\.(\d+)\.0\.(op|in_layers\.2)\.(?:conv\.)?weight$")


def is_whole(file: Checkpoint) -> bool:
    """Whether a file holds a U-Net under the original names, and is not a VAE alone."""
    return f"{UNET}input_blocks.0.0.weight" in file.shapes


def kind_of(file: Checkpoint) -> str:
    """Which kind of model a file holds; `Refused` when it is none of these."""
    if not is_whole(file):
        ours = any(key.startswith(("down_blocks.", "unet.down_blocks.")) for key in file.shapes)
        hint = "it is in diffusers' layout: give its folder" if ours else "it is another model, or a part"
        raise Refused(f"{file.path} is no SD checkpoint in the original layout (no {UNET}…); {hint}")
    for kind, places in reversed(ENCODERS.items()):
        if all(any(key.startswith(prefix) for key in file.shapes) for prefix, _ in places):
            return kind
    raise Refused(
        f"{file.path} has a U-Net and no text encoder of SD 1, SD 2 or SDXL; give a checkpoint that holds all"
    )


# ---------- U-Net


def unet_config(file: Checkpoint) -> dict[str, Any]:
    """diffusers' configuration from the shapes of an original U-Net (names without prefix)."""
    shapes = file.shapes
    with reading("U-Net", file.path):
        return _unet_config(shapes, file.path)


def _unet_config(shapes: Mapping[str, tuple[int, ...]], where: Path) -> dict[str, Any]:
    inputs = sorted((int(m[1]), m[2], shapes[k][0]) for k in shapes if (m := _INPUT.match(k)))
    levels: list[list[tuple[int, int]]] = [[]]  # per level its resnets: (block, channels)
    for block, what, channels in inputs:
        if what == "op":
            levels.append([])
        else:
            levels[-1].append((block, channels))
    depths = [_depth(shapes, f"input_blocks.{level[-1][0]}.1") for level in levels]
    if len({len(level) for level in levels}) != 1 or _depth(shapes, "middle_block.1") != (depths[-1] or 1):
        raise Refused(f"{where} has a U-Net of uneven blocks, which is not SD 1, SD 2 or SDXL; use another")
    widths = [level[0][1] for level in levels]
    attending = next(f"input_blocks.{level[0][0]}.1" for level, d in zip(levels, depths, strict=True) if d)
    linear = len(shapes[f"{attending}.proj_in.weight"]) == 2
    config = published.configurations("sd15")["unet"] | {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "transformer_layers_per_block": [depth or 1 for depth in depths],
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depths)],
        "cross_attention_dim": shapes[f"{attending}.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": linear,
        # SD 1 has 8 heads everywhere, later models heads of 64; diffusers' name says neither
        "attention_head_dim": [max(1, width // 64) for width in widths] if linear else 8,
        "norm_num_groups": next(groups for groups in (32, 16, 8, 4, 2, 1) if widths[0] % groups == 0),
    }
    if "label_emb.0.0.weight" in shapes:
        config |= {
            "addition_embed_type": "text_time",
            "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1],
        }
    return config


def _depth(shapes: Mapping[str, Any], where: str) -> int:
    return len({k.split(".")[4 if where[0] == "i" else 3] for k in shapes if k.startswith(f"{where}.transf")})


def unet(file: Checkpoint, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """The U-Net of a file as diffusers' UNet2DConditionModel in `dtype`."""
    with reading("U-Net", file.path), torch.device("meta"):
        model: Any = UNet2DConditionModel.from_config(dict(config))
    names = _unet_names(model)
    stored = file.read(original for original in names if original in file.shapes)
    return fill(model, file.path, ((names[original], value) for original, value in stored), dtype)


def _unet_names(model: nn.Module) -> dict[str, str]:
    """diffusers' names of a U-Net's tensors by their original names."""
    blocks = unet_names.Blocks.of(model)
    return {unet_names.unet_name(name, blocks): name for name in model.state_dict()}


def unet_readers(file: Checkpoint, config: Mapping[str, Any]) -> dict[str, Callable[[], Tensor]]:
    """The tensors of an original U-Net under diffusers' names, each read when it is called."""
    with reading("U-Net", file.path), torch.device("meta"):
        model: Any = UNet2DConditionModel.from_config(dict(config))
    return {
        name: partial(_tensor, file, original)
        for original, name in _unet_names(model).items()
        if original in file.shapes
    }


def _tensor(file: Checkpoint, name: str) -> Tensor:
    ((_, value),) = file.read([name])
    return value


# ---------- text encoders


def _open_clip(file: Checkpoint, prefix: str, whole: bool) -> dict[str, Tensor]:
    """Tensors of an OpenCLIP text encoder under transformers' names; not `whole`: without its last layer."""
    blocks = f"{prefix}transformer.resblocks."
    count = len({name.removeprefix(blocks).split(".")[0] for name in file.shapes if name.startswith(blocks)})
    left_out = () if whole else (f"{blocks}{count - 1}.",)
    names = [name for name in file.shapes if name.startswith(prefix) and not name.startswith(left_out)]
    # the width is all that it looks at
    model = SimpleNamespace(config=CLIPTextConfig(hidden_size=file.shapes[f"{prefix}ln_final.weight"][0]))
    return convert_open_clip_checkpoint(model, dict(file.read(names)), prefix)


def _known_text(kind: str, index: int) -> dict[str, Any]:
    return published.configurations(kind)[f"text_encoder{'' if index == 0 else f'_{index + 1}'}"]


def text_config(file: Checkpoint, kind: str, index: int) -> CLIPTextConfig:
    """The configuration of one text encoder of a whole file, from the shapes in its table."""
    prefix, open_clip = ENCODERS[kind][index]
    known = _known_text(kind, index)
    with reading("text encoder", file.path):
        if not open_clip:
            config = clip_config(file.under(prefix).shapes)
        else:
            shapes, blocks = file.under(prefix).shapes, "transformer.resblocks."
            layers = {name.removeprefix(blocks).split(".")[0] for name in shapes if name.startswith(blocks)}
            width = shapes["ln_final.weight"][0]
            config = CLIPTextConfig(
                vocab_size=shapes["token_embedding.weight"][0],
                hidden_size=width,
                projection_dim=shapes.get("text_projection", (width, width))[1],
                num_attention_heads=max(1, width // 64),
                intermediate_size=shapes[f"{blocks}0.mlp.c_fc.weight"][0],
                max_position_embeddings=shapes["positional_embedding"][0],
                num_hidden_layers=len(layers) - (kind == "sd2"),
            )
    config.update({"hidden_act": known["hidden_act"], "layer_norm_eps": known["layer_norm_eps"]})
    return config


def text_encoder(file: Checkpoint, kind: str, index: int, dtype: torch.dtype) -> nn.Module:
    """One text encoder of a whole file as transformers' class in `dtype`."""
    prefix, open_clip = ENCODERS[kind][index]
    known = _known_text(kind, index)
    with reading("text encoder", file.path):
        if open_clip:
            # SD 2 was trained on the last layer but one, and its published encoder ends there
            state = _open_clip(file, prefix, whole=kind != "sd2")
        else:
            file = file.under(prefix)
            names = [name for name in file.shapes if not name.endswith(("position_ids", "logit_scale"))]
            # the oldest files lack the level text_model; the ids, left out, are a table of 0…76
            state = {f"text_model.{n.removeprefix('text_model.')}": value for n, value in file.read(names)}
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        config = clip_config(shapes, hidden_act=known["hidden_act"], layer_norm_eps=known["layer_norm_eps"])
    if not index:
        state.pop("text_projection.weight", None)
    return filled_encoder(
        CLIPTextModelWithProjection if index else CLIPTextModel, config, state, dtype, file.path
    )
