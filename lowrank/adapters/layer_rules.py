"""The network argument `module_rules`: rank, alpha and learning rate of layers chosen by name or class.

    module_rules = "attn2 -> rank=16 alpha=8; ^unet\\.mid_block -> lr=5e-5; ^te -> off"

Rules are separated by semicolons or line breaks. A pattern is a regular expression, searched in the component
and dotted path of a layer (`unet.mid_block.attentions.0.proj_in`,
`te1.text_model.encoder.layers.0.mlp.fc1`); the first rule that matches a layer applies. `class:FeedForward`
matches all layers inside blocks of that class. It applies if no pattern matches; of several classes the
innermost applies. `rank` and `alpha` replace --network_dim, --network_alpha and all other arguments for them,
`lr` is the absolute learning rate of the layer, and `off` excludes the layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lowrank.adapters.targets import Target
from lowrank.errors import Refused, nearest

_CLASS = "class:"
_KINDS = {"rank": int, "alpha": float, "lr": float}
_WORDS = {"rank": "a whole number above 0", "alpha": "a number above 0", "lr": "a number of 0 or more"}


@dataclass(frozen=True)
class Rule:
    """One rule: for layers whose path matches `pattern`, or that are in a block of the class `within`.

    None leaves a value unchanged; rank 0 means `off`.
    """

    pattern: re.Pattern
    within: str | None = None
    rank: int | None = None
    alpha: float | None = None
    lr: float | None = None


def parse_rules(text: str | None) -> tuple[Rule, ...]:
    """Parse a `module_rules` text. Raises `Refused`, quoting the rule that is malformed."""
    pieces = [piece.strip() for piece in re.split(r"[;\n]", text or "")]
    return tuple(_rule(piece) for piece in pieces if piece)


def _rule(text: str) -> Rule:
    pattern, arrow, settings = (piece.strip() for piece in text.rpartition("->"))
    if not arrow or not pattern or not settings:
        raise Refused(
            f"module_rules {text!r} is not of the form PATTERN -> rank=8 alpha=4 lr=1e-4, or PATTERN -> off"
        )
    within = pattern.removeprefix(_CLASS).strip() if pattern.startswith(_CLASS) else None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise Refused(
            f"module_rules pattern {pattern!r} is not a regular expression ({error}); escape dots as \\."
        ) from error
    return Rule(compiled, within, **({"rank": 0} if settings == "off" else _values(text, settings)))


def _values(text: str, settings: str) -> dict:
    values = {}
    for word in settings.split():
        name, _, value = word.partition("=")
        if name not in _KINDS:
            raise Refused(
                f"module_rules {text!r} sets {name!r}{nearest(name, _KINDS)}; use {', '.join(_KINDS)}, or off"
            )
        try:
            number = _KINDS[name](value)
        except ValueError:
            number = -1
        lowest = 0 if name == "lr" else 1 if name == "rank" else math.ulp(0)
        if not lowest <= number < math.inf:
            raise Refused(
                f"module_rules {text!r} has {word}, which is not {_WORDS[name]}; correct it, or use off"
            )
        values[name] = number
    return values


def rule_path(target: Target) -> str:
    """Return the text that patterns are searched in: component and dotted path of a layer."""
    return f"{target.part}.{target.path}"


def first(rules: Sequence[Rule], target: Target) -> int | None:
    """Return the index of the rule that applies to a layer, or None."""
    path = rule_path(target)
    by_name = (i for i, rule in enumerate(rules) if rule.within is None and rule.pattern.search(path))
    by_class = (i for word in target.inside for i, rule in enumerate(rules) if rule.within == word)
    return next(by_name, next(by_class, None))


def check_rules(rules: Sequence[Rule], targets: Iterable[Target]) -> None:
    """Raise `Refused` for a rule that applies to no layer."""
    targets = list(targets)
    used = {first(rules, target) for target in targets}
    for i, rule in enumerate(rules):
        if i not in used:
            shadowed = any(first([rule], target) == 0 for target in targets)
            why = (
                "matches only layers that another rule applies to" if shadowed else "matches no adapted layer"
            )
            classes = dict.fromkeys(kind for target in targets for kind in target.inside)
            examples = [rule_path(target) for target in targets[:2]] if rule.within is None else classes
            raise Refused(
                f"module_rules pattern {rule.pattern.pattern!r} {why}; "
                f"{'layers are named like' if rule.within is None else 'layers are in'} {', '.join(examples)}"
            )
