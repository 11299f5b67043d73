"""Make a tiny FLUX on the spot: FLUX.1-dev's classes, file layout and scheduler, random weights, no download.

    python tools/make_tiny_flux.py models/tiny-flux           # 10 MB, a picture on a CPU in under a second
    python tools/make_tiny_flux.py models/wide --size wide    # one transformer of width 1024, for benchmarks

The folder is what `FluxPipeline.from_pretrained(folder)` loads. It depends on nothing but the seed and this
file (and the libraries that draw the random numbers), and a folder that is already there and was made alike
is left as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowrank.errors import Refused
from lowrank.files import atomic_folder

RECIPE = 1  # raise it when the weights or tokenizers below change: older folders are then made anew
MARK = "tiny_flux.json"
TEXT_LENGTH = 64  # tokens of the tiny T5; kept as its tokenizer's model_max_length

# Words of captions, each one token; every other text is spelled out in letters.
WORDS = """
a an the of in on with and at to by for from near under over behind beside between photo picture painting
drawing sketch image style art artwork portrait landscape illustration print poster watercolor oil ink
pencil charcoal pastel pixel neon cartoon comic vintage modern abstract minimal detailed simple soft
bright dark warm cold colorful monochrome black white gray red orange yellow green blue purple pink brown
gold silver cat dog puppy kitten bird fish horse fox bear rabbit robot teapot cup chair table house tree
flower mountain river sea sky cloud sun moon star street city forest garden field beach snow rain night
day morning evening man woman child person face hand hat shirt dress car boat train bicycle sitting
standing running sleeping walking looking playing wearing holding small large old new young cute happy sad
one two three many close up view background foreground light shadow line shape pattern texture glass stone
wood metal paper sks txt ohwx zwx style content toy plush figurine sculpture statue backpack candle can
clock vase shoe bowl
"""

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
# Gains of a random VAE: latents with about FLUX's spread and little noise of their own, pictures with
# contrast
LATENT_GAIN, LATENT_LOGVAR, PICTURE_GAIN = 8.0, -8.0, 1.0


def make(folder: str | Path, *, seed: int = 0, size: str = "tiny") -> Path:
    """Write a tiny FLUX to `folder` and return it; `size` "wide" is only a transformer and its scheduler.

    Raises `Refused` when `folder` holds anything that this tool did not make.
    """
    folder = Path(folder)
    recipe = {"recipe": RECIPE, "seed": seed, "size": size}
    if folder.exists():
        mark = folder / MARK
        if mark.is_file() and json.loads(mark.read_text()) == recipe:
            return folder
        if not mark.is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise Refused(
                f"{folder} exists and is not a tiny FLUX of this tool; give another folder or remove it"
            )
    with atomic_folder(folder) as part, torch.random.fork_rng(devices=[]), without_bars():
        torch.manual_seed(seed)
        if size == "wide":
            transformer(size).save_pretrained(part / "transformer")
            scheduler().save_pretrained(part / "scheduler")
        else:
            pipeline(part).save_pretrained(part)
        (part / MARK).write_text(json.dumps(recipe))
    return folder


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing a progress bar per file."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def pipeline(folder: Path):
    """The stock FluxPipeline around tiny parts; the tokenizers' files are written to `folder` first."""
    from diffusers import FluxPipeline
    from transformers import (
        CLIPTokenizer,
        T5TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]  # made at import
    )

    vocab, merges = clip_vocabulary(WORDS.split())
    write_clip_tokenizer(folder / "tokenizer", vocab, merges)
    pieces = t5_pieces(WORDS.split())
    write_t5_tokenizer(folder / "tokenizer_2", pieces)
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
    """A FluxTransformer2DModel of FLUX.1-dev's kind (guidance embedding, 16 latent channels packed to 64)."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(in_channels=64, guidance_embeds=True, **TRANSFORMERS[size]).eval()


def scheduler():
    """FLUX.1-dev's scheduler configuration: the shift is chosen per picture size when sampling."""
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
    """An AutoencoderKL with FLUX's geometry: 8 pixels per latent pixel, 16 channels, no quantisation
    convolutions.
    """
    from diffusers import AutoencoderKL

    blocks: dict[str, Any] = {  # diffusers declares these as tuples of one
        "block_out_channels": (16, 16, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    model: Any = AutoencoderKL(
        **blocks,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=16,
        sample_size=256,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    with torch.no_grad():
        out = model.encoder.conv_out
        out.weight[:16] *= LATENT_GAIN
        out.weight[16:] = 0
        out.bias[16:] = LATENT_LOGVAR
        model.decoder.conv_out.weight *= PICTURE_GAIN
    return model


def clip(vocabulary: int):
    """CLIP-L's kind of text encoder: 77 positions, pooled at the end token."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=77,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    ).eval()


def t5(vocabulary: int):
    """T5 v1.1's kind of encoder (gated GELU)."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,  # pyright: ignore[reportCallIssue]  # read from **kwargs
        )
    ).eval()


# ---------- tokenizers


def byte_letters() -> list[str]:
    """One printable letter per byte, as byte-level BPE writes them (GPT-2's table: printable bytes stand for
    themselves).
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def clip_vocabulary(words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair vocabulary and merges that make each word one token (Sennrich et al., arXiv 1508.07909), ties
    by spelling.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in sorted(set(words))]
    merges = []
    while pairs := Counter(pair for word in spelled for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(word, best) for word in spelled]
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    return {
        token: i for i, token in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])
    }, merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged, i = [], 0
    while i < len(word):
        both = tuple(word[i : i + 2]) == pair
        merged.append("".join(pair) if both else word[i])
        i += 2 if both else 1
    return merged


def write_clip_tokenizer(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """CLIPTokenizer's files, written as text so that every transformers version reads the same."""
    folder.mkdir(parents=True)
    end = "<|endoftext|>"
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(m) for m in merges), ""]), encoding="utf-8"
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": 77,
                "bos_token": "<|startoftext|>",
                "eos_token": end,
                "pad_token": end,
                "unk_token": end,
            }
        )
    )


def t5_pieces(words: Sequence[str]) -> list[tuple[str, float]]:
    """Unigram pieces with log-probabilities: the words, then every printable Latin-1 character, so that
    nothing is lost.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    characters = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0x100))]
    whole = [(f"▁{word}", -4.0) for word in sorted(set(words)) if len(word) > 1]
    return [
        *special,
        *whole,
        ("▁", -6.0),
        *((f"▁{c}", -9.0) for c in characters),
        *((c, -8.0) for c in characters),
    ]


def write_t5_tokenizer(folder: Path, pieces: list[tuple[str, float]]) -> None:
    """T5's tokenizer as tokenizer.json: no normalisation, a ▁ begins each word, </s> ends the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    space = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
    )
    tokenizer.decoder = decoders.Metaspace(**space)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "T5TokenizerFast",
                "model_max_length": TEXT_LENGTH,
                "extra_ids": 0,
                "eos_token": "</s>",
                "pad_token": "<pad>",
                "unk_token": "<unk>",
            }
        )
    )


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=list(TRANSFORMERS), default="tiny")
    options = parser.parse_args(argv)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses CPU kernels that nothing here uses
    try:
        print(make(options.folder, seed=options.seed, size=options.size))
    except Refused as refused:
        sys.exit(str(refused))


if __name__ == "__main__":
    main()
