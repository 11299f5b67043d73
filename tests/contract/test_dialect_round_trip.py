"""Random adapters from kohya's names to another program's and back, by the two commands, keep every ΔW."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowrank.cli import export, importing

LAYERS = {  # name in kohya's files: outputs, inputs, kernel
    "sd15": {
        "lora_te_text_model_encoder_layers_3_mlp_fc1": (12, 6, ()),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (6, 6, ()),
        "lora_unet_down_blocks_0_attentions_0_proj_in": (8, 8, (1, 1)),
        "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_k": (8, 8, ()),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj": (20, 10, ()),
        "lora_unet_up_blocks_1_resnets_2_conv1": (6, 9, (3, 3)),
    },
    "sdxl": {
        "lora_te1_text_model_encoder_layers_1_mlp_fc2": (6, 12, ()),
        "lora_te2_text_model_encoder_layers_30_self_attn_out_proj": (7, 7, ()),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v": (8, 12, ()),
        "lora_unet_middle_block_1_proj_in": (8, 8, ()),
        "lora_unet_output_blocks_2_1_transformer_blocks_9_attn1_to_out_0": (9, 9, ()),
    },
    "flux": {
        "lora_te1_text_model_encoder_layers_0_self_attn_v_proj": (6, 6, ()),
        "lora_unet_double_blocks_0_img_attn_qkv": (18, 6, ()),
        "lora_unet_double_blocks_18_txt_mlp_2": (6, 24, ()),
        "lora_unet_single_blocks_5_linear1": (42, 6, ()),
        "lora_unet_single_blocks_37_linear2": (6, 30, ()),
    },
}


@st.composite
def adapters(draw, family: str) -> dict[str, torch.Tensor]:
    """A file of some of the family's layers, each with its own rank, alpha and values."""
    state = {}
    names = st.lists(st.sampled_from(sorted(LAYERS[family])), unique=True)
    lengths = family != "flux" and draw(
        st.booleans(), label="DoRA"
    )  # joined layers need the base for lengths
    denoiser = [name for name in sorted(LAYERS[family]) if "_unet_" in name]  # text encoders name no family
    first = draw(st.sampled_from(denoiser), label="first layer")
    for name in dict.fromkeys([first, *draw(names, label="further layers")]):
        (outs, ins, kernel), rank = LAYERS[family][name], draw(st.integers(1, 5), label="rank")
        values = torch.Generator().manual_seed(draw(st.integers(0, 99), label="seed"))
        ones = (1,) * len(kernel)
        state[f"{name}.lora_down.weight"] = torch.randn(rank, ins, *kernel, generator=values)
        state[f"{name}.lora_up.weight"] = torch.randn(outs, rank, *ones, generator=values)
        state[f"{name}.alpha"] = torch.tensor(
            draw(st.sampled_from([0.5, 1.0, 3.0, float(rank)]), label="alpha")
        )
        if lengths:
            state[f"{name}.dora_scale"] = torch.rand(outs, 1, *ones, generator=values) + 0.5
    return state


def updates(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ΔW of every layer, and its lengths under `NAME.dora_scale`."""
    found = {key: value.flatten() for key, value in state.items() if key.endswith(".dora_scale")}
    for key, up in state.items():
        name, _, role = key.partition(".")
        if role == "lora_up.weight":
            down = state[f"{name}.lora_down.weight"].double().flatten(1)
            scale = float(state[f"{name}.alpha"]) / len(down)
            found[name] = scale * up.double().flatten(1) @ down
    return found


@pytest.mark.slow
@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("family", LAYERS)
@given(data=st.data())
def test_dialect_round_trip_keeps_delta_weight(family, to, tmp_path_factory, data):
    before = data.draw(adapters(family), label="adapter")
    folder = tmp_path_factory.mktemp("round")
    given_, native, there, again, back = (
        folder / f"{name}.safetensors" for name in ("given", "native", "there", "again", "back")
    )
    if to == "peft":
        there = folder / "there"
    base = [] if family == "flux" else ["--base", family]  # SD 1.5 and SDXL share names of layers
    save_file(before, given_)
    assert importing.main([str(given_), str(native), *base]) == 0
    assert export.main([str(native), str(there), "--to", to, "--verify", "off"]) == 0
    assert importing.main([str(there), str(again), *base]) == 0
    assert export.main([str(again), str(back), "--to", "kohya", "--verify", "off"]) == 0
    want, found = updates(before), updates(load_file(back))
    assert found.keys() == want.keys()
    for name, value in want.items():
        # in fp32, a scale is multiplied into a factor once: a few of its roundings of 6e-8
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6 * float(value.abs().max()))
