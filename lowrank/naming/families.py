"""Which family a file's layers belong to: every layer is held against the layers that the family's model has.

The lists are those of the published models (tests compare them with the models' configurations): SD 1.x and
2.x, SDXL, FLUX.1. Layers that no family has are of another model, which is named by the words it uses.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from lowrank.errors import Refused
from lowrank.naming import flux as flux_names
from lowrank.naming.other_models import ONLY, looks_like, refuse_other_model
from lowrank.naming.places import FAMILIES, LayerPath, part_and_path, places

PER_BLOCK = (2, 1, 3, 4)  # layers_per_block of U-Nets, in the order in which they are tried
_DOUBLE, _SINGLE = 19, 38  # blocks of FLUX.1
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FLUX = re.compile(
    r"^(single_)?transformer_blocks\.\d|^(time_text_embed|context_embedder|x_embedder|norm_out)\b"
)
_UNET = re.compile(r"^(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b")
_ORIGINAL = ("input_blocks", "middle_block", "output_blocks")


class Model(NamedTuple):
    """The family of a model, and the number of layers in a block of its U-Net (`layers_per_block`)."""

    family: str
    per_block: int = 2


# ---------- the layers of a family


@functools.cache
def layers_of(family: str, per_block: int = 2) -> frozenset[LayerPath]:
    """Return the layers that have a weight in a family's model: denoiser and text encoders."""
    if family == "flux":
        texts = {"te1": _clip(12), "te3": _t5(24)}
        denoiser = _flux()
    elif family == "sdxl":
        texts = {"te1": _clip(12), "te2": [*_clip(32), "text_projection"]}
        denoiser = _unet(per_block, (None, 2, 10), shortcuts=(1, 2), added=True)
    else:  # CLIP-L of SD 1.x has 12 layers, the encoder of SD 2.x 23
        texts = {"te1": _clip(23)}
        denoiser = _unet(per_block, (1, 1, 1, None), shortcuts=(1, 2), added=False)
    parts = {"unet": denoiser, **texts}
    return frozenset(LayerPath(part, path) for part, paths in parts.items() for path in paths)


def _unet(
    per_block: int, depths: Sequence[int | None], shortcuts: Collection[int], added: bool
) -> Iterator[str]:
    """A U-Net with `depths` transformer blocks in each attention of a level, None where it has none."""
    yield from ("conv_in", "conv_norm_out", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    yield from ("add_embedding.linear_1", "add_embedding.linear_2") if added else ()
    last = len(depths) - 1
    for level, depth in enumerate(depths):
        down, up = f"down_blocks.{level}", f"up_blocks.{last - level}"
        for j in range(per_block + 1):
            if j < per_block:
                yield from _resnet(f"{down}.resnets.{j}", j == 0 and level in shortcuts)
                yield from _attention(f"{down}.attentions.{j}", depth)
            yield from _resnet(f"{up}.resnets.{j}", True)
            yield from _attention(f"{up}.attentions.{j}", depth)
        if level < last:
            yield f"{down}.downsamplers.0.conv"
        if level:
            yield f"{up}.upsamplers.0.conv"
    for j in range(2):
        yield from _resnet(f"mid_block.resnets.{j}", False)
    yield from _attention("mid_block.attentions.0", depths[-1] or 1)


def _resnet(path: str, shortcut: bool) -> Iterator[str]:
    for name in ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", *["conv_shortcut"] * shortcut):
        yield f"{path}.{name}"


def _attention(path: str, depth: int | None) -> Iterator[str]:
    inside = [f"{a}.{name}" for a in ("attn1", "attn2") for name in _ATTENTION]
    inside += ["ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"]
    yield from [f"{path}.{name}" for name in ("norm", "proj_in", "proj_out")] if depth else ()
    yield from (f"{path}.transformer_blocks.{i}.{name}" for i in range(depth or 0) for name in inside)


def _flux() -> Iterator[str]:
    yield from (*flux_names.TOP, "norm_out.linear")
    joined = [path for parts in flux_names.JOINED.values() for path, _ in parts]
    double = [*flux_names.DOUBLE, *(path for path in joined if path != "proj_mlp")]
    single = [*flux_names.SINGLE, *(path for path, _ in flux_names.JOINED["linear1"])]
    yield from (f"transformer_blocks.{i}.{name}" for i in range(_DOUBLE) for name in double)
    yield from (f"single_transformer_blocks.{i}.{name}" for i in range(_SINGLE) for name in single)


def _clip(layers: int) -> Iterator[str]:
    yield from (f"text_model.embeddings.{name}_embedding" for name in ("token", "position"))
    yield "text_model.final_layer_norm"
    names = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    names += ["mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"]
    yield from (f"text_model.encoder.layers.{i}.{name}" for i in range(layers) for name in names)


def _t5(blocks: int) -> Iterator[str]:
    yield from ("shared", "encoder.embed_tokens", "encoder.final_layer_norm")
    yield "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    names = [f"layer.0.SelfAttention.{name}" for name in "qkvo"] + [
        "layer.0.layer_norm",
        "layer.1.layer_norm",
    ]
    names += [f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")]
    yield from (f"encoder.block.{i}.{name}" for i in range(blocks) for name in names)


# ---------- the family of a file


def model_of(
    modules: Collection[str],
    metadata: Mapping[str, str],
    source: str = "the file",
    family: str | None = None,
    layers: Collection[LayerPath] = (),
    sizes: Mapping[str, tuple[int, int]] | None = None,
) -> Model:
    """Return the model that an adapter's modules belong to.

    `family` is the user's choice and `layers` are those of the base model, where there is one. `sizes` are
    the outputs and inputs of modules, which distinguish models that use the same names. Raises `Refused` for
    a layer that the model does not have, naming the model that it looks like, and where the modules fit
    several families.
    """
    sizes = sizes or {}
    if layers:
        per_block, known = per_block_of_model(layers), family_of_paths(layers)
        _check_layers(modules, layers, per_block, source)
        if family not in (None, known):
            raise Refused(f"--family is {family}, and the base model is of {known}; leave --family out")
        return Model(known, per_block)
    recorded = _recorded(metadata)
    counts = (recorded,) if recorded else PER_BLOCK
    names = (family,) if family else FAMILIES
    fits = {
        name: count
        for name in names
        for count in reversed(counts)  # so that the first count is the one that stays
        if all(place in layers_of(name, count) for module in modules for place, _ in places(module, count))
    }
    named = _model_in(metadata)
    if "flux" in fits or (named and _named_family(named) is None):
        refuse_other_model(sizes, named, source)
    if not fits:
        _refuse_layers(modules, source, family)
    chosen = family or _choose(modules, _named_family(named), list(fits), source, sizes)
    count = fits[chosen]
    if count == 2 and not recorded and chosen != "flux":
        count = per_block_of({place.path for module in modules for place, _ in places(module)})
    return Model(chosen, count)


def layers_per_block(
    modules: Collection[str], metadata: Mapping[str, str], sizes: Mapping[str, tuple[int, int]] | None = None
) -> int:
    """Return the `layers_per_block` of the model that an adapter's modules belong to.

    It is 2, as in SD and SDXL, where the file shows no other number, and for models that are not known here.
    """
    try:
        return model_of(modules, metadata, sizes=sizes).per_block
    except Refused:
        return _recorded(metadata) or 2


def _recorded(metadata: Mapping[str, str]) -> int | None:
    recorded = metadata.get("lowrank.layers_per_block", "")
    return int(recorded) if recorded in ("1", "2", "3", "4") else None


def per_block_of_model(layers: Iterable[LayerPath]) -> int:
    """Return the `layers_per_block` of a whole U-Net; 2 for a model without one."""
    first = re.compile(r"down_blocks\.0\.resnets\.(\d+)\.")
    numbers = {int(match[1]) for place in layers if (match := first.match(place.path))}
    return max(numbers, default=1) + 1


def per_block_of(paths: Collection[str]) -> int:
    """Return a U-Net's `layers_per_block` from diffusers' paths: 2 unless all of its attentions say another.

    A down block has that many attentions, an up block one more. A file of some blocks does not show it.
    """
    counts: dict[tuple[str, str], set[int]] = {}
    for path in paths:
        if match := re.match(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.", path):
            counts.setdefault((match[1], match[2]), set()).add(int(match[3]))
    sides = [{len(seen) for (side, _), seen in counts.items() if side == which} for which in ("down", "up")]
    whole = all(seen == set(range(len(seen))) for seen in counts.values())
    if not whole or len(counts) < 4 or len(sides[0]) != 1 or sides[1] != {next(iter(sides[0])) + 1}:
        return 2
    return sides[0].pop()


def _choose(
    modules: Collection[str],
    named: str | None,
    fits: Sequence[str],
    source: str,
    sizes: Mapping[str, tuple[int, int]],
) -> str:
    """The family among those that have all layers: the one `named` in metadata, or by names and sizes."""
    if named is not None and named in fits:
        return named
    fits = [family for family in fits if _fits_context(family, modules, sizes)] or list(fits)
    if len(fits) == 1:
        return fits[0]
    paths = [part_and_path(module)[1] for module in modules]
    if any(module.startswith("lora_te_") for module in modules) and "sd15" in fits:
        return "sd15"
    if any(path.startswith(_ORIGINAL) for path in paths) and "sdxl" in fits:
        return "sdxl"
    if any(module.startswith("lora_unet_") for module in modules) and "sd15" in fits:
        return "sd15"  # kohya gives SDXL's layers original names
    raise Refused(
        f"the layers of {source} fit {' and '.join(fits)}, and its metadata name neither; give --family "
        f"{' or --family '.join(fits)}"
    )


_NAMED = {  # words of metadata; the first match applies
    "flux": r"flux",
    "sdxl": r"xl",
    "sd15": r"\bsd_?v?[12]|stable-diffusion-v?[12]|\bv[12]\b",
}


def _model_in(metadata: Mapping[str, str]) -> str:
    """The model that kohya's and Stability's metadata name, as text in small letters."""
    names = ("ss_base_model_version", "modelspec.architecture")
    return " ".join(metadata.get(name, "") for name in names).lower().strip()


def _named_family(named: str) -> str | None:
    return next((family for family, words in _NAMED.items() if re.search(words, named)), None)


_CONTEXT = re.compile(r"attn2[._]to_[kv]$")
_CONTEXTS = {"sd15": (768, 1024), "sdxl": (2048,), "flux": ()}


def _fits_context(family: str, modules: Iterable[str], sizes: Mapping[str, tuple[int, int]]) -> bool:
    """Whether cross-attention takes the text of this family's published model; True where it is unknown."""
    known = {width for values in _CONTEXTS.values() for width in values}
    seen = {sizes[module][1] for module in modules if _CONTEXT.search(module) and module in sizes}
    return not seen & known or seen <= set(_CONTEXTS[family])


def family_of_paths(layers: Iterable[LayerPath]) -> str:
    """The family of a model of other depths than the published one, by the words of its paths."""
    paths = {place.path for place in layers if place.part == "unet"}
    if any(map(_FLUX.match, paths)):
        return "flux"
    added = any(path.startswith("add_embedding") for path in paths)
    return "sdxl" if added or any(place.part == "te2" for place in layers) else "sd15"


# ---------- refusals


def _check_layers(
    modules: Iterable[str],
    layers: Collection[LayerPath],
    per_block: int,
    source: str,
) -> None:
    """Raise `Refused` where a module is no layer of the model."""
    modules = list(modules)
    known = set(layers)
    foreign = [m for m in modules if not all(place in known for place, _ in places(m, per_block))]
    if not foreign:
        return
    parts = {place.part for place in known}
    text = [module for module in foreign if places(module, per_block)[0][0].part not in parts]
    if text and len(text) == len(foreign) and "unet" in parts:
        raise Refused(
            f"{source} has {len(text)} layers of text encoders, for example {text[0]}, and the base model "
            "has no such encoder; leave them out with --parts unet, or give a base that has text encoders"
        )
    looks = looks_like(foreign)
    hint = f", which looks like {looks}" if looks else ""
    raise Refused(
        f"{len(foreign)} of {len(modules)} layers of {source} are not in the base model, for example "
        f"{foreign[0]}{hint}; the adapter is for another base"
    )


def _refuse_layers(modules: Collection[str], source: str, family: str | None) -> None:
    """Raise `Refused` for modules of which no family, or not the given one, has all."""

    def strangers(name: str) -> list[str]:
        counts = [
            [m for m in modules if not all(place in layers_of(name, n) for place, _ in places(m, n))]
            for n in (PER_BLOCK if name != "flux" else (2,))
        ]
        return min(counts, key=len)

    unknown = {name: strangers(name) for name in FAMILIES}
    paths = [place.path for module in modules for place, _ in places(module) if place.part == "unet"]
    flux, unet = (next((path for path in paths if kind.match(path)), None) for kind in (_FLUX, _UNET))
    if flux and unet:
        raise Refused(
            f"{source} holds layers of two models at once, {flux} of FLUX and {unet} of a U-Net; use a "
            "file of one model"
        )
    if family and (others := [name for name in FAMILIES if name != family and not unknown[name]]):
        raise Refused(
            f"{source} has {unknown[family][0]}, which is not in {family}; leave --family out, or give "
            f"--family {others[0]}"
        )
    nearest = family or min(FAMILIES, key=lambda name: len(unknown[name]))
    foreign = unknown[nearest]
    looks = looks_like(foreign)
    hint = f"they look like {looks}; " if looks else ""
    if len(foreign) == len(modules):
        raise Refused(
            f"{source} has no layer of SD, SDXL or FLUX: its layers are named like "
            f"{', '.join(foreign[:3])}; {hint}{ONLY}"
        )
    raise Refused(
        f"{len(foreign)} of {len(modules)} layers of {source} are in no model of {nearest}, for example "
        f"{foreign[0]}; {hint}give the model that has them with --model"
    )
