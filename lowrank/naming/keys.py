"""Names of tensors in files: one role, one suffix per dialect (owners: kohya sd-scripts, PEFT, QR-LoRA)."""

from __future__ import annotations

import re

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
}
IMPORTED = ("lora", "dora", "delta_r", "delta_r_triu", "qrlora")  # methods of imported files
# What QR-LoRA's analysis calls the matrices of a file
MATRICES = {"Q": "q", "deltaR": "delta_r", "baseR": "base_r", "A": "down", "B": "up"}
OLD_UP = "lora.up.weight"  # official QR-LoRA, and diffusers before PEFT
_READ = {suffix: role for table in (KOHYA, PEFT, SUBTRACTED) for role, suffix in table.items()} | {
    "lora.down.weight": "down",
    OLD_UP: "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "lora_linear_layer.down.weight": "down",  # diffusers before PEFT, in text encoders
    "lora_linear_layer.up.weight": "up",
    ROUTER: ROUTER,
    "lora_mid.weight": MIDDLE,  # LyCORIS' use_tucker: the k×k convolution between two 1×1
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector.default": "magnitude",
    "lora_magnitude_vector.default.weight": "magnitude",
    "base_q.weight": "base_q",  # the T-LoRA authors' files
    "base_p.weight": "base_p",
}
_SUFFIX = re.compile(
    r"^(.*)\.(" + "|".join(re.escape(s) for s in sorted(_READ, key=len, reverse=True)) + ")$"
)
# files of PEFT have only its prefix in front of the paths of the model
_PREFIX = re.compile(r"^(?:base_model\.model\.)?(?:(?:transformer|unet|diffusion_model)\.)?")
_FLAT = re.compile(r"^(?:lora_(unet|transformer|te(\d?))|lycoris)_(.*)$")
# diffusers before 0.21: attn1.processor.to_out_lora.down.weight, self_attn.to_q_lora.up.weight
_PROCESSOR = re.compile(r"^(.*?)(?:\.processor)?\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")
_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_TEXT = re.compile(r"^(base_model\.model\.)?text_encoder(_\d)?\.")
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
        return f"{old[1]}.{part}", old[3]
    match = _SUFFIX.match(_AUTHORS.sub(_without_processor, key))
    return (_REPEATED.sub(r".\1", match[1]), _READ[match[2]]) if match else None


def module_path(module: str) -> str:
    """Return a module without the prefix of its model: `transformer.a.b` → `a.b`; kohya's names stay."""
    return _PREFIX.sub("", module)


def is_text_encoder(module: str) -> bool:
    """Return whether a file's module name belongs to a text encoder."""
    return bool(_TEXT.match(module)) or module.startswith("lora_te")


def flat(module: str) -> str:
    """Return the spelling that all dialects share: `a_b_0` for `transformer.a.b.0` and `lora_unet_a_b_0`.

    Text encoders keep a mark (`te1|…`), because two models may have equal paths.
    """
    text = _TEXT.match(module)
    if text:
        number = (text[2] or "_1")[1:]
        return f"te{number}|" + module[text.end() :].replace(".", "_")
    kohya = _FLAT.match(module)
    if kohya and (kohya[1] or "").startswith("te"):
        return f"te{kohya[2] or 1}|" + kohya[3]
    return kohya[3] if kohya else module_path(module).replace(".", "_")


def is_flat_text(name: str) -> bool:
    """Return whether a name from `flat` belongs to a text encoder."""
    return bool(re.match(r"te\d\|", name))
