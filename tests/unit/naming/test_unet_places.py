"""Where adapters go in U-Nets and CLIP, and under which names: kohya's, and those of stock diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lowrank.adapters.targets import as_passed, find, find_all
from lowrank.models import published
from lowrank.models.family import Source
from lowrank.models.sd import SD15
from lowrank.models.sdxl import SDXL
from lowrank.naming import keys
from lowrank.train.network_module import create, find_module
from lowrank.train.text_conditions import stack_text

FAMILIES = {"sd15": SD15, "sdxl": SDXL}


@pytest.fixture(scope="module")
def full():
    """The published models on the meta device: (text encoders, U-Net) by kind."""
    found = {}
    with torch.device("meta"):
        for kind in ("sd15", "sd2", "sdxl"):
            facts = published.configurations(kind)
            encoders: list = [CLIPTextModel(CLIPTextConfig(**facts["text_encoder"]))]
            if kind == "sdxl":
                encoders.append(CLIPTextModelWithProjection(CLIPTextConfig(**facts["text_encoder_2"])))
            found[kind] = (encoders, UNet2DConditionModel.from_config(facts["unet"]))
    return found


# ---------- counts and names


@pytest.mark.parametrize(
    ("kind", "conv", "text", "unet"),
    [
        *(("sd15", False, 72, 192), ("sd15", True, 72, 278), ("sd2", False, 138, 192)),
        *(("sdxl", False, 264, 722), ("sdxl", True, 264, 788)),
    ],
)
def test_counts_are_kohyas(kind, conv, text, unet, full):
    encoders, denoiser = full[kind]
    found = find_all(as_passed(encoders, denoiser), denoiser, conv=conv)
    names = [target.name for target in found]
    assert len(set(names)) == len(names)
    assert sum(name.startswith("lora_unet_") for name in names) == unet
    assert sum(name.startswith("lora_te") for name in names) == text
    assert not any("." in name or ("emb_proj" in name and not conv) for name in names)
    assert all(target.native == "" for target in found)


def test_names_of_sd15(full):
    encoders, unet = full["sd15"]
    names = {target.name for target in find_all(as_passed(encoders, unet), unet, conv=True)}
    assert {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_mid_block_attentions_0_proj_in",
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0",
        "lora_unet_down_blocks_0_resnets_1_time_emb_proj",
        "lora_unet_up_blocks_0_resnets_0_conv_shortcut",
        "lora_unet_down_blocks_2_downsamplers_0_conv",
        "lora_unet_up_blocks_2_upsamplers_0_conv",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "lora_te_text_model_encoder_layers_11_self_attn_out_proj",
    } <= names
    assert not {name for name in names if "conv_in" in name or "conv_out" in name or "time_embedding" in name}


# The table of names by hand: SDXL's blocks as diffusers counts them, and as the original code does.
SDXL_NAMES = {
    "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    ),
    "down_blocks.1.attentions.1.proj_in": "input_blocks_5_1_proj_in",
    "down_blocks.1.downsamplers.0.conv": "input_blocks_6_0_op",
    "down_blocks.2.attentions.0.transformer_blocks.9.ff.net.0.proj": (
        "input_blocks_7_1_transformer_blocks_9_ff_net_0_proj"
    ),
    "down_blocks.2.resnets.1.time_emb_proj": "input_blocks_8_0_emb_layers_1",
    "mid_block.resnets.0.conv2": "middle_block_0_out_layers_3",
    "mid_block.attentions.0.proj_out": "middle_block_1_proj_out",
    "mid_block.resnets.1.conv1": "middle_block_2_in_layers_2",
    "up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_out.0": (
        "output_blocks_2_1_transformer_blocks_9_attn2_to_out_0"
    ),
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.resnets.0.conv1": "output_blocks_3_0_in_layers_2",
    "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
    "up_blocks.2.resnets.2.conv2": "output_blocks_8_0_out_layers_3",
}


def test_names_of_sdxl(full):
    encoders, unet = full["sdxl"]
    found = find_all(as_passed(encoders, unet), unet, conv=True)
    by_path = {target.path: target.name for target in found if target.part == "unet"}
    assert {path: by_path[path] for path in SDXL_NAMES} == {
        p: f"lora_unet_{n}" for p, n in SDXL_NAMES.items()
    }
    names = set(by_path.values())
    assert all(name.split("lora_unet_")[1].startswith(("input_", "middle_", "output_")) for name in names)
    texts = {target.name for target in found} - names
    assert "lora_te1_text_model_encoder_layers_11_mlp_fc2" in texts
    assert "lora_te2_text_model_encoder_layers_31_self_attn_v_proj" in texts
    assert not any("text_projection" in name for name in texts)


def test_encoders_are_handed_over_as_kohya_does(full):
    (one,), unet = full["sd15"]
    assert as_passed([one], unet) is one and as_passed([], unet) == []
    two, xl = full["sdxl"]
    assert as_passed(two, xl) == two and as_passed(two[:1], xl) == two[:1]
    assert {t.part for t in find_all([one], unet)} == {"te", "unet"}  # gen_img passes lists for SD 1 too
    assert {t.part for t in find_all(one, None)} == {"te"}
    assert {t.part for t in find_all(two, None)} == {"te1", "te2"}
    assert {t.part for t in find_all([None, two[1]], xl)} == {"te2", "unet"}


def test_every_spelling_finds_its_layer(full):
    for encoders, unet in (full["sd15"], full["sdxl"]):
        found = find_all(as_passed(encoders, unet), unet, conv=True)
        spelled = [name for target in found for name in target.spellings]
        assert len(set(spelled)) == len(spelled)
    (target,) = [t for t in found if t.path == "mid_block.attentions.0.proj_in"]
    for name in (
        *("lora_unet_middle_block_1_proj_in", "lora_unet_mid_block_attentions_0_proj_in"),
        *("unet.mid_block.attentions.0.proj_in", "mid_block.attentions.0.proj_in"),
    ):
        assert keys.flat(name) in target.spellings
    (target,) = [t for t in found if t.name == "lora_te2_text_model_encoder_layers_0_mlp_fc1"]
    for name in (
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2.encoder.layers.0.mlp.fc1",
    ):
        assert keys.flat(name) in target.spellings


def test_any_layer_can_be_named(full):
    _, unet = full["sdxl"]
    assert {
        t.name for t in find("unet", unet, target=r"^(conv_in|conv_out|time_embedding|add_embedding)")
    } == {
        *("lora_unet_input_blocks_0_0", "lora_unet_out_2", "lora_unet_time_embed_0"),
        *("lora_unet_time_embed_2", "lora_unet_label_emb_0_0", "lora_unet_label_emb_0_2"),
    }


# ---------- files in stock diffusers


def trained(kind: str, folder, conv: bool):
    """A tiny model with a LoRA whose every tensor was changed, and the network."""
    models = FAMILIES[kind].load(Source(str(folder), dtype=torch.float32))
    arguments = {"conv_dim": "3", "conv_alpha": "2"} if conv else {}
    net = create(
        find_module("lora"),
        models.denoiser,
        models.text_encoders,
        rank=4,
        alpha=2.0,
        dropout=None,
        arguments=arguments,
        weights=None,
        dim_from_weights=False,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return models, net


def answer(kind: str, models, unet, encoders):
    """What a prompt and a U-Net give: the encoded text, and a prediction."""
    family = FAMILIES[kind]
    models.text_encoders = tuple(encoders)
    text = stack_text(family.encode_text(models, ["a cat on the beach"]))
    sizes = torch.tensor([[64, 64]])
    if family.size_conditions is not None:
        text |= family.size_conditions(sizes, sizes * 0, sizes)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return text["context"], family.denoise(unet, z, torch.tensor([300]), text)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")
@pytest.mark.slow
def test_stock_diffusers_loads_what_we_save(kind, conv, tiny_sd, tiny_sdxl, tmp_path, caplog):
    folder = {"sd15": tiny_sd, "sdxl": tiny_sdxl}[kind]
    models, net = trained(kind, folder, conv)
    path = tmp_path / "lora.safetensors"
    net.save_weights(str(path), None, {})
    ours = answer(kind, models, models.denoiser, models.text_encoders)
    net.restore()
    base = answer(kind, models, models.denoiser, models.text_encoders)
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(ours, base, strict=True))

    stock = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[kind].from_pretrained(folder)
    stock.load_lora_weights(path)
    encoders = [stock.text_encoder] + ([stock.text_encoder_2] if kind == "sdxl" else [])
    theirs = answer(kind, models, stock.unet, encoders)
    assert not [r for r in caplog.records if "unexpected" in r.message or "not found" in r.message]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_file_has_kohyas_keys(kind, tiny_sd, tiny_sdxl, tmp_path):
    _, net = trained(kind, {"sd15": tiny_sd, "sdxl": tiny_sdxl}[kind], True)
    path = tmp_path / "lora.safetensors"
    net.save_weights(str(path), torch.float16, {})
    state = load_file(path)
    modules = {key.partition(".")[0] for key in state}
    kinds = {key.partition(".")[2] for key in state}
    assert kinds == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert modules == {layer.name for layer in net.layers()} == {t.name for t in net.targets.values()}
    assert {module.split("_")[1] for module in modules} == (
        {"unet", "te"} if kind == "sd15" else {"unet", "te1", "te2"}
    )
    assert state[f"{next(iter(modules))}.alpha"].shape == ()


@pytest.mark.parametrize("spelling", ["diffusers blocks", "peft"])
def test_files_with_diffusers_names_load_on_sdxl(spelling, tiny_sdxl, tmp_path):
    models, net = trained("sdxl", tiny_sdxl, True)
    expected = {name: value.clone() for name, value in net.state_dict().items()}
    renamed = {}
    for layer in net.layers():
        target = net.targets[layer.name]
        for role, value in layer.tensors().items():
            if spelling == "peft":
                part = {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"}[target.part]
                name = f"{part}.{target.path}.{keys.PEFT[role]}"
            else:
                name = f"lora_{target.part}_{target.path.replace('.', '_')}.{keys.KOHYA[role]}"
            renamed[name] = value.detach().clone().contiguous()
    save_file(renamed, tmp_path / "other.safetensors")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    told = net.load_weights(str(tmp_path / "other.safetensors"))
    assert not told.missing_keys and not told.unexpected_keys
    assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())
    again, _ = find_module("lora").create_network_from_weights(
        1.0, str(tmp_path / "other.safetensors"), None, list(models.text_encoders), models.denoiser
    )
    assert {(x.name, x.rank) for x in again.layers()} == {(x.name, x.rank) for x in net.layers()}


# ---------- kohya's own classes


def kohya_like(name: str, path: str) -> torch.nn.Module:
    """A root of kohya's class with one attention block and one resnet at `path`."""
    kind = {n: type(n, (torch.nn.Module,), {}) for n in (name, "Transformer2DModel", "ResnetBlock2D")}
    root, attention, resnet = kind[name](), kind["Transformer2DModel"](), kind["ResnetBlock2D"]()
    attention.proj_in, resnet.conv1 = torch.nn.Linear(2, 2), torch.nn.Conv2d(2, 2, 3)
    setattr(root, path, torch.nn.ModuleList([torch.nn.ModuleList([resnet, attention])]))
    root.other = torch.nn.Linear(2, 2)
    if name.startswith("Sdxl"):
        root.label_emb = torch.nn.Identity()
    return root


@pytest.mark.parametrize(
    ("name", "path"), [("SdxlUNet2DConditionModel", "input_blocks"), ("UNet2DConditionModel", "down_blocks")]
)
def test_kohyas_own_unets_are_hosts(name, path):
    root = kohya_like(name, path)
    assert [t.name for t in find("unet", root)] == [f"lora_unet_{path}_0_1_proj_in"]
    assert {t.name for t in find("unet", root, conv=True)} == {
        *(f"lora_unet_{path}_0_1_proj_in", f"lora_unet_{path}_0_0_conv1")
    }
    encoder = torch.nn.Linear(2, 2)
    assert (as_passed([encoder], root) is encoder) == (name == "UNet2DConditionModel")
