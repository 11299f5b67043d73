"""Make a tiny FLUX without a download: FLUX.1-dev's classes, file layout and scheduler, random weights.

    python tools/make_tiny_flux.py models/tiny-flux           # 10 MB, a picture on a CPU in under a second
    python tools/make_tiny_flux.py models/wide --size wide    # one transformer of width 1024, for benchmarks

`FluxPipeline.from_pretrained(folder)` loads the folder. Its content depends on the seed, this file, and the
libraries that draw the random numbers. An existing folder made with equal options is kept.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowrank.errors import Refused
from tools.tiny import (
    WORDS,
    clip,
    clip_vocabulary,
    new_folder,
    t5,
    t5_pieces,
    write_clip_tokenizer,
    write_t5_tokenizer,
)
from tools.tiny import vae as autoencoder

RECIPE = 1  # increase it if weights or tokenizers below change: older folders are then remade
MARK = "tiny_flux.json"
TEXT_LENGTH = 64  # tokens of the tiny T5, the model_max_length of its tokenizer

TRANSFORMERS = {
    # 4 heads of 32: rank 64 fits every target layer
    "tiny": {
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "axes_dims_rope": (4, 14, 14),
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
    },
    "wide": {
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 128,
        "num_attention_heads": 8,
        "axes_dims_rope": (16, 56, 56),
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
    },
}


def make(folder: str | Path, *, seed: int = 0, size: str = "tiny") -> Path:
    """Write a tiny FLUX to `folder` and return the path; "wide" has only a transformer and its scheduler.

    Raises `Refused` if `folder` has anything that this tool did not make.
    """
    recipe = {"recipe": RECIPE, "seed": seed, "size": size}
    with new_folder(folder, MARK, recipe, "tiny FLUX") as part:
        if part is not None and size == "wide":
            transformer(size).save_pretrained(part / "transformer")
            scheduler().save_pretrained(part / "scheduler")
        elif part is not None:
            pipeline(part).save_pretrained(part)
    return Path(folder)


def pipeline(folder: Path):
    """Return a FluxPipeline of tiny components; the tokenizers' files are written to `folder` first."""
    from diffusers import FluxPipeline
    from transformers import (
        CLIPTokenizer,
        T5TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]  # made at import
    )

    vocab, merges = clip_vocabulary(WORDS.split())
    write_clip_tokenizer(folder / "tokenizer", vocab, merges)
    pieces = t5_pieces(WORDS.split())
    write_t5_tokenizer(folder / "tokenizer_2", pieces, TEXT_LENGTH)
    return FluxPipeline(
        transformer=transformer("tiny"),
        scheduler=scheduler(),
        vae=vae(),
        text_encoder=clip(len(vocab)),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=t5(len(pieces)),
        tokenizer_2=T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
    )


# ---------- models


def transformer(size: str):
    """Return a FluxTransformer2DModel like FLUX.1-dev's (guidance input, 16 latent channels packed to 64)."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(in_channels=64, guidance_embeds=True, **TRANSFORMERS[size]).eval()


def scheduler():
    """Return FLUX.1-dev's scheduler, whose shift depends on the image size."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def vae():
    """Return an AutoencoderKL with FLUX's geometry: 8 pixels per latent pixel, 16 channels, no quant_conv."""
    return autoencoder(
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    parser.add_argument(
        "--size",
        choices=list(TRANSFORMERS),
        default="tiny",
        help="a whole pipeline, or a wide transformer only",
    )
    options = parser.parse_args(argv)
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # warns of missing CPU kernels, which are not used here
    try:
        print(make(options.folder, seed=options.seed, size=options.size))
    except Refused as refused:
        sys.exit(str(refused))


if __name__ == "__main__":
    main()
