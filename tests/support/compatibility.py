"""Tables of exports and imports: test_export.py tests every cell, make_compatibility.py prints them."""

from __future__ import annotations

FAMILIES = {"sd15": "SD 1.x, 2.x", "sdxl": "SDXL", "flux": "FLUX"}
METHODS = {  # method -> what its exports are
    "lora": "LoRA of rank r",
    "dora": "LoRA of rank r with lengths",
    "lalora": "LoRA of rank r",
    "delta_r": "LoRA of rank r: [Q], [ΔR]",
    "delta_r_triu": "LoRA of rank r: [Q], [ΔR]",
    "qrlora": "LoRA of rank 2r: [Q | Q − Q₀], [R − R₀ ; R₀]",
    "tlora": "LoRA of rank 2r in pairs, all ranks open, or one timestep (`--at-timestep`)",
    "null_lora": "LoRA of rank r, frozen halves inside",
    "universal_lora": "LoRA of the basis' rank, the core in the up",
    "effilora": "with num_experts=1 LoRA of rank r; several experts: below",
    "network_null_lalora_plus": "as null_lora; with use_dora LoRA with lengths",
}
# method of several experts -> what its exports by calibration are; in tests/unit/formats/test_nearest_lora.py
ROUTED = {
    "effilora": "LoRA of rank r",
    "network_null_lalora_plus_Effi_ABM": "LoRA of rank r, frozen halves inside; with use_dora with lengths",
}
READERS = {  # format -> who reads it back in the tests, when installed
    "kohya": "lycoris.kohya",
    "diffusers": "diffusers",
    "peft": "PEFT",
    "lycoris": "LyCORIS",
    "qrlora": "our own reader",
}
BASIS = ("delta_r", "delta_r_triu", "qrlora")


def refusal(family: str, method: str, to: str) -> str | None:
    """A word of the sentence that refuses an export; None where it is exact."""
    if to == "qrlora" and (family != "flux" or method not in BASIS):
        return "official"
    return None


# dialect that is read -> how its files look, what becomes of them
IMPORTS = {
    "kohya": ("`lora_unet_….lora_down.weight`, FLUX's joined layers split", "exact"),
    "diffusers": ("`unet.…`, `transformer.…lora_A.weight`, and names from before PEFT", "exact"),
    "PEFT": ("a folder with `adapter_config.json`: alpha patterns, rsLoRA", "exact"),
    "LyCORIS": ("`lycoris_….lora_up.weight`, DoRA on outputs, `lora_mid` of convolutions", "exact"),
    "ComfyUI": ("`diffusion_model.…` with original names, `text_encoders.clip_l.…`", "exact"),
    "official QR-LoRA, ΔR": ("`….lora.q.weight`, `….lora.delta_r.weight`", "exact"),
    "official QR-LoRA, QR": ("`….lora.up.weight`; its start comes from `--model`", "to the basis' 1e-4"),
    "LyCORIS T-LoRA": ("`….lambda_layer`; its start comes from `--model`", "exact at every timestep"),
    "official T-LoRA": ("`….processor.to_q_lora.…`; `--tlora_min_rank`", "exact at every timestep"),
    "any LoRA as ΔR": ("`--method delta_r --model BASE`: Qᵀ·ΔW", "the lost share is printed"),
    "LoHa, LoKr, OFT, GLoRA, IA3, full": (
        "no low-rank factors; merged and live they are exact",
        "as the nearest LoRA: `tools/export_lora.py --rank` first",
    ),
    "DoRA with a length for each input": ("LyCORIS' wd_on_output=False", "refused"),
}
