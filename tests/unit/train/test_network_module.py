"""Network modules: found by name, and foreign ones made to train the model's blocks."""

from __future__ import annotations

import types

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel

from lowrank.errors import Refused
from lowrank.models.family import Source
from lowrank.models.flux import FLUX
from lowrank.train import network_module


@pytest.fixture
def denoiser(tiny_flux):
    return FLUX.load(Source(str(tiny_flux), dtype=torch.float32), ("denoiser",)).denoiser


def create(found, denoiser, **arguments):
    return network_module.create(
        found,
        denoiser,
        (),
        rank=4,
        alpha=None,
        dropout=None,
        arguments=arguments,
        weights=None,
        dim_from_weights=False,
    )


@pytest.mark.parametrize("name", ["../x", ".lora", "", "networks..lora", "networks/lora.py"])
def test_what_is_no_module_name_is_refused(name):
    with pytest.raises(Refused, match="is not the dotted name of a module"):
        network_module.find_module(name)


@pytest.mark.parametrize("preset", ["full", "attn-mlp"])
def test_lycoris_adapts_and_trains_every_layer_of_the_blocks(denoiser, preset):
    pytest.importorskip("lycoris")
    names = {type(part).__name__ for part in denoiser.modules()}
    blocks = [*denoiser.transformer_blocks, *denoiser.single_transformer_blocks]
    linears = sum(isinstance(part, nn.Linear) for block in blocks for part in block.modules())
    network = create(network_module.find_module("lycoris.kohya"), denoiser, preset=preset)
    assert len(network.unet_loras) == linears > 0
    assert {type(part).__name__ for part in denoiser.modules()} == names  # the names are given back

    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    facts = denoiser.config
    text = {
        "t5": torch.randn(1, 8, facts.joint_attention_dim),
        "pooled": torch.randn(1, facts.pooled_projection_dim),
    }
    noisy = torch.randn(1, facts.in_channels // 4, 4, 4)
    FLUX.denoise(denoiser, noisy, torch.tensor([500.0]), text).square().mean().backward()
    optimizer.step()
    moved = sum(bool(layer.lora_up.weight.any()) for layer in network.unet_loras)
    assert moved >= linears - 4  # the last block's text side has no effect on the picture


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"algo": "foo"}, "--network_args algo=foo (KeyError: 'foo')"),
        ({"preset": "nope"}, "--network_args preset=nope (AssertionError: assert preset is not None)"),
        ({"conv_dim": "abc"}, "(ValueError: invalid literal for int() with base 10: 'abc')"),
        ({"preset": "ia3", "algo": "ia3"}, "adapts no layer in the blocks of FluxTransformer2DModel"),
    ],
)
def test_lycoris_errors_are_refusals(denoiser, arguments, said):
    pytest.importorskip("lycoris")
    with pytest.raises(Refused) as caught:
        create(network_module.find_module("lycoris.kohya"), denoiser, **arguments)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert "DoubleStreamBlock" not in {type(part).__name__ for part in denoiser.modules()}


def test_a_network_outside_the_blocks_is_refused(denoiser):
    class Elsewhere(nn.Module):
        def apply_to(self, text_encoders, unet, *_):
            forward = unet.proj_out.forward
            unet.proj_out.forward = lambda x: forward(x)

    found = types.SimpleNamespace(__name__="elsewhere", create_network=lambda *_, **__: Elsewhere())
    with pytest.raises(Refused, match="elsewhere adapts no layer in the blocks"):
        create(found, denoiser)


def test_text_encoder_layers_of_lycoris_have_the_names_of_files(tiny_sd, tmp_path, caplog):
    """transformers 5 has no level `text_model`; ComfyUI and kohya know no lora_te_encoder_…"""
    pytest.importorskip("lycoris")
    unet = UNet2DConditionModel.from_pretrained(tiny_sd / "unet")
    encoder = CLIPTextModel.from_pretrained(tiny_sd / "text_encoder")
    name, rank = "lora_te_text_model_encoder_layers_0_self_attn_q_proj", 4
    width = encoder.config.hidden_size
    down, up = torch.randn(rank, width), torch.randn(width, rank)
    state = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(4.0),
    }
    state["lora_te_text_model_encoder_layers_99_mlp_fc1.lora_up.weight"] = torch.ones(2, 2)
    save_file(state, tmp_path / "given.safetensors")
    network = network_module.create(
        network_module.find_module("lycoris.kohya"), unet, [encoder], rank=rank, alpha=4.0, dropout=None,
        arguments={"algo": "lora", "preset": "attn-mlp"}, weights=str(tmp_path / "given.safetensors"),
        dim_from_weights=False,
    )  # fmt: skip
    saved = network.state_dict()
    names = {key.partition(".")[0] for key in saved if key.startswith("lora_te")}
    assert names and all(name.startswith("lora_te_text_model_encoder_layers_") for name in names)
    assert torch.equal(saved[f"{name}.lora_up.weight"], up) and torch.equal(
        saved[f"{name}.lora_down.weight"], down
    )
    (report,) = [r.getMessage() for r in caplog.records if "given.safetensors" in r.getMessage()]
    assert "3 of 4 tensors are used; left out: layer without an adapter here × 1, for example" in report
    assert "layers_99" in report
    ids = torch.tensor([[1, 5, 9, 2]])
    adapted = encoder(ids).last_hidden_state
    for layer in network.loras:
        layer.restore()
    assert not torch.allclose(adapted, encoder(ids).last_hidden_state)
