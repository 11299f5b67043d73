"""The layers to adapt: default targets per kind of model, and the names of each layer.

A row of `HOSTS` names a root class, its default targets (by the end of their paths, or by the class of the
block around them) and the prefix of native file keys (empty: native keys are kohya's). FLUX targets are the
twelve of QR-LoRA's official code: on FLUX.1-dev 342 layers, 228 in double and 114 in single blocks. U-Net
targets are those of kohya's networks.lora: 192 layers on SD 1.5 and 722 on SDXL, with convolutions 278 and
788.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, cast

from torch import Tensor, nn

from lowrank.errors import Refused, nearest
from lowrank.naming import flux as flux_names
from lowrank.naming import keys
from lowrank.naming import unet as unet_names

FLUX_TARGETS = (
    *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0"),
    *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)
# FLUX targets in Black Forest Labs' model, which joins q, k, v (in single blocks also the MLP's first layer)
BFL_TARGETS = (
    *("img_attn.qkv", "img_attn.proj", "txt_attn.qkv", "txt_attn.proj"),
    *("img_mlp.0", "img_mlp.2", "txt_mlp.0", "txt_mlp.2", "linear1"),
)
CLIP_TARGETS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    *("mlp.fc1", "mlp.fc2"),
)


Layer: TypeAlias = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Host:
    """Default targets and key names of one kind of root model."""

    classes: tuple[str, ...]
    targets: tuple[str, ...] = ()  # path suffixes
    blocks: tuple[str, ...] = ()  # block classes whose layers are all targets
    convolutional: tuple[str, ...] = ()  # further block classes if k×k convolutions are adapted
    native: str = ""  # prefix of native keys
    level: str = ""  # leading path level that files have, but not every version of the model
    part: str = ""  # component name in keys, if not from the position among the text encoders


HOSTS = (
    Host(("FluxTransformer2DModel",), FLUX_TARGETS, native="transformer."),
    Host(("Flux", "Chroma"), BFL_TARGETS),  # kohya's
    Host(
        ("CLIPTextModel", "CLIPTextModelWithProjection"),
        CLIP_TARGETS,
        native="text_encoder.",
        level="text_model.",
    ),
    Host(("T5EncoderModel",), part="te3"),  # kohya's name; adapted only with explicit targets
    Host(("DummyCLIPL",)),  # placeholder, because Chroma has no CLIP
    # Classes of diffusers and kohya, whose blocks have equal names. kohya's gen_img wraps its U-Nets in an
    # Infer… class.
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


# Block names in LyCORIS' presets, SimpleTuner's documents, kohya's and Black Forest Labs' code, and the
# diffusers classes that they stand for if a model has no class of that name.
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
    """A layer to adapt, with its names in the model and in files."""

    part: str  # "unet", "te", "te1", …
    name: str  # key inside the network: lora_unet_transformer_blocks_0_attn_to_q
    native: str  # name in native files: transformer.transformer_blocks.0.attn.to_q; "" if equal to `name`
    module: Layer
    path: str = ""  # dotted path in the model
    # the layer's class and the classes around it, innermost first, with synonyms
    inside: tuple[str, ...] = ()
    flux: bool = True  # False where no file has Black Forest Labs' names: text encoders and U-Nets

    @property
    def spellings(self) -> set[str]:
        """All names of this layer in files of any dialect, in the spelling of `keys.flat`."""
        # paths of transformers 5 lack the level text_model
        paths = {path.replace(".", "_") for path in (self.path, self.path.removeprefix("text_model."))}
        names = [f"lora_{self.part}_{path}" for path in paths]
        if self.flux:
            other = [path for path, piece in flux_names.modules(self.path) if piece.total == 1]
            piece = flux_names.joined_rows(self.path)
            other += [piece.module] if piece and piece.total == 1 else []
            # the other dialect of FLUX, unless it joins this layer with others or swaps its rows
            names += [path for path in other if flux_names.SWAPPED not in (path, self.path)]
        return {keys.flat(name) for name in (self.name, self.native or self.name, *names)}


def ends_with(names: Iterable[str]) -> str:
    """Return a pattern for paths that end in one of the names at a dot: `to_q` does not match `into_q`."""
    return r"(?:^|\.)(?:" + "|".join(re.escape(name) for name in names) + r")$"


def _compiled(option: str, pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise Refused(
            f"{option} is not a regular expression: {pattern!r} ({error}); escape dots as \\."
        ) from error


def as_passed(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> Any:
    """Return the text encoders as kohya's trainers pass them to a network module.

    That is the encoder itself for SD 1 and 2, else a list.
    """
    if len(text_encoders) == 1 and _row(denoiser).blocks and not _takes_sizes(denoiser):
        return text_encoders[0]
    return list(text_encoders)


def is_clip(model: nn.Module) -> bool:
    """Return whether a model is a CLIP, whose paths in files begin with a level `text_model`."""
    return bool(_row(model).level)


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
    """Find the layers to adapt of a whole model, text encoders first.

    `text_encoder` is one encoder, or a list with None for encoders that are not adapted; with `unet` None the
    denoiser is not adapted. Patterns and classes apply to the denoiser. A single encoder of a U-Net is named
    `te`, several `te1`, `te2`; FLUX's are always numbered, and have native keys with diffusers' paths. If the
    denoiser is None, a single encoder is taken for SD's, a list with a projecting encoder for SDXL's.
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
            targets = find(part, encoder)
            chosen += [target._replace(native="") for target in targets] if kohya else targets
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
    """Find the Linear and Conv2d layers of `root` to adapt, in the model's order.

    `target`, `names` and `exclude` are regular expressions searched in dotted paths; `modules` are block
    classes or synonyms, whose layers are all chosen. A layer is a target if any of `target`, `modules` and
    `names` matches it; without these the model's row in HOSTS applies, with `conv` including its
    convolutional blocks. Raises `Refused` for an unknown model without targets, and for a pattern or class
    that matches nothing.
    """
    row, explicit = _row(root), target is not None or bool(modules or names)
    if not row.classes and not explicit:
        known = ", ".join(name for host in HOSTS for name in host.classes)
        raise Refused(
            f"{type(root).__name__} has no default targets (known: {known}); name the layers with "
            "--network_args target=REGEX"
        )
    if not explicit and not (row.targets or row.blocks):
        return []
    layers = {
        path: module for path, module in root.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    inside = _inside(root, layers)
    if not explicit and row.blocks:
        blocks = {*row.blocks, *(row.convolutional if conv else ())}
        chosen = {path for path, kinds in inside.items() if blocks & set(kinds)}
        if not chosen:
            raise Refused(f"this {type(root).__name__} has no layer in {', '.join(sorted(blocks))}")
    else:
        patterns = [*names] if explicit else [ends_with(row.targets)]
        patterns += [] if target is None else [target]
        chosen = _of_classes(root, modules, inside) | _of_patterns(root, patterns, layers)
    if exclude:
        unwanted = _compiled("exclude", exclude)
        remaining = {path for path in chosen if not unwanted.search(path)}
        if len(remaining) in (0, len(chosen)):
            extent = "every target layer" if not remaining else "no target layer"
            raise Refused(
                f"exclude {exclude!r} matches {extent} of {type(root).__name__}; targets are named like "
                f"{', '.join([path for path in layers if path in chosen][:3])}"
            )
        chosen = remaining
    # diffusers' SDXL; kohya's class has the original names already
    renamed = _takes_sizes(root) and hasattr(root, "down_blocks")
    original = unet_names.Blocks.of(root) if renamed else None
    return [
        _named(part, row, path, module, original)._replace(inside=inside[path])
        for path, module in layers.items()
        if path in chosen
    ]


def _of_patterns(root: nn.Module, patterns: Sequence[str], layers: Mapping[str, Layer]) -> set[str]:
    chosen = set()
    for pattern in patterns:
        compiled = _compiled("target", pattern)
        matches = {path for path in layers if compiled.search(path)}
        if not matches:
            hint = nearest(pattern, layers) or f"; its layers are named like {', '.join(list(layers)[:3])}"
            raise Refused(f"no layer of {type(root).__name__} matches target {pattern!r}{hint}")
        chosen |= matches
    return chosen


def _of_classes(root: nn.Module, modules: Sequence[str], inside: Mapping[str, tuple[str, ...]]) -> set[str]:
    chosen = set()
    for word in modules:
        matches = {path for path, kinds in inside.items() if word in kinds}
        if not matches:
            known = dict.fromkeys(kind for kinds in inside.values() for kind in kinds)
            raise Refused(
                f"{type(root).__name__} has no layer in a block {word}{nearest(word, known)}; classes with "
                f"layers are {', '.join(known)}"
            )
        chosen |= matches
    return chosen


def _inside(root: nn.Module, layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return for each layer its class and the classes around it, root last, each with its synonyms."""
    kinds = {path: type(module).__name__ for path, module in root.named_modules()}
    synonyms = {word: classes for word, classes in SYNONYMS.items() if word not in kinds.values()}
    words = {
        kind: (kind, *(w for w, classes in synonyms.items() if kind in classes)) for kind in {*kinds.values()}
    }
    inside = {}
    for layer in layers:
        parts = layer.split(".")
        around = [kinds[".".join(parts[:end])] for end in range(len(parts), -1, -1)]
        inside[layer] = tuple(
            dict.fromkeys(word for kind in around if kind not in _CONTAINERS for word in words[kind])
        )
    return inside


def _row(root: nn.Module) -> Host:
    return next((row for row in HOSTS if type(root).__name__ in row.classes), Host(()))


def _takes_sizes(unet: nn.Module) -> bool:
    """Return whether a U-Net takes SDXL's image sizes as conditions, in diffusers' or kohya's class."""
    return getattr(unet, "add_embedding", None) is not None or hasattr(unet, "label_emb")


def _named(part: str, row: Host, path: str, module: Layer, original: unet_names.Blocks | None) -> Target:
    path = path if path.startswith(row.level) else row.level + path
    part = row.part or part
    key_path = unet_names.unet_name(path, original) if original else path  # kohya's SDXL keys: original names
    name = ("lora_unet_" if part == "unet" else f"lora_{part}_") + key_path.replace(".", "_")
    native = row.native
    if native.startswith("text_encoder") and part == "te2":
        native = "text_encoder_2."
    flux = part == "unet" and not row.blocks
    return Target(part, name, native and native + path, module, path, flux=flux)


def host_shape(host: Layer) -> tuple[int, int]:
    """Return (O, I·k·k) of a host, also if its weight is quantised and packed."""
    if isinstance(host, nn.Conv2d):
        return host.out_channels, host.in_channels // host.groups * math.prod(host.kernel_size)
    return host.out_features, host.in_features


def original_weight(host: Layer) -> Tensor:
    """Return the host's weight as (O, I·k·k) from before it was stored, where a frozen host can read it."""
    read = getattr(host, "original", None)
    return dense_weight(host) if read is None else read().flatten(1)


def stored_weight(host: Layer) -> Tensor:
    """Return the tensor that holds the host's weight, which may be packed: for its device and its values."""
    stored = getattr(host, "stored", None)
    return host.weight if stored is None else stored


def dense_weight(host: Layer) -> Tensor:
    """Return the host's weight as (O, I·k·k), dequantised if needed, without a copy if possible."""
    weight = host.weight.detach()
    kind, packed = type(host.weight).__name__, cast(Any, host)  # attributes of bitsandbytes' classes
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit  # imported only for a quantised base

        weight = dequantize_4bit(weight.data, packed.weight.quant_state)
    elif kind == "Int8Params":
        scale = packed.state.SCB if packed.weight.SCB is None else packed.weight.SCB  # a forward moves it
        weight = weight.float() * scale.float()[:, None] / 127
    elif weight.dtype.itemsize == 1:  # float8 has no arithmetic
        weight = weight.float()
    return weight.reshape(weight.shape[0], -1)
