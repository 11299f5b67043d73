"""LoRA as in kohya's networks.lora: layers, keys, blocks, rates, rules, files; PEFT and diffusers agree."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from kohya_models import SD15, SDXL, clip, tiny
from peft import LoraConfig, get_peft_model
from toys import HOSTS, RANK, base, network, shake
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lowrank.adapters import layer_rules, unet_blocks
from lowrank.adapters.network_module import NetworkModule
from lowrank.adapters.targets import Target
from lowrank.errors import Refused
from lowrank.tensors import read_tensors, write_tensors
from networks import lora

SCHEDULER = DDIMScheduler(steps_offset=1, clip_sample=False)


def made(family: str, rank: int = 4, alpha: float = 2.0, **arguments):
    encoders, unet = tiny(family)
    net = lora.create_network(1.0, rank, alpha, None, encoders, unet, **arguments)
    net.apply_to(encoders, unet, True, True)
    net.prepare_grad_etc(encoders, unet)
    return net, encoders, unet


@pytest.fixture(scope="module")
def sd():
    """A tiny SD that no network is put on."""
    return tiny("sd")


# ------------------------------------------------------------------ layers and keys of the real models


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return {
            "sd": (clip(CLIPTextModel, 768, 12, 12), UNet2DConditionModel(**SD15)),
            "sdxl": (
                [clip(CLIPTextModel, 768, 12, 12), clip(CLIPTextModelWithProjection, 1280, 32, 20)],
                UNet2DConditionModel(**SDXL),
            ),
        }


ATTENTION = {
    "sd": dict.fromkeys((1, 2, 4, 5, 7, 8, 12, *range(16, 25)), 12),
    # 10 per transformer block, and a projection at each end
    "sdxl": {5: 22, 6: 22, 8: 102, 9: 102, 11: 102, 13: 102, 14: 102, 15: 102, 16: 22, 17: 22, 18: 22},
}


@pytest.mark.parametrize(
    ("family", "parts", "with_conv"),
    [("sd", {"te": 72, "unet": 192}, 278), ("sdxl", {"te1": 72, "te2": 192, "unet": 722}, 788)],
)
def test_adapter_counts_of_full_size_models(family, parts, with_conv, full_size):
    encoders, unet = full_size[family]
    net = lora.create_network(1.0, 4, 1.0, None, encoders, unet)
    assert Counter(target.part for target in net.targets.values()) == parts
    assert Counter(filter(None, map(unet_blocks.index, net.targets))) == ATTENTION[family]
    wide = lora.create_network(1.0, 4, 1.0, None, encoders, unet, conv_dim="2", conv_alpha="1")
    assert Counter(target.part for target in wide.targets.values()) == {**parts, "unet": with_conv}
    for layer in wide.layers():
        kernel = layer.host.kernel_size if layer.conv else (1, 1)
        assert (layer.rank, layer.scale) == ((2, 0.5) if kernel == (3, 3) else (4, 0.25))


KEYS = {
    "sd": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_mid_block_attentions_0_proj_in",
        "lora_unet_down_blocks_2_downsamplers_0_conv",
        "lora_unet_up_blocks_3_resnets_2_conv_shortcut",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
    ),
    "sdxl": (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_middle_block_2_in_layers_2",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_output_blocks_8_0_emb_layers_1",
        "lora_unet_output_blocks_8_0_skip_connection",
        "lora_te1_text_model_encoder_layers_11_self_attn_out_proj",
        "lora_te2_text_model_encoder_layers_31_mlp_fc2",
    ),
}


@pytest.mark.parametrize("family", KEYS)
def test_kohya_keys(family, full_size):
    encoders, unet = full_size[family]
    net = lora.create_network(1.0, 4, 1.0, None, encoders, unet, conv_dim="4")
    net.apply_to(encoders, unet)
    state = net.state_dict().keys()
    for key in KEYS[family]:
        assert {k.removeprefix(key) for k in state if k.startswith(key + ".")} == {
            f".{suffix}" for suffix in ("lora_down.weight", "lora_up.weight", "alpha")
        }
    assert len(state) == 3 * len(net.targets) and net.native_state().keys() == state
    net.restore()


# ------------------------------------------------------------------ blocks


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("lora_unet_down_blocks_0_resnets_0_conv1", 1),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", 3),
        ("lora_unet_down_blocks_3_resnets_1_conv2", 11),
        ("lora_unet_mid_block_resnets_1_conv1", 12),
        ("lora_unet_up_blocks_0_resnets_0_conv1", 13),
        ("lora_unet_up_blocks_2_upsamplers_0_conv", 21),
        ("lora_unet_up_blocks_3_attentions_2_proj_in", 24),
        ("lora_unet_input_blocks_1_0_in_layers_2", 2),
        ("lora_unet_input_blocks_8_1_proj_in", 9),
        ("lora_unet_middle_block_0_in_layers_2", 10),
        ("lora_unet_middle_block_2_in_layers_2", 12),
        ("lora_unet_output_blocks_0_0_in_layers_2", 13),
        ("lora_unet_output_blocks_8_0_out_layers_3", 21),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", None),
        ("lora_unet_double_blocks_0_img_attn_qkv", None),
    ],
)
def test_block_of_layer(name, block):
    assert unet_blocks.index(name) == block


def test_block_plan_from_names():
    assert unet_blocks.plan(["lora_te_x", "lora_unet_mid_block_attentions_0_proj_in"]) == unet_blocks.SD
    assert unet_blocks.plan(["lora_unet_middle_block_1_proj_in"]) == unet_blocks.SDXL
    assert unet_blocks.plan(["lora_unet_transformer_blocks_0_attn_to_q"]) is None
    assert (unet_blocks.SD.count, unet_blocks.SDXL.count) == (25, 23)


def test_block_dims_and_alphas():
    dims, alphas = [2 + i % 3 for i in range(25)], [1.0 + i for i in range(25)]
    dims[1], alphas[4] = 0, 0.0
    told = {"block_dims": dims, "block_alphas": alphas}
    told |= {"conv_block_dims": [1] * 24 + [0], "conv_block_alphas": [0.5] * 25}
    net, _, _ = made("sd", **{k: ",".join(map(str, v)) for k, v in told.items()})
    seen = set()
    for layer in net.layers("unet"):
        block = unet_blocks.index(layer.name)
        seen.add(block)
        if layer.conv and layer.host.kernel_size == (3, 3):
            assert (layer.rank, float(layer.alpha)) == (1, 0.5) and block != 24
        else:
            assert layer.rank == dims[block]
            assert float(layer.alpha) == (alphas[block] or dims[block])
    assert seen == set(range(1, 25))  # the convolutions of block 1 are still there
    assert all("attentions" not in name for name in net.targets if unet_blocks.index(name) == 1)
    assert {(layer.rank, float(layer.alpha)) for layer in net.layers("te")} == {(4, 2.0)}


def kohyas_sdxl() -> torch.nn.Module:
    """A host as kohya's trainer has it: its class names and the original paths, one layer in a few blocks."""
    inside = type("Transformer2DModel", (torch.nn.Module,), {})
    resnet = type("ResnetBlock2D", (torch.nn.Module,), {})
    root = type("SdxlUNet2DConditionModel", (torch.nn.Module,), {})()
    for name, kind, layer in (
        ("input_blocks", inside, ("proj_in", torch.nn.Linear(16, 16))),
        ("middle_block", resnet, ("in_layers", torch.nn.Conv2d(16, 16, 3))),
        ("output_blocks", inside, ("proj_in", torch.nn.Linear(16, 16))),
    ):
        block = kind()
        block.add_module(*layer)
        root.add_module(name, torch.nn.ModuleList([torch.nn.ModuleList([block]) for _ in range(1)]))
    return root.requires_grad_(False)


def test_blocks_of_kohya_sdxl():
    dims = ",".join(str(i % 16) for i in range(23))
    net = lora.create_network(
        1.0, 4, 4.0, None, [None, None], kohyas_sdxl(), block_dims=dims, conv_block_dims=dims
    )
    assert {layer.name: layer.rank for layer in net.layers()} == {
        "lora_unet_input_blocks_0_0_proj_in": 1,
        "lora_unet_middle_block_0_0_in_layers": 10,
        "lora_unet_output_blocks_0_0_proj_in": 13,
    }


N = 12
CURVES = {
    "sine": [math.sin(math.pi / 2 * i / (N - 1)) for i in range(N)],
    "cosine": [math.cos(math.pi / 2 * i / (N - 1)) for i in range(N)],
    "linear": [i / (N - 1) for i in range(N)],
    "reverse_linear+.25": [(N - 1 - i) / (N - 1) + 0.25 for i in range(N)],
    "zeros+0.5": [0.5] * N,
}


@pytest.mark.parametrize("text", CURVES)
def test_curves_of_block_weights(text):
    assert unet_blocks.lr_weights(unet_blocks.SD, text, None, None, -1) == pytest.approx(
        [*CURVES[text], *[1.0] * 13]
    )


def test_lists_of_block_weights(caplog):
    found = unet_blocks.lr_weights(unet_blocks.SDXL, "0.5,,1,1,1,1,1,1,0.1", "2,3,4", None, 0.1)
    assert found == [1, 0.5, 0, 1, 1, 1, 1, 1, 1, 0, 2, 3, 4, *[1] * 9, 1] and not caplog.records
    found = unet_blocks.lr_weights(unet_blocks.SDXL, "0.5,0.5", "2,3,4,5", None, 0)
    assert found == [1, 0.5, 0.5, *[1] * 7, 2, 3, 4, *[1] * 9, 1]
    assert "down_lr_weight has 2 numbers for 9 blocks" in caplog.text and "mid_lr_weight has 4" in caplog.text
    assert unet_blocks.lr_weights(unet_blocks.SD, None, None, None, 0) is None


def rates_of(net, *rates):
    groups, names = net.prepare_optimizer_params_with_multiple_te_lrs(*rates)
    assert all(list(group["params"]) for group in groups)
    return {name: pytest.approx(group["lr"]) for name, group in zip(names, groups, strict=True)}


def test_block_learning_rates():
    weights = ["0"] * 12
    weights[4], weights[5] = "0.5", "2"
    net, _, _ = made(
        "sd", down_lr_weight=",".join(weights), up_lr_weight="zeros", loraplus_unet_lr_ratio="16"
    )
    assert rates_of(net, 1e-5, None, 1e-4) == {
        "textencoder": 1e-5,
        "unet_block4": 5e-5,
        "unet_block4 plus": 8e-4,
        "unet_block5": 2e-4,
        "unet_block5 plus": 3.2e-3,
        "unet_block12": 1e-4,
        "unet_block12 plus": 1.6e-3,
    }
    assert {unet_blocks.index(layer.name) for layer in net.layers("unet")} == {4, 5, 12}
    net, _, _ = made("sd", mid_lr_weight="0.2", block_lr_zero_threshold="0.2")
    assert 12 not in {unet_blocks.index(layer.name) for layer in net.layers("unet")}


def test_learning_rate_of_each_text_encoder():
    net, _, _ = made("sdxl", loraplus_text_encoder_lr_ratio="4")
    assert rates_of(net, [1e-5, 2e-5], 1e-4, 1e-3) == {
        "textencoder 1 ": 1e-5,
        "textencoder 1  plus": 4e-5,
        "textencoder 2 ": 2e-5,
        "textencoder 2  plus": 8e-5,
        "unet": 1e-4,
    }
    assert set(rates_of(net, [0, 2e-5], 0, 1e-3)) == {"textencoder 2 ", "textencoder 2  plus"}
    for given in ([3e-5], 3e-5):
        assert list(rates_of(net, given, 0, 1).values()) == [3e-5, 1.2e-4] * 2
    for nothing in ([], None):
        assert rates_of(net, nothing, 0, 1e-3)["textencoder 2 "] == 1e-3


# ------------------------------------------------------------------ rules


def test_rules_for_rank_alpha_and_rate():
    net, _, _ = made(
        "sdxl",
        conv_dim="1",
        module_rules=r"attn2\.to_[kv]$ -> rank=3 alpha=1.5; ^unet\.mid_block -> lr=7e-5"
        "\n" + r"\.resnets\. -> off; ^te2 -> rank=2 lr=1e-6; ^te1 -> off",
        loraplus_lr_ratio="10",
    )
    for name, layer in net._all_layers.items():
        path = net.targets[name].path
        size = (layer.rank, float(layer.alpha))
        assert "resnets" not in path or path.startswith("mid_block")
        if path.endswith(("attn2.to_k", "attn2.to_v")):
            assert size == (3, 1.5)
        elif net.targets[name].part == "te2":
            assert size == (2, 2.0)
        elif not layer.conv:
            assert size == (4, 2.0)
    assert {target.part for target in net.targets.values()} == {"te2", "unet"}
    assert rates_of(net, 1e-5, 1e-4, 1e-3) == {
        "reg_lr_3": 1e-6,
        "reg_lr_3 plus": 1e-5,
        "unet": 1e-4,
        "unet plus": 1e-3,
        "reg_lr_1": 7e-5,
        "reg_lr_1 plus": 7e-4,
    }


def test_first_matching_rule():
    found = layer_rules.parse_rules("a -> rank=1; b -> rank=2 alpha=0.5 lr=0")

    def rule_of(path, *inside):
        return layer_rules.first(found, Target("unet", "", "", torch.nn.Linear(1, 1), path, inside))

    assert [rule_of(path) for path in ("xa", "b", "ab", "c")] == [0, 1, 0, None]
    assert (found[1].rank, found[1].alpha, found[1].lr) == (2, 0.5, 0.0)
    assert layer_rules.parse_rules(None) == layer_rules.parse_rules(" ;\n") == ()
    assert layer_rules.parse_rules("a->b -> off")[0].pattern.pattern == "a->b"
    # by class: where no pattern holds, and of several the innermost block's, wherever it stands in the text
    found = layer_rules.parse_rules("class:Block -> rank=1; class:Attention -> rank=2; b -> rank=3")
    assert rule_of("c", "Linear", "Attention", "Block", "Net") == 1
    assert rule_of("c", "Linear", "Block", "Net") == 0
    assert rule_of("b", "Linear", "Attention", "Block", "Net") == 2
    assert rule_of("c", "Linear", "Net") is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"module_rules": "attn1"}, "not of the form"),
        ({"module_rules": "attn1 ->"}, "not of the form"),
        ({"module_rules": "( -> off"}, "not a regular expression"),
        ({"module_rules": "attn1 -> rnak=4"}, "did you mean 'rank'"),
        ({"module_rules": "attn1 -> rank=0"}, "or use off"),
        ({"module_rules": "attn1 -> alpha=0"}, "not a number above 0"),
        ({"module_rules": "attn1 -> lr=-1"}, "0 or more"),
        ({"module_rules": "attn1 -> rank=4.5"}, "not a whole number above 0"),
        ({"module_rules": "attn1 -> rank=900"}, "does not fit"),
        ({"module_rules": "attn9 -> rank=4"}, "matches no adapted layer"),
        ({"module_rules": "class:Atention -> rank=4"}, "layers are in .*Attention"),
        ({"module_rules": "attn -> rank=4; attn1 -> off"}, "only layers that another rule applies to"),
        ({"module_rules": ". -> off"}, "exclude every layer"),
        ({"block_dims": "4,4"}, "has 2 numbers, but the model has 25 blocks"),
        ({"block_dims": ",".join(["x"] * 25)}, "not a list of numbers"),
        ({"block_alphas": ",".join(["-1"] * 25)}, "give 25, all >= 0"),
        ({"down_lr_weight": "sinus"}, "did you mean 'sine'"),
        ({"down_lr_weight": "sine+x"}, "does not end in a number"),
        ({"mid_lr_weight": "sine"}, "not a list of numbers"),
        ({"conv_dim": "many"}, "is not a whole number"),
        ({"conv_dim": "2", "conv_alpha": "nan"}, "is not a finite number"),
        ({"loraplus_unet_lr_ratio": "-1"}, "-1 is below 0"),
        ({"rank_dropout": "1"}, "from 0 to below 1"),
    ],
    ids=str,
)
def test_lora_error_messages(arguments, words, sd):
    with pytest.raises(Refused, match=words) as told:
        lora.create_network(1.0, 4, 1.0, None, *sd, **arguments)
    assert "\n" not in str(told.value)


def test_rules_are_parsed_before_model_loads():
    with pytest.raises(Refused, match="not of the form"):
        lora.create_network.__self__.check({"module_rules": "attn1"})


def test_block_arguments_without_blocks():
    model = base("linear")
    with pytest.raises(Refused, match="module_rules"):
        lora.create_network(1.0, 4, 1.0, None, [], model, target=".", block_dims="4")


# ------------------------------------------------------------------ values, dropouts


def test_kohya_defaults():
    encoders, unet = tiny("sd")
    for alpha, scale in ((None, 0.25), (0, 1.0), (2, 0.5)):  # kohya: unset is 1, 0 is the rank
        net = lora.create_network(1.0, None, alpha, None, encoders, unet)
        assert {(layer.rank, layer.scale) for layer in net.layers()} == {(4, scale)}
    wide = lora.create_network(1.0, None, None, None, encoders, unet, conv_dim="2", conv_alpha="0")
    assert {layer.scale for layer in wide.layers() if layer.rank == 2} == {1.0}
    assert net.layers()[0].up.abs().max() == 0
    down = net.layers()[0].down
    assert down.abs().max() <= 1 / math.sqrt(down.shape[1]) and down.std() > 0.5 / math.sqrt(down.shape[1])


@pytest.mark.parametrize("kind", HOSTS)
def test_dropouts_equal_kohya(kind):
    model = base(kind)
    net = shake(network("lora", model))
    inputs, layer = HOSTS[kind].example(4), net.layers()[0]
    y, full = layer._forward_host(inputs), layer.delta(inputs)
    layer.module_dropout = 1.0
    assert torch.equal(layer(inputs), y)
    layer.module_dropout, layer.rank_dropout = 0.0, 0.5
    torch.manual_seed(0)
    got = layer.delta(inputs)
    torch.manual_seed(0)
    kept = (torch.rand(4, RANK) > 0.5) * 2.0  # one choice per sample, the kept ones doubled
    if kind == "linear":
        h = F.linear(inputs, layer.down) * kept[:, None]
        want = F.linear(h, layer.up) * layer.scale
    else:
        h = F.conv2d(inputs, layer.down, stride=2, padding=1) * kept[:, :, None, None]
        want = F.conv2d(h, layer.up) * layer.scale
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert not torch.equal(got, full)
    layer.eval()
    assert torch.equal(layer.delta(inputs), full)


@pytest.mark.parametrize("kind", HOSTS)
def test_delta_weight_and_output_equal_peft(kind):
    model = base(kind, torch.float64)
    net = shake(network("lora", model, alpha=3.0).double())
    config = LoraConfig(r=RANK, lora_alpha=3, target_modules=["first", "second"])
    theirs = get_peft_model(base(kind, torch.float64), config)
    for layer, own in zip(
        (theirs.base_model.model.first, theirs.base_model.model.second), net.layers(), strict=True
    ):
        layer.lora_A["default"].weight.data = own.down.detach().clone()
        layer.lora_B["default"].weight.data = own.up.detach().clone()
        torch.testing.assert_close(
            own.delta_weight(), layer.get_delta_weight("default"), rtol=1e-12, atol=1e-12
        )
    x = HOSTS[kind].example().double()
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ files


def run_unet(unet, family: str):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 3, unet.config.cross_attention_dim, generator=generator)
    added = {"text_embeds": torch.randn(2, 32, generator=generator), "time_ids": torch.ones(2, 6)}
    return unet(
        sample,
        torch.tensor([10, 500]),
        text,
        added_cond_kwargs=added if family == "sdxl" else None,
    ).sample


def run_text(encoder):
    return encoder(torch.tensor([[97, 5, 6, 98]]), output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("conv", [{}, {"conv_dim": "2", "conv_alpha": "1"}], ids=["linear", "conv"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.slow
def test_stock_diffusers_loads_the_file(family, conv, tmp_path, caplog):
    net, encoders, unet = made(family, **conv)
    shake(net)
    net.save_weights(str(tmp_path / "a.safetensors"), None, {})
    want = [run_unet(unet, family), *map(run_text, encoders)]
    fresh, other = tiny(family)
    parts = {"vae": None, "unet": other, "scheduler": SCHEDULER, "text_encoder": fresh[0]}
    if family == "sd":
        none = dict.fromkeys(("tokenizer", "safety_checker", "feature_extractor"))
        pipeline = StableDiffusionPipeline(**parts, **none, requires_safety_checker=False)
    else:
        none = dict.fromkeys(("tokenizer", "tokenizer_2"))
        pipeline = StableDiffusionXLPipeline(**parts, **none, text_encoder_2=fresh[1])
    before = run_unet(other, family)
    pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    assert "unexpected" not in caplog.text.lower()
    for mine, theirs in zip(want, [run_unet(other, family), *map(run_text, fresh)], strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(want[0], before, atol=1e-2)


def test_file_of_another_family_and_missing_layers(tmp_path, caplog):
    """Even where the text encoders of both have the same names."""
    path = str(tmp_path / "xl.safetensors")
    made("sdxl")[0].save_weights(path, None, {})
    encoders, unet = tiny("sd")
    with pytest.raises(Refused, match="has none of them, for example input_blocks_4_1_"):
        lora.create_network_from_weights(1.0, path, None, encoders, unet)
    assert not caplog.text
    lora.create_network_from_weights(1.0, path, None, [], tiny("sdxl")[1])
    assert "layers are not in this model and are left out, for example te1|text_model" in caplog.text


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_network_from_file(family, tmp_path):
    net, encoders, unet = made(
        family, conv_dim="2", module_rules="attn1 -> rank=3 alpha=7; mid_block -> off; ^te -> rank=1"
    )
    shake(net)
    path = str(tmp_path / "a.safetensors")
    net.save_weights(path, torch.bfloat16, {})
    want = [(layer.name, layer.rank, layer.scale) for layer in net.layers()]
    encoders, unet = tiny(family)
    other, state = lora.create_network_from_weights(
        1.0, path, None, encoders, unet, module_rules="to_q -> lr=1"
    )
    assert [(layer.name, layer.rank, layer.scale) for layer in other.layers()] == want
    assert set(other.speeds.values()) == {("reg_lr_0", 1.0, 1.0)}
    other.apply_to(encoders, unet)
    told = other.load_weights(path)
    assert not told.missing_keys and not told.unexpected_keys
    ours = net.state_dict()
    assert all(torch.equal(value, ours[k].bfloat16().to(value)) for k, value in other.state_dict().items())
    old = {key: value for key, value in state.items() if not key.endswith("alpha")}  # before alpha: the rank
    assert {
        layer.scale
        for layer in lora.create_network_from_weights(1.0, None, None, *tiny(family), old)[0].layers()
    } == {1.0}


def test_sdxl_file_with_diffusers_block_names(tmp_path):
    net, _, _ = made("sdxl", conv_dim="2")
    shake(net)
    renamed = {}
    for name, layer in net._all_layers.items():
        target = net.targets[name]
        module = "lora_unet_" + target.path.replace(".", "_") if target.part == "unet" else name
        for suffix, role in (("lora_down.weight", "down"), ("lora_up.weight", "up"), ("alpha", "alpha")):
            renamed[f"{module}.{suffix}"] = layer.tensors()[role]
    assert any("down_blocks_1_attentions_0" in key for key in renamed)
    write_tensors(tmp_path / "b.safetensors", renamed, {})
    encoders, unet = tiny("sdxl")
    other, _ = lora.create_network_from_weights(1.0, str(tmp_path / "b.safetensors"), None, encoders, unet)
    other.apply_to(encoders, unet)
    told = other.load_weights(str(tmp_path / "b.safetensors"))
    assert not told.missing_keys and not told.unexpected_keys
    ours = net.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in other.state_dict().items())


def test_base_weights_merge_through_kohya_calls(tmp_path):
    net, encoders, unet = made("sd", conv_dim="2")
    shake(net)
    net.save_weights(str(tmp_path / "a.safetensors"), None, {})
    want = run_unet(unet, "sd")
    encoders, unet = tiny("sd")
    other, state = lora.create_network_from_weights(
        1.0, str(tmp_path / "a.safetensors"), None, encoders[0], unet, for_inference=True
    )
    other.merge_to(encoders[0], unet, state, torch.float32, "cpu")
    torch.testing.assert_close(run_unet(unet, "sd"), want, rtol=1e-4, atol=1e-4)
    assert read_tensors(tmp_path / "a.safetensors")[0].keys() == net.state_dict().keys()


def test_network_arguments():
    owner = lora.create_network.__self__
    assert isinstance(owner, NetworkModule)
    kohyas = "conv_dim conv_alpha block_dims block_alphas conv_block_dims conv_block_alphas down_lr_weight "
    kohyas += "mid_lr_weight up_lr_weight block_lr_zero_threshold dropout rank_dropout module_dropout "
    kohyas += "loraplus_lr_ratio loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio"
    assert set(kohyas.split()) <= set(owner.known)
