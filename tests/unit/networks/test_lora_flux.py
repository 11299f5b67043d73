"""networks.lora_flux: kohya's layers, arguments and file, on diffusers' FLUX."""

from __future__ import annotations

import importlib
import logging
import re

import pytest
import torch
from diffusers import FluxTransformer2DModel
from files import FLUX, FLUX_DEV
from flux_adapters import flux  # noqa: F401 (fixture)
from safetensors.torch import load_file, save_file
from toys import shake
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from lowrank.errors import Refused
from lowrank.naming import flux as flux_names
from lowrank.train.overview import describe_layers

MODULE = importlib.import_module("networks.lora_flux")
WIDE = FLUX["num_attention_heads"] * FLUX["attention_head_dim"]
DOUBLE = ("img_mod_lin", "img_attn_qkv", "img_attn_proj", "img_mlp_0", "img_mlp_2")
DOUBLE += tuple(name.replace("img", "txt") for name in DOUBLE)
SINGLE = ("linear1", "linear2", "modulation_lin")


def network(model, *, rank: int = 4, alpha: float = 2.0, encoders=(), seed: int = 0, **arguments):
    torch.manual_seed(seed)
    made = MODULE.create_network(1.0, rank, alpha, None, list(encoders), model, **arguments)
    made.apply_to(list(encoders), model, bool(encoders), True)
    return made


def ranks(made) -> dict[str, int]:
    """The ranks of the layers of a file, by kohya's names."""
    end = ".lora_down.weight"
    return {key.removesuffix(end): len(v) for key, v in made.native_state().items() if key.endswith(end)}


def names(model, double=DOUBLE, single=SINGLE) -> set[str]:
    blocks = [
        *((f"lora_unet_double_blocks_{i}", double) for i in range(len(model.transformer_blocks))),
        *((f"lora_unet_single_blocks_{i}", single) for i in range(len(model.single_transformer_blocks))),
    ]
    return {f"{block}_{name}" for block, layers in blocks for name in layers}


@pytest.fixture(scope="module")
def encoders():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    clip = CLIPTextModel(CLIPTextConfig(vocab_size=32, **sizes))
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=32,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_heads=2,
            num_layers=2,
            feed_forward_proj="gated-gelu",
        )
    )
    return clip.requires_grad_(False), t5.requires_grad_(False)


def test_layers_of_flux_dev():
    """kohya's 304: 19 double blocks of 10 layers, 38 single blocks of 3."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(**FLUX_DEV)
    made = MODULE.create_network(1.0, 16, 16, None, [], model)
    joined = {flux_names.joined_rows(target.path).module for target in made.targets.values()}
    assert len(joined) == 19 * 10 + 38 * 3 == 304
    wide = 3072
    mods, attention = 19 * 2 * (6 + 1) * wide + 38 * (3 + 1) * wide, 19 * 2 * (4 + 2) * wide
    mlps = 19 * 2 * 2 * (4 + 1) * wide
    single = 38 * ((7 + 1) + (5 + 1)) * wide
    assert sum(tagged.parameter.numel() for tagged in made.tagged()) == 16 * (
        mods + attention + mlps + single
    )


def test_file_has_kohyas_keys_shapes_and_alpha(flux):
    made = network(flux)
    state = made.native_state()
    assert {key.split(".")[0] for key in state} == names(flux)
    assert {key.partition(".")[2] for key in state} == {"alpha", "lora_down.weight", "lora_up.weight"}
    assert set(ranks(made).values()) == {4} and all(v == 2 for k, v in state.items() if k.endswith("alpha"))
    assert state["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].shape == (3 * WIDE, 4)
    assert state["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (7 * WIDE, 4)
    assert state["lora_unet_single_blocks_0_linear2.lora_down.weight"].shape == (4, 5 * WIDE)


def test_gradient_is_that_of_one_joined_layer(flux):
    """Of to_q, to_k, to_v with one D, and of a plain LoRA on the rows of all three."""
    made = shake(network(flux.double()).double())
    block = flux.transformer_blocks[0].attn
    parts = [block.to_q, block.to_k, block.to_v]
    x, pull = torch.randn(5, WIDE, dtype=torch.float64), torch.randn(5, 3 * WIDE, dtype=torch.float64)
    (torch.cat([part(x) for part in parts], dim=-1) * pull).sum().backward()
    layers = {layer.name: layer for layer in made.layers()}
    q, k, v = (layers[f"lora_unet_transformer_blocks_0_attn_to_{letter}"] for letter in "qkv")
    assert q.down is k.down is v.down
    state = made.native_state()
    D, U = (
        state[f"lora_unet_double_blocks_0_img_attn_qkv.lora_{name}.weight"].clone() for name in ("down", "up")
    )
    D.requires_grad_(), U.requires_grad_()
    (0.5 * x @ D.T @ U.T * pull).sum().backward()
    tight = {"rtol": 1e-10, "atol": 1e-12}  # float64 sums in another order
    assert torch.allclose(q.down.grad, D.grad, **tight)
    assert torch.allclose(torch.cat([layer.up.grad for layer in (q, k, v)]), U.grad, **tight)


def test_start_draws_what_kohya_draws(flux):
    """kohya makes `Linear(I, R)` and `Linear(R, O)`, then fills D again; its first layer is img_mod.lin."""
    state = network(flux, seed=11).native_state()
    torch.manual_seed(11)
    for name, outs in (("img_mod_lin", 6 * WIDE), ("img_attn_qkv", 3 * WIDE), ("img_attn_proj", WIDE)):
        down = torch.nn.Linear(WIDE, 4, bias=False)
        torch.nn.Linear(4, outs, bias=False)
        torch.nn.init.kaiming_uniform_(down.weight, a=5**0.5)
        layer = f"lora_unet_double_blocks_0_{name}"
        assert torch.equal(state[f"{layer}.lora_down.weight"], down.weight)
        assert not state[f"{layer}.lora_up.weight"].any()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"train_blocks": "single"}, lambda m: dict.fromkeys(names(m, double=()), 4)),
        ({"train_blocks": "double"}, lambda m: dict.fromkeys(names(m, single=()), 4)),
        (
            {"train_double_block_indices": "none", "train_single_block_indices": "0"},
            lambda m: {f"lora_unet_single_blocks_0_{name}": 4 for name in SINGLE},
        ),
        (
            {
                "img_mod_dim": "0",
                "txt_mod_dim": "0",
                "single_mod_dim": "0",
                "single_dim": "2",
                "img_mlp_dim": "3",
            },
            lambda m: {
                name: 2 if "single" in name else 3 if "img_mlp" in name else 4
                for name in names(m)
                if "_mod" not in name
            },
        ),
        (
            {"network_reg_dims": "blocks_0_.*attn=1,linear1=0"},
            lambda m: {
                name: 1 if "blocks_0_" in name and "attn" in name else 4
                for name in names(m)
                if "linear1" not in name
            },
        ),
        (
            {"in_dims": "[2,0,1,0,3]", "train_blocks": "single"},
            lambda m: (
                dict.fromkeys(names(m, double=()), 4)
                | {"lora_unet_img_in": 2, "lora_unet_txt_in": 3}
                | {f"lora_unet_vector_in_{end}_layer": 1 for end in ("in", "out")}
            ),
        ),
    ],
    ids=["single", "double", "indices", "kinds", "patterns", "inputs"],
)
def test_arguments_choose_layers_and_ranks(arguments, expected, flux):
    assert ranks(network(flux, **arguments)) == expected(flux)


def test_learning_rates_by_pattern(flux):
    made = network(flux, network_reg_lrs="linear2=1e-3,single_blocks=1e-4")
    groups, labels = made.prepare_optimizer_params_with_multiple_te_lrs(None, None, 1e-5)
    rates = dict(zip(labels, (group["lr"] for group in groups), strict=True))
    assert rates == {"unet": 1e-5, "reg_lr_0": 1e-3, "reg_lr_1": 1e-4}


def test_text_encoders(encoders, flux):
    plain, both = network(flux, encoders=encoders), None
    plain.restore()
    assert sum(name.startswith("lora_te1_text_model_encoder_layers_") for name in ranks(plain)) == 2 * 6
    assert not any(name.startswith("lora_te3") for name in ranks(plain)) and not plain.train_t5xxl
    both = network(flux, encoders=encoders, train_t5xxl="True")
    t5 = {name for name in ranks(both) if name.startswith("lora_te3")}
    assert both.train_t5xxl and len(t5) == 2 * 7
    assert "lora_te3_encoder_block_1_layer_1_DenseReluDense_wi_0" in t5
    both.restore()


def test_split_qkv_joins_in_the_file(flux):
    """Three separate D, written as one layer of rank 3R with 3 × alpha: ΔW is that of training."""
    made = shake(network(flux, split_qkv="True"))
    state, layer = made.native_state(), "lora_unet_double_blocks_0_txt_attn_qkv"
    up, down = state[f"{layer}.lora_up.weight"], state[f"{layer}.lora_down.weight"]
    assert up.shape == (3 * WIDE, 12) and state[f"{layer}.alpha"] == 6
    layers = {layer.name: layer for layer in made.layers()}
    parts = [layers[f"lora_unet_transformer_blocks_0_attn_add_{letter}_proj"] for letter in "qkv"]
    assert parts[0].down is not parts[1].down
    want = torch.cat([part.delta_weight() for part in parts])
    assert torch.allclose(0.5 * up @ down, want, atol=1e-6)  # fp32 sums of 12 products


def test_file_continues_in_a_new_network(flux, tmp_path):
    first = shake(network(flux))
    first.save_weights(str(tmp_path / "a.safetensors"), None, {})
    first.restore()
    second = network(flux, seed=1)
    result = second.load_weights(str(tmp_path / "a.safetensors"))
    assert not result.missing_keys and not result.unexpected_keys
    for key, value in load_file(tmp_path / "a.safetensors").items():
        assert torch.equal(second.native_state()[key], value)
    second.restore()
    third, _ = MODULE.create_network_from_weights(1.0, str(tmp_path / "a.safetensors"), None, [], flux)
    assert len(third.layers()) == len(second.layers())


def test_plain_lora_with_separate_downs_is_refused(flux, tmp_path):
    made = shake(network(flux, split_qkv="True"))
    state = {
        f"{made.targets[layer.name].native}.lora_{letter}.weight": getattr(layer, role).detach().clone()
        for layer in made.layers()
        for letter, role in (("A", "down"), ("B", "up"))
    }
    save_file(state, tmp_path / "plain.safetensors")
    made.restore()
    with pytest.raises(Refused, match=r"different down tensors .* which share one"):
        network(flux).load_weights(str(tmp_path / "plain.safetensors"))


def test_norm_limit_counts_a_joined_layer_once(flux):
    made = shake(network(flux))

    def norms() -> dict[str, float]:
        state = made.native_state()
        return {
            name: float(0.5 * (state[f"{name}.lora_up.weight"] @ state[f"{name}.lora_down.weight"]).norm())
            for name in ranks(made)
        }

    before = norms()
    limit = sorted(before.values())[len(before) // 2]
    scaled, mean, largest = made.apply_max_norm_regularization(limit, "cpu")
    after = norms()
    assert scaled == sum(value > limit for value in before.values()) > 0
    for name, value in after.items():
        assert value == pytest.approx(min(before[name], limit), rel=1e-5)  # fp32
    assert (mean, largest) == pytest.approx((sum(after.values()) / len(after), max(after.values())), rel=1e-5)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"train_blocks": "singel"}, r"not one of all, double, single \(did you mean 'single'"),
        ({"train_double_block_indices": "0,99"}, "names block 99, and the blocks that are trained are 0 to"),
        ({"train_single_block_indices": "3-1"}, "numbers and ranges such as 0,3-5"),
        ({"in_dims": "[1,2]"}, "not five ranks, of img_in"),
        ({"network_reg_dims": "attn"}, "write REGEX=NUMBER"),
        ({"network_reg_dims": "attn=1.5"}, "write REGEX=NUMBER"),
        ({"network_reg_lrs": "(=1e-4"}, "write REGEX=NUMBER"),
        ({"img_attn_dim": "-1"}, "img_attn_dim=-1 is below 0"),
        ({"ggpo_beta": "0.1", "ggpo_sigma": "0.1"}, "GGPO .* is not supported"),
        ({"target": "norm_out"}, "norm_out.linear, whose rows have another order"),
    ],
)
def test_malformed_arguments_are_refused(arguments, reason, flux):
    with pytest.raises(Refused, match=reason):
        network(flux, **arguments)


def test_other_models_are_refused():
    with pytest.raises(
        Refused, match=r"adapts the blocks of FLUX, and Linear has none; choose networks\.lora"
    ):
        network(torch.nn.Linear(4, 4))


def test_verbose_names_each_layer(flux, caplog):
    with caplog.at_level(logging.INFO):
        network(flux, verbose="True", train_blocks="single")
    assert "\tlora_unet_single_blocks_0_linear1" in caplog.messages


def test_log_counts_kohyas_layers_by_kind(flux, encoders):
    """As flux_train_network.py counts them: q, k and v are one layer."""
    (line,) = describe_layers(network(flux))
    kinds = "double img_mod 1, double txt_mod 1, double img_attn 2, double txt_attn 2, double img_mlp 2, "
    kinds += "double txt_mlp 2, single linear1 1, single linear2 1, single modulation 1"
    count, rest = re.fullmatch(r"denoiser: (\d+) layers \((.*)\)", line).groups()
    assert int(count) == len(names(flux)) == 13
    assert sorted(rest.split(", ")) == sorted(kinds.split(", "))
    lines = describe_layers(network(flux, encoders=encoders, train_t5xxl="True", train_blocks="single"))
    assert [text.partition(" layers")[0].rpartition(": ")[0] for text in lines] == [
        "text encoder 1", "text encoder T5", "denoiser",
    ]  # fmt: skip
