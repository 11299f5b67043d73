"""SD 1.x, SD 2.x and SDXL from one checkpoint file in the original layout.

Sizes are read off the tensors' shapes, so that a file of any width and depth loads; what shapes do not tell
(noise schedule, latents' scaling, activation) is in configs/models/*.json. Names: `lowrank.naming.unet`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import lowrank
from lowrank.errors import Refused
from lowrank.models.components import without_bars
from lowrank.models.family import complete, reading
from lowrank.models.single import Checkpoint, clip_config, fill
from lowrank.naming import unet as unet_names

UNET = "model.diffusion_model."
# where files keep their text encoders, and whether these have OpenCLIP's names
ENCODERS = {
    "sd15": (("cond_stage_model.transformer.", False),),
    "sd2": (("cond_stage_model.model.", True),),
    "sdxl": (("conditioner.embedders.0.transformer.", False), ("conditioner.embedders.1.model.", True)),
}
_INPUT = re.compile(r"input_blocks\.(\d+)\.0\.(op|in_layers\.2)\.(?:conv\.)?weight$")


def published_config(kind: str) -> dict[str, dict[str, Any]]:
    """The configurations of the published model of a kind: "sd15", "sd2" or "sdxl"."""
    path = Path(lowrank.__file__).resolve().parents[1] / "configs" / "models" / f"{kind}.json"
    with reading("model configuration", path):
        return json.loads(path.read_text(encoding="utf-8"))


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
    found = sorted((int(m[1]), m[2], shapes[k][0]) for k in shapes if (m := _INPUT.match(k)))
    levels: list[list[tuple[int, int]]] = [[]]  # per level its resnets: (block, channels)
    for block, what, channels in found:
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
    config = published_config("sd15")["unet"] | {
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
    return fill(model, file, partial(unet_names.unet_name, blocks=unet_names.Blocks.of(model)), dtype)


# ---------- text encoders


def _open_clip(file: Checkpoint, layers: int) -> Iterator[tuple[str, Tensor]]:
    """Tensors of an OpenCLIP text encoder under transformers' names, its first `layers` layers."""
    names = ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]
    names += [f"final_layer_norm.{kind}" for kind in ("weight", "bias")]
    parts = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")
    attention = tuple(f"self_attn.{one}_proj" for one in ("q", "k", "v", "out"))
    names += [
        f"encoder.layers.{layer}.{part}.{kind}"
        for layer in range(layers)
        for part in (*parts, *attention)
        for kind in ("weight", "bias")
    ]
    names += ["text_projection.weight"] if "text_projection" in file.shapes else []
    told = {name: unet_names.open_clip_name(name) for name in names}
    stored = dict(file.read({where for where, _ in told.values() if where in file.shapes}))
    for name, (where, third) in told.items():
        if where not in stored:
            continue
        value = stored[where] if third is None else stored[where].chunk(3)[third]
        projects = name == "text_projection.weight"
        yield (name, value.T) if projects else (f"text_model.{name}", value)


def text_encoder(file: Checkpoint, kind: str, index: int, dtype: torch.dtype) -> nn.Module:
    """One text encoder of a whole file as transformers' class in `dtype`."""
    prefix, open_clip = ENCODERS[kind][index]
    file = file.under(prefix)
    known = published_config(kind)[f"text_encoder{'' if index == 0 else f'_{index + 1}'}"]
    with reading("text encoder", file.path), without_bars():
        if open_clip:
            count = len({k.split(".")[2] for k in file.shapes if k.startswith("transformer.resblocks.")})
            # SD 2 was trained on the last layer but one, and its published encoder ends there
            state = dict(_open_clip(file, count - (kind == "sd2")))
        else:
            # the oldest files lack the level; the ids are a table of 0…76
            state = {f"text_model.{n.removeprefix('text_model.')}": n for n in file.shapes}
            state = {n: t for n, t in state.items() if not n.endswith(("position_ids", "logit_scale"))}
            stored = dict(file.read(state.values()))
            state = {name: stored[theirs] for name, theirs in state.items()}
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        config = clip_config(shapes, hidden_act=known["hidden_act"], layer_norm_eps=known["layer_norm_eps"])
        return _encoder(config, {k: v.to(dtype).contiguous() for k, v in state.items()}, index, dtype, file)


def _encoder(
    config: CLIPTextConfig, state: dict[str, Tensor], index: int, dtype: torch.dtype, file: Checkpoint
) -> nn.Module:
    made: Any = CLIPTextModelWithProjection if index else CLIPTextModel
    if not index:
        state.pop("text_projection.weight", None)
    model, info = made.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    complete("text encoder", file.path, info)
    return model
