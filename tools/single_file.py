"""Write a Stable Diffusion of a diffusers folder as one file in the layout of the original code.

    python tools/single_file.py assets/demo/sd15 models/demo-sd15

writes `models/demo-sd15/model.safetensors` and beside it `tokenizers`, a --tokenizer_cache_dir. The metadata
of the file hold what shapes do not tell (numbers of heads and of groups, scale of the latents), so that our
scripts load models of any size; other programs take the published numbers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowrank.errors import Refused
from lowrank.files import atomic_folder
from lowrank.models.family import reading
from lowrank.models.single import CONFIGS
from lowrank.naming import unet as unet_names

TOKENIZERS = {
    "sd15": ("openai_clip-vit-large-patch14",),
    "sd2": ("stabilityai_stable-diffusion-2",),
    "sdxl": ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"),
}
UNTOLD = {
    "unet": ("attention_head_dim", "norm_num_groups", "sample_size"),
    "vae": ("norm_num_groups", "scaling_factor", "shift_factor", "sample_size"),
}


def write_single(pipe: Any, source: Path, folder: Path, kind: str) -> None:
    """Write `folder`/model.safetensors, and its tokenizers, those of the diffusers folder `source`."""
    folder.mkdir(exist_ok=True)
    told = {part: {key: getattr(pipe, part).config[key] for key in keys} for part, keys in UNTOLD.items()}
    save_file(original(pipe, kind), folder / "model.safetensors", {CONFIGS: json.dumps(told)})
    for name, place in zip(("tokenizer", "tokenizer_2"), TOKENIZERS[kind], strict=False):
        shutil.copytree(source / name, folder / "tokenizers" / place)


def original(pipe: Any, kind: str) -> dict[str, torch.Tensor]:
    """All tensors of a pipeline under the names and in the layout of the original code."""
    blocks, levels = unet_names.Blocks.of(pipe.unet), len(pipe.vae.config.block_out_channels)
    state = {
        f"model.diffusion_model.{unet_names.unet_name(name, blocks)}": value
        for name, value in pipe.unet.state_dict().items()
    }
    for name, value in pipe.vae.state_dict().items():
        told = unet_names.vae_name(name, levels)
        convolution = ".attn_1." in told and value.dim() == 2  # 1×1 there, linear here
        state[f"first_stage_model.{told}"] = value[:, :, None, None] if convolution else value
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


def open_clip(state: dict[str, torch.Tensor], spare: bool) -> dict[str, torch.Tensor]:
    """A CLIP of transformers under OpenCLIP's names; `spare` adds the last layer, which SD 2 does not use."""
    found: dict[str, list] = {}
    for name, value in state.items():
        told, third = unet_names.open_clip_name(name)
        found.setdefault(told, []).append((third or 0, value.T if told == "text_projection" else value))
    joined = {name: torch.cat([v for _, v in sorted(vs, key=lambda p: p[0])]) for name, vs in found.items()}
    if spare:
        layers = {int(name.split(".")[2]) for name in joined if ".resblocks." in name}
        last = f"transformer.resblocks.{max(layers)}."
        copies = {k: torch.full_like(v, 9.0) for k, v in joined.items() if k.startswith(last)}
        joined |= {k.replace(last, f"transformer.resblocks.{max(layers) + 1}."): v for k, v in copies.items()}
    return joined


def kind_of(pipe: Any) -> str:
    """Which kind of model a stock pipeline holds."""
    if hasattr(pipe, "text_encoder_2"):
        return "sdxl"
    return "sd2" if pipe.unet.config.use_linear_projection else "sd15"


def _check_target(folder: Path, source: Path) -> None:
    """Raise `Refused` where something would be replaced, or the model that is read would change."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refused(f"{folder} exists already and would be replaced as a whole; give a new folder")
    if source.resolve() in folder.resolve().parents:
        raise Refused(f"{folder} is inside the model that is read; give a folder elsewhere")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    from diffusers import DiffusionPipeline

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, help="a diffusers folder of SD 1, SD 2 or SDXL")
    parser.add_argument("folder", type=Path, help="where the file and the tokenizers go")
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
