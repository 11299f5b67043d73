"""Shared parts of the makers of tiny models: tokenizers, CLIP, T5, a VAE, and folders made only once."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lowrank.errors import Refused
from lowrank.files import atomic_folder
from lowrank.models.components import without_bars

# Words of captions, one token each; other text is spelled in letters.
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

# Gains of a random VAE: latents with about the spread of FLUX's and little noise, images with contrast
LATENT_GAIN, LATENT_LOGVAR, PICTURE_GAIN = 8.0, -8.0, 1.0


@contextlib.contextmanager
def new_folder(folder: str | Path, mark: str, recipe: Mapping[str, Any], what: str) -> Iterator[Path | None]:
    """Yield a temporary folder that is renamed to `folder` at the end, or None if `folder` has this recipe.

    Random numbers in the block are seeded by recipe["seed"]. Raises `Refused` if `folder` has other content.
    """
    folder = Path(folder)
    if folder.exists():
        if (folder / mark).is_file() and json.loads((folder / mark).read_text()) == recipe:
            yield None
            return
        if not (folder / mark).is_file() and (not folder.is_dir() or any(folder.iterdir())):
            raise Refused(
                f"{folder} exists and is not a {what} of this tool; give another folder or remove it"
            )
    with atomic_folder(folder) as part, torch.random.fork_rng(devices=[]), without_bars():
        torch.manual_seed(recipe["seed"])
        yield part
        (part / mark).write_text(json.dumps(recipe))


# ---------- models


def vae(levels: int = 4, *, latent_channels: int, layers_per_block: int = 1, **facts: Any):
    """Return an AutoencoderKL with 2^(levels − 1) pixels per latent pixel, whose images have contrast."""
    from diffusers import AutoencoderKL

    blocks: dict[str, Any] = {  # diffusers declares these as tuples of one
        "block_out_channels": ((16, 16, 32, 32) if levels == 4 else (16,) * (levels - 1) + (32,)),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    model: Any = AutoencoderKL(
        **blocks,
        layers_per_block=layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=16,
        sample_size=256,
        **facts,
    ).eval()
    with torch.no_grad():
        out = model.encoder.conv_out
        out.weight[:latent_channels] *= LATENT_GAIN
        out.weight[latent_channels:] = 0
        out.bias[latent_channels:] = LATENT_LOGVAR
        if model.quant_conv is not None:  # the identity
            torch.nn.init.dirac_(model.quant_conv.weight)
            torch.nn.init.zeros_(model.quant_conv.bias)
        model.decoder.conv_out.weight *= PICTURE_GAIN
    return model


def clip(vocabulary: int, width: int = 64, *, kind: Any = None, **facts: Any):
    """Return a small CLIP-L text encoder: two layers, heads of 64, 77 positions, pooled at the end token.

    `kind` is another class of transformers; `facts` replace entries of the configuration.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    config: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "projection_dim": width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 64,
        "max_position_embeddings": 77,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }
    return (kind or CLIPTextModel)(CLIPTextConfig(**config | facts)).eval()


def t5(vocabulary: int, width: int = 64, **facts: Any):
    """Return a T5 v1.1 encoder (gated GELU) of two layers with four heads; `facts` extend the config."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=width // 4,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,  # pyright: ignore[reportCallIssue]  # read from **kwargs
            **facts,
        )
    ).eval()


# ---------- tokenizers


def byte_letters() -> list[str]:
    """Return one printable letter per byte, as in byte-level BPE (GPT-2's table)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def clip_vocabulary(words: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a byte-pair vocabulary and merges with each word as one token (Sennrich, arXiv 1508.07909).

    Ties are broken by spelling.
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


def write_clip_tokenizer(
    folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]], pad: str = "<|endoftext|>"
) -> None:
    """Write the files of a CLIPTokenizer as text, which every version of transformers reads alike."""
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
                "pad_token": pad,
                "unk_token": end,
            }
        )
    )


def t5_pieces(words: Sequence[str]) -> list[tuple[str, float]]:
    """Return unigram pieces with log-probabilities: the words, and every printable Latin-1 character."""
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


def write_t5_tokenizer(folder: Path, pieces: list[tuple[str, float]], length: int = 64) -> None:
    """Write T5's tokenizer as tokenizer.json: no normalisation, ▁ begins each word, </s> ends the text.

    Its model_max_length is `length` tokens.
    """
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
                "model_max_length": length,
                "extra_ids": 0,
                "eos_token": "</s>",
                "pad_token": "<pad>",
                "unk_token": "<unk>",
            }
        )
    )
