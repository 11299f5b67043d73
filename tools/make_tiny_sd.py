"""Make a tiny Stable Diffusion without a download: classes of SD 1.5, SD 2.x or SDXL, random weights.

    python tools/make_tiny_sd.py models/tiny-sd                       # SD 1.5 as a diffusers folder, 6 MB
    python tools/make_tiny_sd.py models/tiny-sdxl --kind sdxl
    python tools/make_tiny_sd.py models/tiny-sd2 --kind sd2           # predicts v
    python tools/make_tiny_sd.py models/tiny-sd --single              # and one file in the original layout

Pipelines of diffusers load the folder. `--single` adds `single/model.safetensors`, with the tensor names of
the original code, and `single/tokenizers`, a --tokenizer_cache_dir. The content depends on the seed, this
file, and the libraries that draw the random numbers. An existing folder made with equal options is kept.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowrank.errors import Refused
from tools import tiny
from tools.single_file import write_single

RECIPE = 1  # increase it if the weights below change: older folders are then remade
MARK = "tiny_sd.json"
KINDS = ("sd15", "sd2", "sdxl")
SCALING = {"sd15": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}


def make(
    folder: str | Path,
    kind: str = "sd15",
    *,
    seed: int = 0,
    levels: int = 4,
    latent_channels: int = 4,
    single: bool = False,
) -> Path:
    """Write a tiny model to `folder` and return the path; the VAE has 2^(levels − 1) pixels per latent pixel.

    Raises `Refused` if `folder` has anything that this tool did not make.
    """
    recipe = {
        **{"recipe": RECIPE, "seed": seed, "kind": kind, "levels": levels},
        **{"latent_channels": latent_channels, "single": single},
    }
    with tiny.new_folder(folder, MARK, recipe, "tiny Stable Diffusion") as part:
        if part is not None:
            pipe = pipeline(part, kind, levels, latent_channels)
            pipe.save_pretrained(part)
            if single:
                write_single(pipe, part, part / "single", kind)
    return Path(folder)


def pipeline(folder: Path, kind: str, levels: int = 4, latent_channels: int = 4):
    """Return a stock pipeline of tiny components; the tokenizers' files are written to `folder` first."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    vocab, merges = tiny.clip_vocabulary(tiny.WORDS.split())
    end, zero = "<|endoftext|>", "!"  # the first byte of the table: id 0
    tiny.write_clip_tokenizer(folder / "tokenizer", vocab, merges, zero if kind == "sd2" else end)
    act: dict[str, Any] = {"hidden_act": "gelu" if kind == "sd2" else "quick_gelu"}
    parts: dict[str, Any] = {
        "unet": unet(kind, latent_channels),
        "scheduler": scheduler("v_prediction" if kind == "sd2" else "epsilon"),
        "vae": tiny.vae(levels, latent_channels=latent_channels, scaling_factor=SCALING[kind]),
        "text_encoder": tiny.clip(len(vocab), num_hidden_layers=3, **act),
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
    }
    if kind != "sdxl":
        parts |= dict.fromkeys(("safety_checker", "feature_extractor"))
        return StableDiffusionPipeline(**parts, requires_safety_checker=False)
    tiny.write_clip_tokenizer(folder / "tokenizer_2", vocab, merges, zero)
    wide: dict[str, Any] = {"width": 128, "num_hidden_layers": 4, "hidden_act": "gelu"}
    parts |= {
        "text_encoder_2": tiny.clip(len(vocab), kind=CLIPTextModelWithProjection, **wide),
        "tokenizer_2": CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
    }
    return StableDiffusionXLPipeline(**parts, add_watermarker=False)


def unet(kind: str, channels: int):
    """Return a UNet2DConditionModel with the block order of its kind and two layers per block."""
    from diffusers import UNet2DConditionModel

    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    downs = (plain, cross, cross) if kind == "sdxl" else (cross, cross, cross, plain)
    facts: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": (32, 64, 64) if kind == "sdxl" else (32, 64, 64, 64),
        "down_block_types": downs,
        "up_block_types": tuple(block.replace("Down", "Up") for block in reversed(downs)),
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "cross_attention_dim": 64,
        "attention_head_dim": 8,  # SD 1: eight heads, whatever the width
        "sample_size": 8,
    }
    if kind == "sd2":
        facts |= {"use_linear_projection": True, "attention_head_dim": (1, 1, 1, 1)}
    if kind == "sdxl":
        facts |= {
            "use_linear_projection": True,
            "attention_head_dim": (1, 1, 1),
            "transformer_layers_per_block": (1, 1, 2),
            "cross_attention_dim": 64 + 128,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 128,
        }
    return UNet2DConditionModel(**facts).eval()


def scheduler(prediction: Any):
    """Return a DDIM scheduler with SD's noise schedule."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", help="folder to write")
    parser.add_argument("--kind", choices=KINDS, default="sd15", help="kind of Stable Diffusion")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    parser.add_argument(
        "--single", action="store_true", help="also write the model as one file in the original layout"
    )
    options = parser.parse_args(argv)
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # warns of missing CPU kernels, which are not used here
    try:
        print(make(options.folder, options.kind, seed=options.seed, single=options.single))
    except Refused as refused:
        sys.exit(str(refused))


if __name__ == "__main__":
    main()
