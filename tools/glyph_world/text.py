"""Tokenizers that know the world's words and spell all others, and text encoders that learn with a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tools import tiny
from tools.glyph_world.world import WORDS

T5_LENGTH = 32  # what the tokenizer tells: the longest caption of the world has 25 tokens


def clip_tokenizer(folder: Path) -> Any:
    """CLIP's kind of tokenizer, written to `folder`; 77 tokens."""
    from transformers import CLIPTokenizer

    if not folder.exists():
        tiny.write_clip_tokenizer(folder, *tiny.clip_vocabulary(WORDS))
    return CLIPTokenizer.from_pretrained(folder)


def t5_tokenizer(folder: Path) -> Any:
    """T5's kind of tokenizer, written to `folder`."""
    from transformers import T5TokenizerFast  # pyright: ignore[reportAttributeAccessIssue]  # made at import

    if not folder.exists():
        tiny.write_t5_tokenizer(folder, tiny.t5_pieces(WORDS), T5_LENGTH)
    return T5TokenizerFast.from_pretrained(folder)


def clip(tokenizer: Any, width: int, head: int = 64, *, projected: bool = False) -> Any:
    """A CLIP text encoder of two layers; `projected` is SDXL's second encoder."""
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
    """A T5 v1.1 encoder without dropout."""
    return tiny.t5(len(tokenizer), width, dropout_rate=0.0)


def tokens(tokenizer: Any, captions: Sequence[str], length: int, device: str) -> Tensor:
    """(B, length) token numbers, padded and cut."""
    told = tokenizer(
        list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return told.input_ids.to(device)


def longest(tokenizer: Any, captions: Sequence[str]) -> int:
    """Tokens of the longest caption, end tokens included."""
    return max(len(ids) for ids in tokenizer(list(captions)).input_ids)


def causal(tokenizer: Any, captions: Sequence[str], device: str) -> Tensor:
    """Token numbers just long enough: in a causal encoder padding changes nothing before it."""
    return tokens(tokenizer, captions, min(77, longest(tokenizer, captions)), device)


def rows(text: Tensor, wanted: Tensor) -> Tensor:
    """`text` of one caption repeated for `wanted`'s batch."""
    return text.expand(len(wanted), *text.shape[1:])
