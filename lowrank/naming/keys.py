"""Names of tensors in files: one role, one suffix per dialect (owners: kohya sd-scripts, PEFT, QR-LoRA).

`known_module` rewrites module names of other programs to those that `places` reads:

OneTrainer        double_blocks.0.img_attn.qkv.1, single_blocks.0.linear1.3, img_in.proj
XLabs             double_blocks.0.processor.qkv_lora1, single_blocks.0.processor.proj_lora
diffusers, fused  transformer_blocks.0.attn.to_qkv, .to_added_qkv; attn2.to_kv of a U-Net
ComfyUI           clip_l.transformer.…, text_encoders.clip_g.transformer.…, t5xxl.transformer.…
"""

from __future__ import annotations

import re
from collections.abc import Callable

# role -> suffix inside the network (kohya's spelling) and in native diffusers-path files (PEFT's spelling)
KOHYA = {
    "down": "lora_down.weight",
    "up": "lora_up.weight",
    "magnitude": "dora_scale",
    "alpha": "alpha",
    "q": "lora.q.weight",
    "base_r": "lora.base_r.weight",
    "delta_r": "lora.delta_r.weight",
    "q_layer": "q_layer.weight",  # T-LoRA's names in LyCORIS; its lambda_layer and base_* have no suffix
    "p_layer": "p_layer.weight",
    **{role: role for role in ("lambda_layer", "base_q", "base_p", "base_lambda")},
    "base_up": "base_up.weight",  # the start that PiSSA subtracts
    "base_down": "base_down.weight",
    **{role: role for role in ("vera_A", "vera_B", "vera_lambda_d", "vera_lambda_b")},  # as in PEFT
}
PEFT = {**KOHYA, "down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
# `down` and `up` where a method subtracts its initial copy: other programs would add U·D without subtracting
SUBTRACTED = {"down": "trained_down.weight", "up": "trained_up.weight"}
MIDDLE = "mid"  # LyCORIS' third factor of a convolution
ROUTER = "router"  # of experts
LORA, DORA = "lora", "dora"  # the methods of a plain pair of factors, without and with a magnitude
QR_BASIS = ("q", "base_r")  # Q and R of W: a ΔR layer's basis, a QR-LoRA layer's start
# The method of a layer with this role, if the file does not name its method; the first match applies
METHOD_OF = {
    "delta_r": "delta_r",
    **dict.fromkeys(("q_layer", "p_layer", "lambda_layer", "base_q", "base_p", "base_lambda"), "tlora"),
    **dict.fromkeys(("q", "base_r"), "qrlora"),
    **dict.fromkeys(("base_up", "base_down"), "pissa"),
    **dict.fromkeys(("vera_lambda_d", "vera_lambda_b"), "vera"),
}
IMPORTED = ("lora", "dora", "delta_r", "delta_r_triu", "qrlora")  # methods of imported files
# What QR-LoRA's analysis calls the matrices of a file
MATRICES = {"Q": "q", "deltaR": "delta_r", "baseR": "base_r", "A": "down", "B": "up"}
OLD_UP = "lora.up.weight"  # official QR-LoRA, and diffusers before PEFT
_READ = {suffix: role for table in (KOHYA, PEFT, SUBTRACTED) for role, suffix in table.items()} | {
    "lora.down.weight": "down",
    OLD_UP: "up",
    "lora_linear_layer.down.weight": "down",  # diffusers before PEFT, in text encoders
    "lora_linear_layer.up.weight": "up",
    ROUTER: ROUTER,
    "lora_mid.weight": MIDDLE,  # LyCORIS' use_tucker: the k×k convolution between two 1×1
    "lora_magnitude_vector.weight": "magnitude",
    # alpha beside a factor: converters, and diffusers' network_alphas saved as tensors
    **dict.fromkeys(("lora_A.alpha", "lora_B.alpha", "lora_down.alpha", "lora_up.alpha"), "alpha"),
    **dict.fromkeys(("lora.alpha", "lora_alpha", "network_alpha"), "alpha"),
    "base_q.weight": "base_q",  # the T-LoRA authors' files
    "base_p.weight": "base_p",
}
_SUFFIX = re.compile(
    r"^(.*?)\.(" + "|".join(re.escape(s) for s in sorted(_READ, key=len, reverse=True)) + ")$"
)
_PREFIX = re.compile(r"^(?:transformer|unet|diffusion_model)\.")
_FLAT = re.compile(r"^(?:lora_(unet|transformer|te(\d?))|lycoris)_(.*)$")
# PEFT's name of an adapter inside a key: lora_A.default.weight, lora_magnitude_vector.style
_NAMED = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.(?!weight$|bias$|alpha$)\w+(\.weight)?$")
# diffusers before 0.21: attn1.processor.to_out_lora.down.weight, self_attn.to_q_lora.up.weight
_PROCESSOR = re.compile(
    r"^(.*?)(?:\.processor)?\.(to_[qkv]|to_out)_lora\.(?:(down|up)\.weight|(?:down\.weight\.)?(alpha))$"
)
# XLabs: double_blocks.0.processor.qkv_lora1.down.weight; `spellings` reads the module
_XLABS = re.compile(r"^(.*\.processor\.(?:qkv|proj)_lora[12]?)\.(?:(down|up)\.weight|(alpha))$")
_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_TEXT = re.compile(r"^text_encoder(_\d)?\.")
# the T-LoRA authors: attn1.processor.to_q_lora.q_layer.weight, attn.processor.to_q_proj_lora.up.weight
_AUTHORS = re.compile(r"\.processor\.to_(?:(out)|([qkv])|([qkv]_proj))_lora\.(?:((?:down|up)\.weight)|(.*))$")
# QR-LoRA's official files repeat the child's name: attn.to_out.0.to_out.0
_REPEATED = re.compile(r"\.(to_out\.0)\.\1$")


def _without_processor(match: re.Match) -> str:
    out, plain, added, pair, suffix = match.groups()
    layer = "to_out.0" if out else f"to_{plain}" if plain else f"add_{added}"
    return f".{layer}.lora.{pair}" if pair else f".{layer}.{suffix}"


def role_of(key: str) -> tuple[str, str] | None:
    """Return (module, role) of a key in any dialect, or None if it is not one; `module` keeps its prefix."""
    if old := _PROCESSOR.match(key):
        part = _CLIP[old[2]] if old[1].endswith("self_attn") else old[2].replace("to_out", "to_out.0")
        return f"{old[1]}.{part}", old[3] or old[4]
    if xlabs := _XLABS.match(key):
        return xlabs[1], xlabs[2] or xlabs[3]
    key = _NAMED.sub(lambda match: f".{match[1]}{match[2] or ''}", key)
    match = _SUFFIX.match(_AUTHORS.sub(_without_processor, key))
    return (_REPEATED.sub(r".\1", match[1]), _READ[match[2]]) if match else None


def module_path(module: str) -> str:
    """Return a module without the prefix of its model: `transformer.a.b` → `a.b`; kohya's names stay."""
    return _PREFIX.sub("", known_module(module))


def is_text_encoder(module: str) -> bool:
    """Return whether a file's module name belongs to a text encoder."""
    return module.startswith("lora_te") or bool(_TEXT.match(known_module(module)))


def flat(module: str) -> str:
    """Return the spelling that all dialects share: `a_b_0` for `transformer.a.b.0` and `lora_unet_a_b_0`.

    Text encoders keep a mark (`te1|…`), because two models may have equal paths.
    """
    module = known_module(module)
    text = _TEXT.match(module)
    if text:
        number = (text[1] or "_1")[1:]
        return f"te{number}|" + module[text.end() :].replace(".", "_")
    kohya = _FLAT.match(module)
    if kohya and (kohya[1] or "").startswith("te"):
        return f"te{kohya[2] or 1}|" + kohya[3]
    return kohya[3] if kohya else module_path(module).replace(".", "_")


def is_flat_text(name: str) -> bool:
    """Return whether a name from `flat` belongs to a text encoder."""
    return bool(re.match(r"te\d\|", name))


# ---------- module names of other programs

# Wrappers that programs leave in front of a model's paths: PEFT, torch.compile, DistributedDataParallel
_WRAPPERS = r"(?:base_model\.model\.|_orig_mod\.|module\.)*"
_ENCODERS = {
    r"clip_l\.(?:transformer\.)?": "text_encoder.",
    r"clip_g\.(?:transformer\.)?": "text_encoder_2.",
    r"t5(?:xxl)?\.(?:transformer\.)?": "text_encoder_2.",
    r"cond_stage_model\.transformer\.": "text_encoder.",
    r"conditioner\.embedders\.0\.transformer\.": "text_encoder.",
    r"lora_te1?\.": "text_encoder.",
    r"lora_te2\.": "text_encoder_2.",
}
_PREFIXES = [
    (re.compile(rf"^{_WRAPPERS}(?:text_encoders\.)?{pattern}"), prefix)
    for pattern, prefix in _ENCODERS.items()
] + [
    (re.compile(rf"^{_WRAPPERS}(text_encoder(?:_\d)?\.)(?:base_model\.model\.)?"), r"\1"),
    (re.compile(rf"^{_WRAPPERS}(?:model\.diffusion_model|lora_unet|lora_transformer)\."), ""),
    (
        re.compile(rf"^{_WRAPPERS}(?:(transformer|unet|diffusion_model)\.)?(?:base_model\.model\.)?"),
        lambda match: f"{match[1]}." if match[1] else "",
    ),
]
_STREAMS = {"1": "img", "2": "txt"}  # of XLabs
_SPLIT = {
    "img": ("to_q", "to_k", "to_v"),
    "txt": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "single": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
}


def _double_split(match: re.Match) -> str:
    return f"transformer_blocks.{match[1]}.attn.{_SPLIT[match[2]][int(match[3])]}"


def _single_split(match: re.Match) -> str:
    return f"single_transformer_blocks.{match[1]}.{_SPLIT['single'][int(match[2])]}"


def _xlabs(match: re.Match) -> str:
    side, number, part, stream = match.groups()
    if side == "double":
        return f"double_blocks.{number}.{_STREAMS[stream or '1']}_attn.{part}"
    if part == "proj":
        return f"single_blocks.{number}.linear2"
    return f"single_transformer_blocks.{number}.attn.to_qkv"


def _fused_double(match: re.Match) -> str:
    return f"double_blocks.{match[1]}.{'txt' if match[2] else 'img'}_attn.qkv"


# The end of a module's name, with dots or (kohya's, OneTrainer's older files) underscores, after a prefix
_START = r"^(?:(?:transformer|unet|diffusion_model)\.|lora_(?:unet|transformer)_|lycoris_)?"
_RULES: tuple[tuple[re.Pattern, Callable[[re.Match], str]], ...] = (
    (re.compile(_START + r"double_blocks[._](\d+)[._](img|txt)_attn[._]qkv[._]([012])$"), _double_split),
    (re.compile(_START + r"single_blocks[._](\d+)[._]linear1[._]([0123])$"), _single_split),
    (re.compile(_START + r"img_in[._]proj$"), lambda _: "img_in"),
    (re.compile(_START + r"(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12]?)$"), _xlabs),
    (re.compile(_START + r"transformer_blocks[._](\d+)[._]attn[._]to_(added_)?qkv$"), _fused_double),
)
# Layers that diffusers joins (`fuse_qkv_projections`), in equal shares of their rows: joined -> the parts
_FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}
_FUSED_END = re.compile(r"^(.*[._]attn\d?[._])(to_qkv|to_kv)$")


def known_module(module: str) -> str:
    """Return a module's name of any known program in the words that `places` and `keys.flat` read."""
    for pattern, prefix in _PREFIXES:
        if match := pattern.match(module):
            module = (prefix(match) if callable(prefix) else match.expand(prefix)) + module[match.end() :]
            break
    for pattern, rewrite in _RULES:
        if match := pattern.match(module):
            return rewrite(match)
    return module


def fused_parts(module: str) -> list[str]:
    """Return the layers that a layer of `fuse_qkv_projections` joins, in the order of their rows, or []."""
    match = _FUSED_END.match(module)
    return [match[1] + part for part in _FUSED[match[2]]] if match else []
