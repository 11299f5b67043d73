"""Captions: what one image is called, this time.

Pure: the same example, subset, random stream, epoch and step give the same text. The order of the stages is
that of kohya sd-scripts: prefix and suffix, whole-caption dropout, wildcard, then (only if tags are shuffled,
dropped or warmed up) the tags, at last the secondary separator.
"""

from __future__ import annotations

import math
import random
import re

from lowrank.data.dataset import Example, Subset
from lowrank.errors import Refused

_CHOICE = re.compile(r"\{([^{}]+)\}")
_OPEN, _CLOSE = "\x00", "\x01"  # stand for {{ and }} while the choices are made


def draw_caption(
    example: Example,
    subset: Subset,
    rng: random.Random,
    *,
    epoch: int,
    step: int = 0,
    max_train_steps: int | None = None,
) -> str:
    """One caption; `epoch` and `step` count from 0.

    `caption_dropout_every_n_epochs` n empties epochs n-1, 2n-1, … With several caption lines
    (`enable_wildcard`) prefix and suffix go around the line that is drawn. Raises `Refused` when
    `token_warmup_step` is a share and `max_train_steps` is unknown.
    """
    if _emptied(subset, rng, epoch):
        return ""
    line = rng.choice(example.captions) if subset.enable_wildcard else example.captions[0]
    text = _dressed(line, subset)
    if subset.enable_wildcard:
        text = _chosen(text, rng)
    if subset.varies_tags:
        text = _varied(text, subset, rng, step, max_train_steps)
    return _joined_again(text, subset)


def possible_captions(example: Example, subset: Subset) -> tuple[str, ...] | None:
    """Every caption the example can get, or None when that is open-ended (varied tags, `{a|b}` choices).

    What can be listed can be encoded once and cached.
    """
    lines = example.captions if subset.enable_wildcard else example.captions[:1]
    texts = [_dressed(line, subset) for line in lines]
    if subset.varies_tags or (subset.enable_wildcard and any("{" in text or "}" in text for text in texts)):
        return None
    every = subset.caption_dropout_every_n_epochs
    kept = (
        []
        if subset.caption_dropout_rate >= 1 or every == 1
        else [_joined_again(text, subset) for text in texts]
    )
    emptied = [""] if subset.caption_dropout_rate > 0 or every > 0 else []
    return tuple(dict.fromkeys(kept + emptied))


def _emptied(subset: Subset, rng: random.Random, epoch: int) -> bool:
    every = subset.caption_dropout_every_n_epochs
    by_chance = subset.caption_dropout_rate > 0 and rng.random() < subset.caption_dropout_rate
    return by_chance or (every > 0 and (epoch + 1) % every == 0)


def _dressed(line: str, subset: Subset) -> str:
    before = f"{subset.caption_prefix} " if subset.caption_prefix else ""
    after = f" {subset.caption_suffix}" if subset.caption_suffix else ""
    return before + line + after


def _chosen(text: str, rng: random.Random) -> str:
    hidden = text.replace("{{", _OPEN).replace("}}", _CLOSE)
    made = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), hidden)
    return made.replace(_OPEN, "{").replace(_CLOSE, "}")


def _tags(text: str, subset: Subset) -> list[str]:
    return [tag.strip() for tag in text.split(subset.caption_separator) if tag.strip()]


def _parts(text: str, subset: Subset) -> tuple[list[str], list[str], list[str]]:
    """The tags as (fixed head, those that vary, fixed tail)."""
    mark = subset.keep_tokens_separator
    if mark and mark in text:
        head, _, rest = text.partition(mark)
        middle, _, tail = rest.partition(mark)
        return _tags(head, subset), _tags(middle, subset), _tags(tail, subset)
    tags = _tags(text, subset)
    return tags[: subset.keep_tokens], tags[subset.keep_tokens :], []


def _varied(text: str, subset: Subset, rng: random.Random, step: int, max_train_steps: int | None) -> str:
    head, middle, tail = _parts(text, subset)
    middle = middle[: _warm(len(middle), subset, step, max_train_steps)]
    if subset.shuffle_caption:
        rng.shuffle(middle)
    if subset.caption_tag_dropout_rate > 0:
        middle = [tag for tag in middle if rng.random() >= subset.caption_tag_dropout_rate]
    # joined by the subset's own separator, as sd-scripts does since its PR 2390 (before: always ", ")
    return f"{subset.caption_separator} ".join(head + middle + tail)


def _warm(count: int, subset: Subset, step: int, max_train_steps: int | None) -> int:
    """How many of `count` tags are in use: `token_warmup_min` at first, all after `token_warmup_step`."""
    until = subset.token_warmup_step
    if 0 < until < 1:
        if max_train_steps is None:
            raise Refused(
                f"token_warmup_step {until} is a share of max_train_steps, which is not known here; "
                "give a number of steps"
            )
        until = math.floor(until * max_train_steps)
    if not until or step >= until:
        return count
    return max(0, math.floor(step * (count - subset.token_warmup_min) / until) + subset.token_warmup_min)


def _joined_again(text: str, subset: Subset) -> str:
    return (
        text.replace(subset.secondary_separator, subset.caption_separator)
        if subset.secondary_separator
        else text
    )
