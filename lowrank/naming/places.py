"""Layer paths: the component and dotted path of an adapter's layer, and its name in each program's files.

A layer path has the words of diffusers and transformers: `unet`, `down_blocks.1.attentions.0.proj_in`. Other
programs replace dots by underscores (kohya, LyCORIS), number the blocks of a U-Net (original names, in SDXL's
keys) or join several layers (FLUX). Underscored names can be converted back, because all words that contain
an underscore are listed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lowrank.errors import Refused
from lowrank.naming import flux as flux_names
from lowrank.naming import keys
from lowrank.naming import unet as unet_names

FAMILIES = ("sd15", "sdxl", "flux")  # sd15 includes SD 2.x, whose names are equal
# Words in paths that contain an underscore, in FLUX, U-Nets, original U-Nets, BFL, CLIP and T5.
_WORDS = """
transformer_blocks single_transformer_blocks time_text_embed timestep_embedder text_embedder guidance_embedder
linear_1 linear_2 context_embedder x_embedder proj_out proj_in proj_mlp norm_out norm1_context norm2_context
to_q to_k to_v to_out to_add_out add_q_proj add_k_proj add_v_proj norm_q norm_k norm_added_q norm_added_k
ff_context down_blocks mid_block up_blocks time_emb_proj conv_shortcut conv_in conv_out conv_norm_out
time_embedding add_embedding input_blocks middle_block output_blocks in_layers out_layers emb_layers
skip_connection time_embed label_emb double_blocks single_blocks img_attn txt_attn img_mlp txt_mlp img_mod
txt_mod img_in txt_in time_in vector_in guidance_in in_layer out_layer final_layer adaLN_modulation text_model
self_attn q_proj k_proj v_proj out_proj text_projection token_embedding position_embedding wi_0 wi_1
layer_norm layer_norm1 layer_norm2 final_layer_norm
"""
_WORD = re.compile(r"(?:^|_)(" + "|".join(sorted(_WORDS.split(), key=len, reverse=True)) + r"|[^_]+)(?=_|$)")
_TEXT = re.compile(r"^(?:base_model\.model\.)?text_encoder(?:_(\d))?\.")
_FLAT_TEXT = re.compile(r"^lora_te(\d?)_")
_FLAT = re.compile(r"^(?:lora_(?:unet|transformer)|lycoris)_")
_COMFY = {"clip_l": "te1", "clip_g": "te2", "t5xxl": "te3"}
_COMFY_TEXT = re.compile(r"^text_encoders\.(clip_l|clip_g|t5xxl)\.transformer\.")
_FLUX = re.compile(
    r"^(single_)?transformer_blocks\.\d|^(time_text_embed|context_embedder|x_embedder|norm_out)\b"
)
_UNET = re.compile(r"^(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b")
_SDXL_ALONE = re.compile(r"\btransformer_blocks\.[1-9]|^add_embedding")
_SD_ALONE = re.compile(r"^(down|up)_blocks\.3\b|^down_blocks\.0\.attentions\b|^up_blocks\.2\.attentions\b")
COMPONENTS = {"te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_2"}


class LayerPath(NamedTuple):
    """The component and path of a layer in its model."""

    part: str  # component: "unet" (the denoiser, also of FLUX), "te1", "te2", "te3" (FLUX's T5)
    path: str  # dotted path as in diffusers or transformers


def dotted(name: str) -> str:
    """Return `transformer_blocks_0_attn_to_out_0` as `transformer_blocks.0.attn.to_out.0`."""
    return ".".join(_WORD.findall(name))


def part_and_path(module: str) -> tuple[str, str]:
    """Split a module name of any dialect into component and dotted path, the path in the file's own words."""
    if match := _FLAT_TEXT.match(module):
        return f"te{match[1] or 1}", dotted(module[match.end() :])
    if match := _TEXT.match(module):
        return f"te{match[1] or 1}", module[match.end() :]
    if match := _COMFY_TEXT.match(module):
        return _COMFY[match[1]], module[match.end() :]
    if match := _FLAT.match(module):
        return "unet", dotted(module[match.end() :])
    return "unet", keys.module_path(module)


def places(module: str) -> list[tuple[LayerPath, flux_names.Piece | None]]:
    """Return the layer paths of a module in a file: one, or several for a joined layer of FLUX.

    The second item is the rows of the joined layer, or None if the module is a single layer.
    """
    part, path = part_and_path(module)
    if part == "unet" and (pieces := flux_names.modules(path)):
        return [(LayerPath(part, ours), piece if piece.total > 1 else None) for ours, piece in pieces]
    if part == "unet":
        path = unet_names.diffusers_name(path)
        if path.startswith("text_model."):  # a PEFT file of a text encoder
            part = "te1"
    elif path.startswith("encoder.block."):
        part = "te3"  # T5; LyCORIS numbers it as the second encoder
    elif part != "te3" and not path.startswith(("text_model.", "text_projection")):
        path = f"text_model.{path}"  # paths of transformers 5 lack this level
    return [(LayerPath(part, path), None)]


def adapter_family(modules: Iterable[str], metadata: Mapping[str, str], source: str = "the file") -> str:
    """Return the family of the model that an adapter belongs to: "sd15", "sdxl" or "flux".

    Raises `Refused` if the modules are of two families or of none, or if names and metadata leave it open.
    """
    modules = list(modules)
    layers = [place for module in modules for place, _ in places(module)]
    parts = {place.part for place in layers}
    denoiser = [place.path for place in layers if place.part == "unet"]
    flux = next((path for path in denoiser if _FLUX.match(path)), None)
    unet = next((path for path in denoiser if _UNET.match(path)), None)
    if flux and unet:
        raise Refused(
            f"{source} holds layers of two models at once, {flux} of FLUX and {unet} of a U-Net; use a "
            "file of one model"
        )
    unknown = [path for path in denoiser if path != "proj_out"]
    if unknown and not flux and not unet:
        raise Refused(
            f"{source} has no layer of SD, SDXL or FLUX: its layers are named like {', '.join(unknown[:3])}; "
            "only adapters of these models can be converted"
        )
    named = (
        f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}".lower()
    )
    if flux or ("flux" in named and not unet) or "te3" in parts:
        return "flux"
    original = ("input_blocks", "middle_block", "output_blocks")
    if "te2" in parts or any(map(_SDXL_ALONE.search, denoiser)):
        return "sdxl"
    if any(map(_SD_ALONE.match, denoiser)) or any(m.startswith("lora_te_") for m in modules):
        return "sd15"
    if "xl" in named or any(part_and_path(module)[1].startswith(original) for module in modules):
        return "sdxl"
    if named.strip() or any(m.startswith("lora_unet_") for m in modules):
        return "sd15"
    if not unet:
        return "flux"  # a text encoder with dotted names: a native file of FLUX
    raise Refused(
        f"{source} fits both SD 1.x and SDXL, and its metadata name neither; give --base sd15 or --base sdxl"
    )


def check_family(modules: Iterable[str], family: str, source: str) -> None:
    """Raise `Refused` if an adapter has a layer that no model of `family` has."""
    other = {
        "flux": (_UNET,),
        "sdxl": (_FLUX, _SD_ALONE),
        "sd15": (_FLUX, _SDXL_ALONE),
    }[family]
    for module in modules:
        for place, _ in places(module):
            if place.part == "unet" and any(pattern.search(place.path) for pattern in other):
                raise Refused(f"{source} has {place.path}, which is not in {family}; leave --base out")


def kohya_layer(place: LayerPath, family: str) -> str:
    """Return kohya's name of a layer, `lora_unet_input_blocks_4_1_proj_in`; in FLUX of the joined layer."""
    if place.part != "unet":
        number = "" if family == "sd15" else place.part[2:]
        return f"lora_te{number}_" + place.path.replace(".", "_")
    path = place.path
    if family == "flux":
        joined = flux_names.joined_rows(path)
        if joined is None:
            raise Refused(
                f"{path} has no name in Black Forest Labs' FLUX, which kohya's and ComfyUI's files are "
                "named by; export to diffusers instead"
            )
        path = joined.module
    elif family == "sdxl":
        path = unet_names.unet_name(path, unet_names.SDXL)
    return "lora_unet_" + path.replace(".", "_")


def native_layer(place: LayerPath, family: str) -> tuple[str, Mapping[str, str]]:
    """Return a layer's name in lowrank's own files, and the table of key suffixes by role."""
    if family != "flux" or place.part == "te3":
        return kohya_layer(place, family), keys.KOHYA
    return diffusers_layer(place, family), keys.PEFT


def diffusers_layer(place: LayerPath, family: str) -> str:
    """Return diffusers' name of a layer: `unet.down_blocks.1.attentions.0.proj_in`."""
    return f"{component_name(place.part, family)}.{place.path}"


def component_name(part: str, family: str) -> str:
    """Return the folder of a component in a diffusers model."""
    if part == "unet":
        return "transformer" if family == "flux" else "unet"
    return COMPONENTS[part]


def lycoris_layer(place: LayerPath) -> str:
    """Return LyCORIS' name of a layer of a denoiser: `lycoris_down_blocks_1_attentions_0_proj_in`."""
    return "lycoris_" + place.path.replace(".", "_")
