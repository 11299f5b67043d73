"""The caption of an image for one occurrence in an epoch.

Pure: equal example, options, random stream, epoch and step give an equal text. The stages have the order of
kohya sd-scripts: prefix and suffix, dropout of the whole caption, wildcard, then (only if tags are shuffled,
dropped or warmed up) the tags, at last the secondary separator.
"""

from __future__ import annotations

import math
import random
import re

from lowrank.config.flags_data import Captions
from lowrank.data.dataset import Example
from lowrank.errors import Refused

_CHOICE = re.compile(r"\{([^{}]+)\}")
_OPEN, _CLOSE = "\x00", "\x01"  # replace {{ and }} while the choices are made


def varies_tags(options: Captions) -> bool:
    """True when tags are shuffled, dropped or warmed up; otherwise a caption is not split into tags."""
    return options.shuffle_caption or options.caption_tag_dropout_rate > 0 or options.token_warmup_step > 0


def draw_caption(
    example: Example,
    options: Captions,
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
    every = options.caption_dropout_every_n_epochs
    dropped = options.caption_dropout_rate > 0 and rng.random() < options.caption_dropout_rate
    if dropped or (every > 0 and (epoch + 1) % every == 0):
        return ""
    line = rng.choice(example.captions) if options.enable_wildcard else example.captions[0]
    text = _with_affixes(line, options)
    if options.enable_wildcard:
        text = _choose(text, rng)
    if varies_tags(options):
        text = _vary_tags(text, options, rng, step, max_train_steps)
    return _with_secondary(text, options)


def possible_captions(example: Example, options: Captions) -> tuple[str, ...] | None:
    """Every caption the example can get, or None when that is open-ended (varied tags, `{a|b}` choices).

    A list of all captions can be encoded once and cached.
    """
    lines = example.captions if options.enable_wildcard else example.captions[:1]
    texts = [_with_affixes(line, options) for line in lines]
    has_choices = options.enable_wildcard and any("{" in text or "}" in text for text in texts)
    if has_choices or varies_tags(options):
        return None
    rate, every = options.caption_dropout_rate, options.caption_dropout_every_n_epochs
    kept = [] if rate >= 1 or every == 1 else [_with_secondary(text, options) for text in texts]
    emptied = [""] if rate > 0 or every > 0 else []
    return tuple(dict.fromkeys(kept + emptied))


def _with_affixes(line: str, options: Captions) -> str:
    before = f"{options.caption_prefix} " if options.caption_prefix else ""
    after = f" {options.caption_suffix}" if options.caption_suffix else ""
    return before + line + after


def _with_secondary(text: str, options: Captions) -> str:
    if not options.secondary_separator:
        return text
    return text.replace(options.secondary_separator, options.caption_separator)


def _choose(text: str, rng: random.Random) -> str:
    """The text with one part of each `{a|b}`; `{{` and `}}` are braces."""
    hidden = text.replace("{{", _OPEN).replace("}}", _CLOSE)
    chosen = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), hidden)
    return chosen.replace(_OPEN, "{").replace(_CLOSE, "}")


def _split_tags(text: str, options: Captions) -> tuple[list[str], list[str], list[str]]:
    """The tags as (fixed head, those that vary, fixed tail)."""

    def tags(part: str) -> list[str]:
        return [tag.strip() for tag in part.split(options.caption_separator) if tag.strip()]

    mark = options.keep_tokens_separator
    if mark and mark in text:
        head, _, after = text.partition(mark)
        middle, _, tail = after.partition(mark)
        return tags(head), tags(middle), tags(tail)
    return tags(text)[: options.keep_tokens], tags(text)[options.keep_tokens :], []


def _vary_tags(
    text: str, options: Captions, rng: random.Random, step: int, max_train_steps: int | None
) -> str:
    head, middle, tail = _split_tags(text, options)
    middle = middle[: _warm_count(len(middle), options, step, max_train_steps)]
    if options.shuffle_caption:
        rng.shuffle(middle)
    if options.caption_tag_dropout_rate > 0:
        middle = [tag for tag in middle if rng.random() >= options.caption_tag_dropout_rate]
    # sd-scripts joins with ", " whatever the separator is, so that a list split at ";" is not one any more
    return f"{options.caption_separator} ".join(head + middle + tail)


def _warm_count(count: int, options: Captions, step: int, max_train_steps: int | None) -> int:
    """How many of `count` tags are in use: `token_warmup_min` at first, all after `token_warmup_step`."""
    until = options.token_warmup_step
    if 0 < until < 1:
        if max_train_steps is None:
            raise Refused(
                f"token_warmup_step {until} is a share of max_train_steps, which is not known here; "
                "give a number of steps"
            )
        until = math.floor(until * max_train_steps)
    if not until or step >= until:
        return count
    return max(0, math.floor(step * (count - options.token_warmup_min) / until) + options.token_warmup_min)
