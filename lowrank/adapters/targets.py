"""Where adapters go: one row per kind of model and dialect, as data.

A row names a root class, its default target layers (by the end of their paths, or by the class of the block
around them) and the prefix of native file keys (empty: kohya's keys are the native ones). FLUX targets are
the twelve of QR-LoRA's official code: on FLUX.1-dev 342 layers, 228 in double and 114 in single blocks. U-Net
targets are kohya's networks.lora: 192 layers on SD 1.5 and 722 on SDXL, with convolutions 278 and 788.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from lowrank.errors import Refused, nearest
from lowrank.naming import flux as flux_names
from lowrank.naming import keys
from lowrank.naming import unet as unet_names

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
    targets: tuple[str, ...] = ()  # path suffixes
    blocks: tuple[str, ...] = ()  # classes of blocks, all of whose layers are targets
    convolutional: tuple[str, ...] = ()  # the same, once k×k convolutions are asked for
    native: str = ""  # prefix of native keys
    level: str = ""  # a leading path level that files have and the model may lack
    part: str = ""  # the part's name in keys, where it is not the position among the text encoders


# the same in Black Forest Labs' model, which joins q, k, v (and the MLP's first layer in single blocks)
BFL_TARGETS = (
    "img_attn.qkv",
    "img_attn.proj",
    "txt_attn.qkv",
    "txt_attn.proj",
    "img_mlp.0",
    "img_mlp.2",
    "txt_mlp.0",
    "txt_mlp.2",
    "linear1",
)

HOSTS = (
    Host(("FluxTransformer2DModel",), FLUX_TARGETS, native="transformer."),
    Host(("Flux", "Chroma"), BFL_TARGETS),  # kohya's
    Host(
        ("CLIPTextModel", "CLIPTextModelWithProjection"),
        CLIP_TARGETS,
        native="text_encoder.",
        level="text_model.",
    ),
    Host(("T5EncoderModel",), part="te3"),  # kohya's name; never adapted unless targets are named
    Host(("DummyCLIPL",)),  # stands where Chroma has no CLIP
    # diffusers' and kohya's own classes, of one name or nearly, with blocks of the same names; an Infer… is
    # what kohya's gen_img puts in front of its own
    Host(
        (
            "UNet2DConditionModel",
            "SdxlUNet2DConditionModel",
            "InferUNet2DConditionModel",
            "InferSdxlUNet2DConditionModel",
        ),
        blocks=("Transformer2DModel",),
        convolutional=("ResnetBlock2D", "Downsample2D", "Upsample2D"),
    ),
)


# What LyCORIS' presets, SimpleTuner's documents, kohya's and Black Forest Labs' code call a block, and the
# classes that are meant where a model has none of that name.
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "Attention": (
        *("FluxAttention", "Flux2Attention", "Flux2ParallelSelfAttention"),
        *("CrossAttention", "SelfAttention"),  # kohya's U-Nets and FLUX
    ),
    "FeedForward": ("Flux2FeedForward",),
    "CrossAttention": ("Attention",),
    "SelfAttention": ("FluxAttention",),
    "DoubleStreamBlock": ("FluxTransformerBlock", "Flux2TransformerBlock"),
    "SingleStreamBlock": ("FluxSingleTransformerBlock", "Flux2SingleTransformerBlock"),
}
_CONTAINERS = ("ModuleList", "ModuleDict", "Sequential")


class Target(NamedTuple):
    """A layer to adapt and its names."""

    part: str  # "unet", "te", "te1", …
    name: str  # key inside the network: lora_unet_transformer_blocks_0_attn_to_q
    native: str  # module in native files: transformer.transformer_blocks.0.attn.to_q; "" = same as `name`
    module: Layer
    path: str = ""  # of the layer in its model
    inside: tuple[str, ...] = ()  # classes around it, from its own outwards, and their synonyms

    @property
    def spellings(self) -> set[str]:
        """Every name that a file of some dialect gives this layer, as `keys.flat` spells it."""
        # transformers 5 has no level text_model
        paths = {path.replace(".", "_") for path in (self.path, self.path.removeprefix("text_model."))}
        told = [f"lora_{self.part}_{path}" for path in paths]
        other = [path for path, piece in flux_names.modules(self.path) if piece.total == 1]
        other += [piece.module] if (piece := flux_names.joined_rows(self.path)) and piece.total == 1 else []
        # FLUX's other dialect, where the layer is one there too and has its rows in the same order
        told += [path for path in other if flux_names.SWAPPED not in (path, self.path)]
        return {keys.flat(one) for one in (self.name, self.native or self.name, *told)}


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


def as_passed(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> Any:
    """The text encoders in the form that kohya's trainers hand them to a network module: of SD 1 and 2 the
    encoder itself, else a list."""
    if len(text_encoders) == 1 and _row(denoiser).blocks and not _takes_sizes(denoiser):
        return text_encoders[0]
    return list(text_encoders)


def find_all(
    text_encoder: Any,
    unet: nn.Module | None,
    *,
    target: str | None = None,
    modules: Sequence[str] = (),
    names: Sequence[str] = (),
    exclude: str | None = None,
    conv: bool = False,
) -> list[Target]:
    """The layers to adapt of a whole model, text encoders first, named as its own trainers name them.

    `text_encoder` is one encoder, or a list with None for those left alone; `unet` None leaves the denoiser
    alone. The patterns and classes are for the denoiser. One encoder of a U-Net is `te`, several are `te1`,
    `te2`; FLUX's are always numbered, and their native keys are diffusers' paths. Where the denoiser is None,
    a bare encoder is SD's, and a list with a projecting encoder SDXL's.
    """
    several = isinstance(text_encoder, (list, tuple))
    encoders = list(text_encoder) if several else [text_encoder]
    if unet is None:
        kinds = {type(encoder).__name__ for encoder in encoders}
        kohya = not several or "CLIPTextModelWithProjection" in kinds
    else:
        kohya = bool(_row(unet).classes) and not _row(unet).native
    chosen = []
    for index, encoder in enumerate(encoders):
        if encoder is not None:
            part = "te" if kohya and len(encoders) == 1 else f"te{index + 1}"
            found = find(part, encoder)
            chosen += [one._replace(native="") for one in found] if kohya else found
    if unet is not None:
        chosen += find("unet", unet, target=target, modules=modules, names=names, exclude=exclude, conv=conv)
    return chosen


def find(
    part: str,
    root: nn.Module,
    *,
    target: str | None = None,
    modules: Sequence[str] = (),
    names: Sequence[str] = (),
    exclude: str | None = None,
    conv: bool = False,
) -> list[Target]:
    """The Linear and Conv2d layers of `root` to adapt, in the model's order.

    `target`, `names` and `exclude` are regular expressions searched in dotted paths; `modules` are classes of
    blocks, or synonyms of them, all of whose layers are meant. What any of `target`, `modules` and `names`
    says is a target; without them the model's row in HOSTS decides, with `conv` also for its convolutional
    blocks. Raises `Refused` for an unknown model without targets, and for each pattern or class that matches
    nothing.
    """
    row, told = _row(root), target is not None or bool(modules or names)
    if not row.classes and not told:
        known = ", ".join(name for host in HOSTS for name in host.classes)
        raise Refused(
            f"{type(root).__name__} has no default targets (known: {known}); name the layers with "
            "--network_args target=REGEX"
        )
    if not told and not (row.targets or row.blocks):
        return []
    layers = {
        path: module for path, module in root.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    inside = _inside(root, layers)
    if not told and row.blocks:
        blocks = {*row.blocks, *(row.convolutional if conv else ())}
        chosen = {path for path, kinds in inside.items() if blocks & set(kinds)}
        if not chosen:
            raise Refused(f"this {type(root).__name__} has no layer in {', '.join(sorted(blocks))}")
    else:
        patterns = [*names] if told else [ends_with(row.targets)]
        patterns += [] if target is None else [target]
        chosen = _of_classes(root, modules, inside) | _of_patterns(root, patterns, layers)
    if exclude:
        unwanted = _compiled("exclude", exclude)
        kept = {path for path in chosen if not unwanted.search(path)}
        if len(kept) in (0, len(chosen)):
            what = "every target layer" if not kept else "no target layer"
            raise Refused(
                f"exclude {exclude!r} matches {what} of {type(root).__name__}; targets are named like "
                f"{', '.join([path for path in layers if path in chosen][:3])}"
            )
        chosen = kept
    renamed = _takes_sizes(root) and hasattr(root, "down_blocks")  # kohya's own class has the names
    original = unet_names.Blocks.of(root) if renamed else None
    return [
        _named(part, row, path, module, original)._replace(inside=inside[path])
        for path, module in layers.items()
        if path in chosen
    ]


def _of_patterns(root: nn.Module, patterns: Sequence[str], layers: Mapping[str, Layer]) -> set[str]:
    chosen = set()
    for pattern in patterns:
        wanted = _compiled("target", pattern)
        found = {path for path in layers if wanted.search(path)}
        if not found:
            hint = nearest(pattern, layers) or f"; its layers are named like {', '.join(list(layers)[:3])}"
            raise Refused(f"no layer of {type(root).__name__} matches target {pattern!r}{hint}")
        chosen |= found
    return chosen


def _of_classes(root: nn.Module, modules: Sequence[str], inside: Mapping[str, tuple[str, ...]]) -> set[str]:
    chosen = set()
    for word in modules:
        found = {path for path, kinds in inside.items() if word in kinds}
        if not found:
            known = dict.fromkeys(kind for kinds in inside.values() for kind in kinds)
            raise Refused(
                f"{type(root).__name__} has no layer in a {word}{nearest(word, known)}; its blocks with "
                f"layers are {', '.join(known)}"
            )
        chosen |= found
    return chosen


def _inside(root: nn.Module, layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """By layer the classes around it, its own first and the root's last, each followed by its synonyms."""
    kinds = {path: type(module).__name__ for path, module in root.named_modules()}
    synonyms = {word: own for word, own in SYNONYMS.items() if word not in kinds.values()}
    words = {kind: (kind, *(w for w, own in synonyms.items() if kind in own)) for kind in {*kinds.values()}}
    found = {}
    for layer in layers:
        parts = layer.split(".")
        around = [kinds[".".join(parts[:end])] for end in range(len(parts), -1, -1)]
        found[layer] = tuple(
            dict.fromkeys(word for kind in around if kind not in _CONTAINERS for word in words[kind])
        )
    return found


def _row(root: nn.Module) -> Host:
    return next((row for row in HOSTS if type(root).__name__ in row.classes), Host(()))


def _takes_sizes(unet: nn.Module) -> bool:
    """Whether a U-Net has SDXL's added conditions, in diffusers' class or in kohya's."""
    return getattr(unet, "add_embedding", None) is not None or hasattr(unet, "label_emb")


def _named(part: str, row: Host, path: str, module: Layer, original: unet_names.Blocks | None) -> Target:
    path = path if path.startswith(row.level) else row.level + path
    part = row.part or part
    told = (
        unet_names.unet_name(path, original) if original else path
    )  # kohya's SDXL keys have the original names
    name = ("lora_unet_" if part == "unet" else f"lora_{part}_") + told.replace(".", "_")
    native = row.native
    if native.startswith("text_encoder") and part == "te2":
        native = "text_encoder_2."
    return Target(part, name, native and native + path, module, path)


def host_shape(host: Layer) -> tuple[int, int]:
    """(O, I·k·k) of a host, also where its weight is packed."""
    if isinstance(host, nn.Conv2d):
        return host.out_channels, host.in_channels // host.groups * math.prod(host.kernel_size)
    return host.out_features, host.in_features


def dense_weight(host: Layer) -> Tensor:
    """The host's weight as O × I·k·k, read now, if possible without a copy; quantised ones are unpacked."""
    weight = host.weight.detach()
    kind = type(host.weight).__name__
    if kind in ("Params4bit", "Int8Params"):
        packed: Any = host  # bitsandbytes' layers and weights have attributes of their own
        if kind == "Params4bit":
            from bitsandbytes.functional import dequantize_4bit  # only a quantised base needs it

            weight = dequantize_4bit(weight.data, packed.weight.quant_state)
        else:
            scale = packed.state.SCB if packed.weight.SCB is None else packed.weight.SCB  # moved by a forward
            weight = weight.float() * scale.float()[:, None] / 127
    elif weight.dtype.itemsize == 1:  # float8 storage has no arithmetic
        weight = weight.float()
    return weight.reshape(weight.shape[0], -1)
