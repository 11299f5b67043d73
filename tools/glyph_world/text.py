"""Tokenizers with the words of the glyph world as tokens, and text encoders trained with a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tools import tiny
from tools.glyph_world.world import WORDS

T5_LENGTH = 32  # model_max_length; the longest caption of the glyph world has 25 tokens


def clip_tokenizer(folder: Path) -> Any:
    """Return a CLIP tokenizer of 77 tokens, written to `folder` if it does not exist."""
    from transformers import CLIPTokenizer

    if not folder.exists():
        tiny.write_clip_tokenizer(folder, *tiny.clip_vocabulary(WORDS))
    return CLIPTokenizer.from_pretrained(folder)


def t5_tokenizer(folder: Path) -> Any:
    """Return a T5 tokenizer, written to `folder` if it does not exist."""
    from transformers import T5TokenizerFast  # pyright: ignore[reportAttributeAccessIssue]  # made at import

    if not folder.exists():
        tiny.write_t5_tokenizer(folder, tiny.t5_pieces(WORDS), T5_LENGTH)
    return T5TokenizerFast.from_pretrained(folder)


def clip(tokenizer: Any, width: int, head: int = 64, *, projected: bool = False) -> Any:
    """Return a CLIP text encoder of two layers; `projected` makes SDXL's second encoder."""
    from transformers import CLIPTextModelWithProjection

    return tiny.clip(
        len(tokenizer),
        width,
        kind=CLIPTextModelWithProjection if projected else None,
        intermediate_size=4 * width,
        num_attention_heads=width // head,
        hidden_act="gelu" if projected else "quick_gelu",
    )


def t5(tokenizer: Any, width: int) -> Any:
    """Return a T5 v1.1 encoder without dropout."""
    return tiny.t5(len(tokenizer), width, dropout_rate=0.0)


def tokens(tokenizer: Any, captions: Sequence[str], length: int, device: str) -> Tensor:
    """Tokenize captions to ids (B, length), padded and truncated."""
    encoding = tokenizer(
        list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return encoding.input_ids.to(device)


def longest(tokenizer: Any, captions: Sequence[str]) -> int:
    """Return the number of tokens of the longest caption, end tokens included."""
    return max(len(ids) for ids in tokenizer(list(captions)).input_ids)


def causal(tokenizer: Any, captions: Sequence[str], device: str) -> Tensor:
    """Tokenize captions to the longest length only; in a causal encoder padding has no effect."""
    return tokens(tokenizer, captions, min(77, longest(tokenizer, captions)), device)


def rows(text: Tensor, batch: Tensor) -> Tensor:
    """Repeat the encoding `text` of one caption for the size of `batch`."""
    return text.expand(len(batch), *text.shape[1:])
