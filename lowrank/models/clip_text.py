"""Captions through CLIP as kohya's trainers encode them: chunks of 75 tokens, skipped layers, weights.

A caption of up to 75·n tokens is cut into n chunks; each goes through CLIP between BOS and EOS, and the
states are joined again as BOS, the insides of the chunks, EOS. Facts: kohya sd-scripts' text encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank.errors import Refused
from lowrank.models.family import TokenCounts
from lowrank.models.weighting import weighted


class Tokens(NamedTuple):
    """One caption: `chunks` (n, L) of token ids, `weights` (n·(L − 2) + 2,) of what is joined again."""

    chunks: Tensor
    weights: Tensor


def token_counts(tokenizer: Any, captions: Sequence[str], chunks: int, weights: bool) -> TokenCounts:
    """How many tokens each caption has, and how many `chunks` hold."""
    counts = [len(_ids(tokenizer, caption, weights)[0]) for caption in captions]
    way_out = "give --max_token_length 225" if chunks < 3 else ""
    return TokenCounts("CLIP", (_length(tokenizer) - 2) * chunks, counts, way_out)


def _length(tokenizer: Any) -> int:
    """The tokens of a chunk, with BOS and EOS."""
    return min(77, tokenizer.model_max_length)


def _ids(tokenizer: Any, caption: str, weights: bool) -> tuple[list[int], list[float]]:
    """The tokens of a caption, and their weights."""
    ids, scales = [], []
    for text, weight in weighted(caption) if weights else [(caption, 1.0)]:
        pieces = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ids += pieces
        scales += [weight] * len(pieces)
    return ids, scales


def tokenize(tokenizer: Any, caption: str, chunks: int, weights: bool) -> Tokens:
    """A caption's tokens, cut to what `chunks` hold."""
    length = _length(tokenizer)
    room = (length - 2) * chunks
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids, scales = _ids(tokenizer, caption, weights)
    ids, scales = ids[:room], scales[:room]
    inside = [*ids, eos, *[pad] * room][: room + 1]  # the last is EOS where the caption fills the room
    rows = []
    for start in range(0, room, length - 2):
        row = inside[start : start + length - 2]
        # what follows a chunk: padding where the text has ended within it, else EOS
        ended = eos in row or (pad != eos and row[-1] == pad)
        last = pad if ended else eos
        if pad != eos and row[0] == pad:  # a chunk of padding alone begins with EOS
            row = [eos, *row[1:]]
        rows.append([bos, *row, last])
    factors = torch.ones(room + 2)
    factors[1 : 1 + len(scales)] = torch.tensor(scales)
    return Tokens(torch.tensor(rows), factors)


def hidden(encoder: Any, tokens: list[Tokens], skip: int | None, final_norm: bool) -> tuple[Tensor, Tensor]:
    """Hidden states (B, n·75 + 2, D) of B captions, and the pooled vectors of their first chunks (B, P).

    `skip` n takes the n-th hidden state from the end, None the last; `final_norm` puts it through the
    encoder's last normalisation (SD), or leaves it as it is (SDXL). Differentiable in the encoder.
    Raises `Refused` where there are fewer layers than `skip`.
    """
    B, n = len(tokens), len(tokens[0].chunks)
    ids = torch.cat([caption.chunks for caption in tokens]).to(encoder.device)  # (B·n, L)
    out = encoder(ids, output_hidden_states=True)
    # a projecting encoder (SDXL's second) holds the model, the other is the model in transformers 5
    inner = getattr(encoder, "text_model", encoder)
    layers = len(out.hidden_states) - 1
    if skip and skip > layers:
        raise Refused(f"--clip_skip {skip} is more than the {layers} layers of the text encoder; give less")
    states = out.hidden_states[-(skip or 1)]  # (B·n, L, D)
    if final_norm:
        states = inner.final_layer_norm(states)
    states = states.unflatten(0, (B, n))  # (B, n, L, D)
    pooled = getattr(out, "text_embeds", None)
    pooled = out.pooler_output if pooled is None else pooled
    joined = torch.cat([states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]], dim=1)
    weights = torch.stack([caption.weights for caption in tokens])
    if (weights != 1).any():
        joined = joined * weights.to(joined)[..., None]
    return joined, pooled.unflatten(0, (B, n))[:, 0]
