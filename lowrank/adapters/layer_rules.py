"""`module_rules`: rank, alpha and learning rate of layers by the pattern of their names.

    module_rules = "attn2 -> rank=16 alpha=8; ^unet\\.mid_block -> lr=5e-5; ^te -> off"

Rules are set apart by semicolons or lines. Each pattern is a regular expression, searched in the part and the
dotted path of a layer (`unet.mid_block.attentions.0.proj_in`, `te1.text_model.encoder.layers.0.mlp.fc1`); the
first rule that matches a layer holds for it. `class:FeedForward` is for all layers in blocks of that class:
it holds where no pattern does, and of several the innermost block's. `rank` and `alpha` replace
--network_dim, --network_alpha and every other argument about them, `lr` is the layer's learning rate itself,
and `off` leaves the layer out.
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
    """What holds for layers that the pattern is found in, or that are in a block of the class `within`.

    None leaves a value as it is, rank 0 is `off`.
    """

    pattern: re.Pattern
    within: str | None = None
    rank: int | None = None
    alpha: float | None = None
    lr: float | None = None


def parse_rules(text: str | None) -> tuple[Rule, ...]:
    """The rules of a `module_rules` text. Raises `Refused`, quoting the rule that cannot be read."""
    pieces = [piece.strip() for piece in re.split(r"[;\n]", text or "")]
    return tuple(_rule(piece) for piece in pieces if piece)


def _rule(text: str) -> Rule:
    pattern, arrow, said = (piece.strip() for piece in text.rpartition("->"))
    if not arrow or not pattern or not said:
        raise Refused(
            f"module_rules {text!r} is not of the form PATTERN -> rank=8 alpha=4 lr=1e-4, or PATTERN -> off"
        )
    within = pattern.removeprefix(_CLASS).strip() if pattern.startswith(_CLASS) else None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise Refused(
            f"module_rules has {pattern!r}, which is not a regular expression ({error}); escape dots as \\."
        ) from error
    return Rule(compiled, within, **({"rank": 0} if said == "off" else _values(text, said)))


def _values(text: str, said: str) -> dict:
    found = {}
    for word in said.split():
        name, _, value = word.partition("=")
        if name not in _KINDS:
            raise Refused(
                f"module_rules {text!r} sets {name!r}{nearest(name, _KINDS)}; it may set "
                f"{', '.join(_KINDS)}, or say off"
            )
        try:
            number = _KINDS[name](value)
        except ValueError:
            number = -1
        lowest = 0 if name == "lr" else 1 if name == "rank" else math.ulp(0)
        if not lowest <= number < math.inf:
            raise Refused(
                f"module_rules {text!r} has {word}, which is not {_WORDS[name]}; correct it, or say off"
            )
        found[name] = number
    return found


def rule_path(target: Target) -> str:
    """What patterns are searched in: the part and the dotted path."""
    return f"{target.part}.{target.path}"


def first(rules: Sequence[Rule], target: Target) -> int | None:
    """The position of the rule that holds for a layer, or None."""
    told = rule_path(target)
    by_name = (i for i, rule in enumerate(rules) if rule.within is None and rule.pattern.search(told))
    by_class = (i for word in target.inside for i, rule in enumerate(rules) if rule.within == word)
    return next(by_name, next(by_class, None))


def check_rules(rules: Sequence[Rule], targets: Iterable[Target]) -> None:
    """Raise `Refused` for a rule that holds for none of the layers."""
    targets = list(targets)
    used = {first(rules, target) for target in targets}
    for i, rule in enumerate(rules):
        if i not in used:
            taken = any(first([rule], target) == 0 for target in targets)
            why = "matches only layers of other rules" if taken else "matches no adapted layer"
            known = dict.fromkeys(kind for target in targets for kind in target.inside)
            like = [rule_path(target) for target in targets[:2]] if rule.within is None else known
            raise Refused(
                f"module_rules pattern {rule.pattern.pattern!r} {why}; "
                f"{'layers are named like' if rule.within is None else 'they are in'} {', '.join(like)}"
            )
