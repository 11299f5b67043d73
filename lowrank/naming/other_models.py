"""Models whose adapters are not read: recognised by names and sizes of layers, and by metadata."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from lowrank.errors import Refused
from lowrank.naming.places import part_and_path

_DOUBLE, _SINGLE = 19, 38  # blocks of FLUX.1
# Words of other models' layers with underscores for dots. The first that occurs in a file names the model.
_OTHERS = {
    "FLUX.2": r"to_qkv_mlp_proj|ff(_context)?_linear_(in|out)|(double|single)_stream_modulation"
    r"|time_guidance_embed",
    "Qwen-Image": r"transformer_blocks_\d+_(img|txt)_(mlp|mod)_",
    "HunyuanVideo": r"(img|txt)_(mlp_fc\d|mod_linear)|single_blocks_\d+_modulation_linear|token_refiner",
    "Chroma": r"distilled_guidance_layer",
    "SD3": r"joint_blocks_\d+|transformer_blocks_\d+_attn2_(add|to_add)|^pos_embed_proj|(x|context)_block_",
    "HiDream": r"(double|single)_stream_blocks_\d+",
    "AuraFlow": r"joint_transformer_blocks_\d+",
    "Wan": r"^blocks_\d+_((self|cross)_attn_(q|k|v|o|k_img|v_img)$|ffn_|attn[12]_)",
    "Cosmos": r"^(net_)?blocks_\d+_(self_attn|cross_attn)_\w+_proj$",
    "LTX-Video, PixArt, Sana or CogVideoX": r"^transformer_blocks_\d+_attn[12]_|^adaln_single|patchify_proj",
    "Lumina or Z-Image": r"^(layers|noise_refiner|context_refiner)_\d+_(attention|feed_forward|adaLN)",
    "AnimateDiff": r"motion_modules",
    "Stable Cascade": r"prior_unet|clip_txt_(pooled_)?mapper",
    "a language model": r"^(model_)?layers_\d+_(self_attn|mlp)_",
}
_OTHERS_NAMED = {  # words of metadata
    "SD3": r"stable-diffusion-3|\bsd3",
    "FLUX.2": r"flux[-_. ]?2",
    "Qwen-Image": r"qwen",
    "HunyuanVideo": r"hunyuan",
    "Wan": r"\bwan",
    "LTX-Video": r"\bltx",
    "Chroma": r"chroma",
    "Lumina or Z-Image": r"lumina|z-?image",
}
# Inputs of attention layers of models that have FLUX's names
_WIDTHS = {1536: "SD3 Medium", 2432: "SD3.5 Large"}
_FLUX_ATTENTION = re.compile(r"^transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj)$")
_FLUX2_RATIOS = {r"^single_blocks\.\d+\.linear1$": 9, r"^double_blocks\.\d+\.(img|txt)_mlp\.0$": 6}
ONLY = "only adapters of SD 1.x, SD 2.x, SDXL and FLUX.1 are read here"


def refuse_other_model(sizes: Mapping[str, tuple[int, int]], named: str, source: str) -> None:
    """Raise `Refused` for layers with FLUX's names and other sizes, and where `named` is another model.

    `named` are the words of the metadata on the model.
    """
    if other := next((model for model, words in _OTHERS_NAMED.items() if re.search(words, named)), None):
        raise Refused(f"{source} is an adapter of {other}, as its metadata say ({named}); {ONLY}")
    for module, (outs, ins) in sizes.items():
        path = part_and_path(module)[1]
        other = _WIDTHS.get(ins) if _FLUX_ATTENTION.match(path) else None
        if any(outs == ratio * ins and re.match(end, path) for end, ratio in _FLUX2_RATIOS.items()):
            other = "FLUX.2"
        if other:
            raise Refused(
                f"{module} in {source} has {ins} inputs and {outs} outputs, as in {other} and not in FLUX.1; "
                f"{ONLY}"
            )


def looks_like(modules: Iterable[str]) -> str | None:
    """Return the name of the model whose layers have such names, or None if no known model has them."""
    modules = list(modules)
    names = [part_and_path(module)[1].replace(".", "_") for module in modules]
    for model, pattern in _OTHERS.items():
        if any(re.search(pattern, name) for name in names):
            return model
    numbers: Counter[str] = Counter()
    for name in names:
        if match := re.match(r"(single_transformer|transformer|double|single)_blocks_(\d+)_", name):
            numbers[match[1]] = max(numbers[match[1]], int(match[2]) + 1)
    if numbers["single"] > 40 or numbers["single_transformer"] > 40:
        return "FLUX.2"
    if numbers["double"] > _DOUBLE or numbers["single"] > _SINGLE or numbers["single_transformer"] > _SINGLE:
        return "HunyuanVideo"
    if numbers["transformer"] > _DOUBLE:
        return "Qwen-Image" if numbers["transformer"] > _SINGLE else "SD3"
    return None
