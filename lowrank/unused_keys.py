"""Keys of an adapter file that are not used: the kind of adapter that writes them, and what tools print."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lowrank.errors import Refused

BIAS, CORE, FULL = "bias", "core", "full weight"
# What is not read, by the ends of the keys: other kinds of adapters (LyCORIS, PEFT, kohya), and tensors of
# this program's methods in a file that does not name its method
_FOREIGN = {
    r"(core|core_up|core_down|(basis|null|norm|free)_(up|down))": CORE,
    r"hada_\w+": "LoHa",
    r"lokr_\w+": "LoKr",
    r"(oft_\w+(\.weight)?|rescale)": "OFT",
    r"on_input": "IA3",
    r"[ab][12]\.weight": "GLoRA",
    r"diff": "full difference",
    r"set_weight": "set_weight",
    r"(diff_b|bias|lora_(up|[AB](\.\w+)?)\.bias)": BIAS,
    r"([wb]_norm|(query|key)_norm\.scale)": "norm",
    r"scalar": "LoRA with a scalar",
    r"(lora_embedding_[AB](\.\w+)?|token_adapter\.trainable_tokens_delta)": "embedding",
}
_EMBEDDING = re.compile(r"^(bundle_emb\.|emb_params$|string_to_param\.|clip_[lg]$)")  # textual inversions


class ForeignKey(NamedTuple):
    """A key that is not read: the module it belongs to, and the kind of adapter that writes such keys.

    The kind is `unknown (suffix)` where no program is known; `certain` is False where the key need not be an
    adapter's at all.
    """

    key: str
    module: str
    kind: str
    certain: bool = True


def foreign_key(key: str) -> ForeignKey:
    if _EMBEDDING.match(key):
        return ForeignKey(key, key, "embedding")
    for pattern, kind in _FOREIGN.items():
        if match := re.search(rf"\.{pattern}$", key):
            return ForeignKey(key, key[: match.start()], kind)
    module, _, suffix = key.rpartition(".")
    if suffix == "weight" and module and ".lora" not in key:
        return ForeignKey(key, module, FULL, certain="lora" in key)
    if "lora" in key:
        module = key.partition("." if key.startswith("lora_") else ".lora")[0]
        return ForeignKey(key, module, f"unknown ({key[len(module) + 1 :]})")
    return ForeignKey(key, module, f"unknown ({suffix})", certain=False)


def unused_text(unused: Iterable[ForeignKey]) -> str:
    """What of a file is left out, by kind and count (`norm × 2, LoKr × 1, for example KEY`), or nothing."""
    unused = list(unused)
    if not unused:
        return ""
    counts = Counter(key.kind for key in unused).most_common()
    shown = ", ".join(f"{kind} × {count}" for kind, count in counts[:8])
    more = f", and {len(counts) - 8} kinds more" if len(counts) > 8 else ""
    return f"{shown}{more}, for example {min(key.key for key in unused)}"


def usage(source: str, tensors: int, unused: Sequence[ForeignKey]) -> str:
    """One line: how many tensors of a file are used, and what is left out."""
    left = unused_text(unused)
    used = f"{source}: {tensors - len(unused)} of {tensors} tensors are used"
    return f"{used}; left out: {left}" if left else f"{used}, nothing is left out"


def refuse_unused(source: str, tensors: int, unused: Sequence[ForeignKey]) -> None:
    """Raise `Refused` where something of a file is not used, for --strict."""
    if unused:
        raise Refused(
            f"--strict, and {len(unused)} of {tensors} tensors of {source} would be left out: "
            f"{unused_text(unused)}; leave --strict out to use the others"
        )
