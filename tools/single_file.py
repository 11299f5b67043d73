"""Convert a Stable Diffusion model from a diffusers folder to one file in the layout of the original code.

    python tools/single_file.py assets/demo/sd15 models/demo-sd15

writes `models/demo-sd15/model.safetensors` and `models/demo-sd15/tokenizers`, a --tokenizer_cache_dir. The
file's metadata contain what tensor shapes do not show (numbers of heads and groups, scale of the latents), so
lowrank's scripts load models of any size; other programs assume the published numbers.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowrank.errors import Refused
from lowrank.files import atomic_folder
from lowrank.models.components import reading
from lowrank.models.single import CONFIGS
from lowrank.naming import unet as unet_names

TOKENIZERS = {
    "sd15": ("openai_clip-vit-large-patch14",),
    "sd2": ("stabilityai_stable-diffusion-2",),
    "sdxl": ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"),
}
NOT_IN_SHAPES = {  # config entries that tensor shapes do not show
    "unet": ("attention_head_dim", "norm_num_groups", "sample_size"),
    "vae": ("norm_num_groups", "scaling_factor", "shift_factor", "sample_size"),
}


def write_single(pipe: Any, source: Path, folder: Path, kind: str) -> None:
    """Write `folder`/model.safetensors, and copy the tokenizers of the diffusers folder `source`."""
    folder.mkdir(exist_ok=True)
    config = {
        part: {key: getattr(pipe, part).config[key] for key in keys} for part, keys in NOT_IN_SHAPES.items()
    }
    save_file(original(pipe, kind), folder / "model.safetensors", {CONFIGS: json.dumps(config)})
    for name, target in zip(("tokenizer", "tokenizer_2"), TOKENIZERS[kind], strict=False):
        shutil.copytree(source / name, folder / "tokenizers" / target)


def original(pipe: Any, kind: str) -> dict[str, torch.Tensor]:
    """Return all tensors of a pipeline with the names and in the layout of the original code."""
    blocks, levels = unet_names.Blocks.of(pipe.unet), len(pipe.vae.config.block_out_channels)
    state = {
        f"model.diffusion_model.{unet_names.unet_name(name, blocks)}": value
        for name, value in pipe.unet.state_dict().items()
    }
    for name, value in pipe.vae.state_dict().items():
        key = vae_name(name, levels)
        convolution = ".attn_1." in key and value.dim() == 2  # 1×1 convolution there, linear here
        state[f"first_stage_model.{key}"] = value[:, :, None, None] if convolution else value
    clip = {
        f"text_model.{k.removeprefix('text_model.')}": v for k, v in pipe.text_encoder.state_dict().items()
    }
    positions = torch.arange(77)[None]
    if kind == "sd2":
        prefix = "cond_stage_model.model."
        state |= {prefix + name: value for name, value in open_clip(clip, spare=True).items()}
    else:
        prefix = "cond_stage_model." if kind == "sd15" else "conditioner.embedders.0."
        clip["text_model.embeddings.position_ids"] = positions
        state |= {f"{prefix}transformer.{name}": value for name, value in clip.items()}
    if kind == "sdxl":
        second = open_clip(pipe.text_encoder_2.state_dict(), spare=False)
        state |= {f"conditioner.embedders.1.model.{name}": value for name, value in second.items()}
    return {name: value.contiguous().clone() for name, value in state.items()}


_VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
# the second half: names of diffusers before 0.15
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"} | {
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
_VAE_BLOCK = re.compile(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)$")
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d)\.(.+)$")


def vae_name(path: str, levels: int) -> str:
    """Return the original name of a tensor of diffusers' AutoencoderKL with `levels` levels.

    Original decoders number their levels in reverse order.
    """
    if match := _VAE_MIDDLE.match(path):
        side, kind, i, rest = match.groups()
        if kind == "resnets":
            return f"{side}.mid.block_{int(i) + 1}.{_renamed(rest, _VAE_RESNET)}"
        return f"{side}.mid.attn_1.{_renamed(rest, _VAE_ATTENTION)}"
    if match := _VAE_BLOCK.match(path):
        side, direction, i, kind, j, rest = match.groups()
        level = int(i) if direction == "down" else levels - 1 - int(i)
        inner = f"block.{j}" if kind == "resnets" else f"{direction}sample"
        return f"{side}.{direction}.{level}.{inner}.{_renamed(rest, _VAE_RESNET)}"
    return path.replace(".conv_norm_out.", ".norm_out.")


def _renamed(rest: str, table: dict[str, str]) -> str:
    part, dot, kind = rest.rpartition(".")
    return table.get(part, part) + dot + kind


_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_CLIP_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$")


def open_clip_name(name: str) -> tuple[str, int | None]:
    """Return OpenCLIP's name of a tensor of transformers' CLIP, and which third of its rows, or None.

    OpenCLIP (text encoder of SD 2, second one of SDXL) joins q, k and v; for these the third is 0, 1 or 2.
    `text_projection` is transposed.
    """
    name = name.removeprefix("text_model.")
    if match := _CLIP_LAYER.match(name):
        layer, part, kind = match.groups()
        if part.endswith(("q_proj", "k_proj", "v_proj")):
            third = "qkv".index(part[-6])
            return f"transformer.resblocks.{layer}.attn.in_proj_{kind}", third
        return f"transformer.resblocks.{layer}.{_OPEN_CLIP_LAYER[part]}.{kind}", None
    return _OPEN_CLIP.get(name, name.replace("final_layer_norm", "ln_final")), None


def open_clip(state: dict[str, torch.Tensor], spare: bool) -> dict[str, torch.Tensor]:
    """Rename a CLIP of transformers to OpenCLIP's names; `spare` adds a last layer, unused by SD 2."""
    pieces: dict[str, list] = {}
    for name, value in state.items():
        key, third = open_clip_name(name)
        pieces.setdefault(key, []).append((third or 0, value.T if key == "text_projection" else value))
    joined = {name: torch.cat([v for _, v in sorted(vs, key=lambda p: p[0])]) for name, vs in pieces.items()}
    if spare:
        layers = {int(name.split(".")[2]) for name in joined if ".resblocks." in name}
        last = f"transformer.resblocks.{max(layers)}."
        copies = {k: torch.full_like(v, 9.0) for k, v in joined.items() if k.startswith(last)}
        joined |= {k.replace(last, f"transformer.resblocks.{max(layers) + 1}."): v for k, v in copies.items()}
    return joined


def kind_of(pipe: Any) -> str:
    """Return the kind of a stock pipeline: "sd15", "sd2" or "sdxl"."""
    if hasattr(pipe, "text_encoder_2"):
        return "sdxl"
    return "sd2" if pipe.unet.config.use_linear_projection else "sd15"


def _check_target(folder: Path, source: Path) -> None:
    """Raise `Refused` if something would be replaced, or the source model changed."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refused(f"{folder} exists and would be replaced; give a new folder")
    if source.resolve() in folder.resolve().parents:
        raise Refused(f"{folder} is inside the source model; give a folder elsewhere")


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    from diffusers import DiffusionPipeline

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="a diffusers folder of SD 1, SD 2 or SDXL")
    parser.add_argument("folder", type=Path, help="folder to write the file and the tokenizers to")
    options = parser.parse_args(argv)
    try:
        if not (options.source / "unet").is_dir() or not (options.source / "model_index.json").is_file():
            raise Refused(f"{options.source} is no diffusers folder of SD 1, SD 2 or SDXL; give one")
        _check_target(options.folder, options.source)
        with reading("model", options.source):
            pipe = DiffusionPipeline.from_pretrained(options.source)
            for name in ("tokenizer", "tokenizer_2")[: len(TOKENIZERS[kind_of(pipe)])]:
                if not (options.source / name).is_dir():
                    raise Refused(f"{options.source} has no folder {name}; download it again")
        with atomic_folder(options.folder) as part:
            write_single(pipe, options.source, part, kind_of(pipe))
    except Refused as refused:
        sys.exit(f"error: {refused}")
    print(options.folder / "model.safetensors")


if __name__ == "__main__":
    main()
