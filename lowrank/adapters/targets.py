"""Where adapters go: one row per kind of model and dialect, as data.

A row names a root class, the default target layers as a pattern over their dotted paths, the prefix of kohya
keys and the prefix of native file keys (empty: kohya's keys are the native ones). FLUX targets are the twelve
of QR-LoRA's official code: on FLUX.1-dev 342 layers, 228 in double and 114 in single blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from torch import nn

from lowrank.errors import Refused, nearest

FLUX_TARGETS = (
    "attn.to_k",
    "attn.to_q",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)
CLIP_TARGETS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)


Layer: TypeAlias = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Host:
    """One kind of root model."""

    classes: tuple[str, ...]
    targets: tuple[str, ...]  # path suffixes
    native: str = ""  # prefix of native keys
    level: str = ""  # a leading path level that files have and the model may lack
    part: str = ""  # the part's name in keys, where it is not the position among the text encoders


HOSTS = (
    Host(("FluxTransformer2DModel",), FLUX_TARGETS, native="transformer."),
    Host(
        ("CLIPTextModel", "CLIPTextModelWithProjection"),
        CLIP_TARGETS,
        native="text_encoder.",
        level="text_model.",
    ),
    Host(("T5EncoderModel",), (), part="te3"),  # kohya's name; never adapted unless targets are named
)


class Target(NamedTuple):
    """A layer to adapt and its names."""

    part: str  # "unet", "te", "te1", …
    name: str  # key inside the network: lora_unet_transformer_blocks_0_attn_to_q
    native: str  # module in native files: transformer.transformer_blocks.0.attn.to_q; "" = same as `name`
    module: Layer


def ends_with(names: Iterable[str]) -> str:
    """A pattern that matches paths ending in one of the names at a dot: `to_q` does not match `into_q`."""
    return r"(?:^|\.)(?:" + "|".join(re.escape(name) for name in names) + r")$"


def _compiled(option: str, pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise Refused(
            f"{option} is not a regular expression: {pattern!r} ({error}); escape dots as \\."
        ) from error


def find(
    part: str, root: nn.Module, *, target: str | None = None, exclude: str | None = None
) -> list[Target]:
    """The Linear and Conv2d layers of `root` to adapt, in the model's order.

    `target` and `exclude` are regular expressions searched in dotted paths; without `target` the model's row
    in HOSTS decides. Raises `Refused` for an unknown model without `target`, and for patterns that match
    nothing.
    """
    row = next((row for row in HOSTS if type(root).__name__ in row.classes), None)
    if row is None and target is None:
        known = ", ".join(name for host in HOSTS for name in host.classes)
        raise Refused(
            f"{type(root).__name__} has no default targets (known: {known}); name the layers with "
            "--network_args target=REGEX"
        )
    row = row or Host((), ())
    if target is None and not row.targets:
        return []
    wanted = _compiled("target", target if target is not None else ends_with(row.targets))
    unwanted = _compiled("exclude", exclude) if exclude else None
    layers = {
        path: module for path, module in root.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    chosen = {path: module for path, module in layers.items() if wanted.search(path)}
    if not chosen:
        hint = nearest(target or "", layers) or f"; its layers are named like {', '.join(list(layers)[:3])}"
        raise Refused(f"no layer of {type(root).__name__} matches target {wanted.pattern!r}{hint}")
    if unwanted:
        kept = {path: module for path, module in chosen.items() if not unwanted.search(path)}
        if len(kept) in (0, len(chosen)):
            what = "every target layer" if not kept else "no target layer"
            raise Refused(
                f"exclude {exclude!r} matches {what} of {type(root).__name__}; targets are named like "
                f"{', '.join(list(chosen)[:3])}"
            )
        chosen = kept
    return [_named(part, row, path, module) for path, module in chosen.items()]


def _named(part: str, row: Host, path: str, module: Layer) -> Target:
    path = path if path.startswith(row.level) else row.level + path
    part = row.part or part
    name = ("lora_unet_" if part == "unet" else f"lora_{part}_") + path.replace(".", "_")
    native = row.native
    if native.startswith("text_encoder") and part == "te2":
        native = "text_encoder_2."
    return Target(part, name, native and native + path, module)
