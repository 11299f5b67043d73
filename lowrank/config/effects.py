"""Flags that cannot act in a run, by the conditions `acts_with` of their declarations.

All conditions of a flag must hold. A condition is alternatives joined by " or ". An alternative is a flag
that is on (`noise_offset`), a flag with one of several values (`loss_type=huber|smooth_l1`), a flag that is
off (`not max_train_epochs`), or a fact of the run that several flags decide, a key of `FACTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from lowrank.config.command_line import Parsed
from lowrank.config.train import TrainOptions

# fact -> (whether it holds, the reason in the log if it does not)
FACTS: Mapping[str, tuple[Callable[[TrainOptions], bool], str]] = {
    "a trained denoiser": (
        lambda o: not o.network.network_train_text_encoder_only,
        "the text encoders alone are trained (--network_train_text_encoder_only)",
    ),
    "a trained text encoder": (
        lambda o: (
            o.network.network_train_text_encoder_only
            or (o.network.train_text_encoder and not o.network.network_train_unet_only)
        ),
        "no text encoder is trained; that needs --train_text_encoder, and no --network_train_unet_only",
    ),
    "a part at the base rate": (
        lambda o: o.uses_base_rate,
        "every part that is trained has a rate of its own (--unet_lr, --text_encoder_lr)",
    ),
    "tags that move": (
        lambda o: bool(
            o.captions.shuffle_caption
            or o.captions.caption_tag_dropout_rate
            or o.captions.token_warmup_step
            or o.data.dataset_config
        ),
        "tags stay in place without --shuffle_caption, --caption_tag_dropout_rate or --token_warmup_step",
    ),
    "a schedule by name": (
        lambda o: not o.optimizer.lr_scheduler_type,
        "--lr_scheduler_type has precedence",
    ),
}


def without_effect(parsed: Parsed[TrainOptions]) -> Iterator[str]:
    """Yield a line for each given flag that cannot act in this run; a default value needs no line."""
    for name in parsed.given:
        spec = parsed.specs[name]
        if parsed.value(name) in (spec.default, None, ()) or not spec.flag.acts_with:
            continue
        for condition in spec.flag.acts_with:
            if not any(_holds(parsed, word) for word in condition.split(" or ")):
                yield f"{parsed.flag(name)} has no effect{explain(condition)}"
                break


def _holds(parsed: Parsed[TrainOptions], alternative: str) -> bool:
    if alternative in FACTS:
        return FACTS[alternative][0](parsed.options)
    name, equals, words = alternative.removeprefix("not ").partition("=")
    if name not in parsed.specs:  # a flag of another family
        return False
    value = parsed.value(name)
    if equals:
        return str(value) in words.split("|")
    return bool(value) != alternative.startswith("not ")


def explain(condition: str) -> str:
    """Return the end of "the flag has no effect …" where a condition does not hold."""
    words = condition.split(" or ")
    facts = [FACTS[word][1] for word in words if word in FACTS]
    if facts:
        return f": {facts[0]}"
    if words[0].startswith("not "):
        return f" with --{words[0].removeprefix('not ')}, which has precedence"
    return f" without {' or '.join(map(_spelled, words))}"


def _spelled(alternative: str) -> str:
    name, equals, values = alternative.partition("=")
    return f"--{name} {' or '.join(values.split('|'))}" if equals else f"--{name}"


def describe(conditions: tuple[str, ...]) -> str:
    """Return the conditions of a flag for a table: "acts only with --masked_loss"."""
    parts = []
    for condition in conditions:
        words = condition.split(" or ")
        without = words[0].startswith("not ")
        spelled = (word if word in FACTS else _spelled(word.removeprefix("not ")) for word in words)
        parts.append(f"{'without' if without else 'with'} {' or '.join(spelled)}")
    return f"acts only {' and '.join(parts)}" if parts else ""


def flags_of(condition: str) -> list[str]:
    """Return the names of the flags in a condition."""
    words = (word for word in condition.split(" or ") if word not in FACTS)
    return [word.removeprefix("not ").partition("=")[0] for word in words]
