"""Adapter files as other programs write them: the right ΔW, or a refusal that names what is wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank import peft_config
from lowrank.cli import export, importing, inspection, merge
from lowrank.combine.shared_basis import read_updates
from lowrank.errors import Refused
from lowrank.formats.base_checkpoint import BaseCheckpoint
from lowrank.formats.inspect import report as inspection_report
from lowrank.formats.read import Adapter, read_adapter
from lowrank.naming.families import layers_of, looks_like
from lowrank.naming.places import LayerPath
from networks import tlora
from tools import make_tiny_sd

UNET = "down_blocks.1.attentions.0.transformer_blocks.0"
SDXL = "lora_unet_input_blocks_4_1_transformer_blocks_0_"


def pair(outs: int, ins: int, rank: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An up (O, R) and a down (R, I)."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(outs, rank, generator=draw), torch.randn(rank, ins, generator=draw)


def product(up: Tensor, down: Tensor, scale: float = 1.0) -> Tensor:
    return scale * up.double() @ down.double()


def kohya(module: str, up: Tensor, down: Tensor, alpha: float | None = None) -> dict[str, Tensor]:
    state = {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}
    return state if alpha is None else {**state, f"{module}.alpha": torch.tensor(alpha)}


def written(folder: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    path = folder / "in.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path, dict(metadata or {}))
    return path


def change(adapter: Adapter, path: str, part: str = "unet") -> Tensor:
    """ΔW (O, I) of a layer in float64."""
    layer = adapter.layers[LayerPath(part, path)]
    return product(layer.up, layer.down, layer.scale)


def apart(have: Tensor, want: Tensor) -> float:
    return float((have - want).norm() / want.norm())


@pytest.fixture(scope="module")
def tiny_xl(tmp_path_factory) -> Path:
    return make_tiny_sd.make(tmp_path_factory.mktemp("base") / "sdxl", "sdxl", single=True)


# ---------- the lists of layers


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sd2", "sdxl", "flux"])
def test_lists_are_those_of_models(kind):
    """The names equal those of the models that diffusers builds from the configurations."""
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel

    counts = (2,) if kind == "flux" else (2, 1)
    for per_block in counts:
        with torch.device("meta"):
            if kind == "flux":
                model = FluxTransformer2DModel(guidance_embeds=True)
            else:
                config = json.loads((Path("configs/models") / f"{kind}.json").read_text())["unet"]
                model = UNet2DConditionModel.from_config({**config, "layers_per_block": per_block})
        names = {
            name.removesuffix(".weight") for name, _ in model.named_parameters() if name.endswith("weight")
        }
        family = "sd15" if kind == "sd2" else kind
        assert {p.path for p in layers_of(family, per_block) if p.part == "unet"} == names


def test_text_encoder_lists_are_those_of_models():
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    with torch.device("meta"):
        clip = CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=32, vocab_size=9, hidden_size=8))
        t5 = T5EncoderModel(
            T5Config(num_layers=24, d_model=8, d_ff=8, d_kv=4, num_heads=2, feed_forward_proj="gated-gelu")
        )
    for model, family, part, shared in (
        (clip, "sdxl", "te2", set()),
        (t5, "flux", "te3", {"encoder.embed_tokens"}),
    ):
        names = {
            name.removesuffix(".weight") for name, _ in model.named_parameters() if name.endswith("weight")
        }
        assert {p.path for p in layers_of(family) if p.part == part} - shared == names


OTHER_MODELS = {
    "Qwen-Image": "transformer.transformer_blocks.3.img_mlp.net.2",
    "SD3": "diffusion_model.joint_blocks.4.x_block.attn.qkv",
    "LTX-Video, PixArt, Sana or CogVideoX": "transformer.transformer_blocks.2.attn1.to_q",
    "FLUX.2": "transformer.single_transformer_blocks.1.attn.to_qkv_mlp_proj",
    "Wan": "diffusion_model.blocks.7.cross_attn.k_img",
    "HunyuanVideo": "lora_unet_double_blocks_0_img_mlp_fc1",
    "Chroma": "diffusion_model.distilled_guidance_layer.layers.0.in_layer",
    "Lumina or Z-Image": "diffusion_model.layers.3.attention.qkv",
    "AnimateDiff": "unet.down_blocks.0.motion_modules.0.temporal_transformer.proj_in",
    "a language model": "base_model.model.model.layers.0.self_attn.q_proj",
}


@pytest.mark.parametrize("model", OTHER_MODELS)
def test_other_models_are_refused_by_name(model, tmp_path):
    module = OTHER_MODELS[model]
    path = written(tmp_path, kohya(module, *pair(8, 8)))
    with pytest.raises(Refused, match=model):
        read_adapter(path)
    target = tmp_path / "out.safetensors"
    with pytest.raises(Refused, match=model):
        importing.main([str(path), str(target), "--family", "flux"])
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]


def test_flux_names_in_other_depths_and_sizes_are_refused(tmp_path):
    blocks = "transformer.transformer_blocks.{}.attn.to_q".format
    for number, model in ((22, "SD3"), (59, "Qwen-Image")):
        state = {**kohya(blocks(0), *pair(8, 8)), **kohya(blocks(number), *pair(8, 8))}
        with pytest.raises(Refused, match=f"1 of 2 layers .* look like {model}"):
            read_adapter(written(tmp_path, state))
    with pytest.raises(Refused, match=r"1536 inputs .* SD3 Medium"):
        read_adapter(written(tmp_path, kohya(blocks(0), *pair(1536, 1536, 1))))
    with pytest.raises(Refused, match=r"FLUX\.2"):
        read_adapter(written(tmp_path, kohya("lora_unet_single_blocks_0_linear1", *pair(72, 8))))
    for version, model in (("sd3-medium", "SD3"), ("qwen_image", "Qwen-Image"), ("flux2_dev", r"FLUX\.2")):
        with pytest.raises(Refused, match=f"adapter of {model}"):
            read_adapter(written(tmp_path, kohya(blocks(0), *pair(8, 8)), {"ss_base_model_version": version}))
    assert looks_like(["lora_unet_double_blocks_19_img_attn_qkv"]) == "HunyuanVideo"


def test_files_that_fit_two_families_ask_for_one(tmp_path):
    text = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    path = written(tmp_path, kohya(text, *pair(12, 8)))
    with pytest.raises(Refused, match=r"fit .*sdxl and flux.* give --family"):
        read_adapter(path)
    assert read_adapter(path, "sdxl").family == "sdxl" and read_adapter(path, "flux").family == "flux"
    unet = f"unet.{UNET}."
    path = written(tmp_path, kohya(f"{unet}attn1.to_q", *pair(8, 8)))
    with pytest.raises(Refused, match="fit sd15 and sdxl"):
        read_adapter(path)
    for width, family in ((768, "sd15"), (1024, "sd15"), (2048, "sdxl")):
        path = written(tmp_path, kohya(f"{unet}attn2.to_k", *pair(8, width)))
        assert read_adapter(path).family == family
    named = written(
        tmp_path, kohya(f"{unet}attn1.to_q", *pair(8, 8)), {"ss_base_model_version": "sdxl_base_v1-0"}
    )
    assert read_adapter(named).family == "sdxl"


# ---------- alpha


@pytest.mark.parametrize("place", ["key", "one axis", "A", "network_alphas", "header", "config", "none"])
def test_alpha_in_every_place(place, tmp_path):
    """s = alpha/r with alpha 16 and r 4, wherever the alpha is; 1 without an alpha."""
    up, down = pair(12, 8)
    module, metadata = "transformer.transformer_blocks.0.attn.to_q", {}
    state = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    if place == "key":
        state[f"{module}.alpha"] = torch.tensor(16.0)
    if place == "one axis":
        state[f"{module}.alpha"] = torch.tensor([16.0], dtype=torch.bfloat16)
    if place == "A":
        state |= {f"{module}.lora_{side}.alpha": torch.tensor(16) for side in "AB"}
    if place == "network_alphas":
        state[f"{module}.lora.alpha"] = torch.tensor(16.0)
    if place == "header":
        header = {"transformer.r": 4, "transformer.lora_alpha": 16, "transformer.alpha_pattern": {"ff": 1}}
        metadata = {"lora_adapter_metadata": json.dumps(header)}
    if place == "config":
        folder = tmp_path / "adapter" / "transformer"
        folder.mkdir(parents=True)
        save_file(
            {f"base_model.model.{k.partition('.')[2]}": v for k, v in state.items()},
            folder / "adapter_model.safetensors",
        )
        (folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16})
        )
    path = tmp_path / "adapter" if place == "config" else written(tmp_path, state, metadata)
    scale = 1.0 if place == "none" else 4.0
    have = change(read_adapter(path), "transformer_blocks.0.attn.to_q")
    assert apart(have, product(up, down, scale)) <= 1e-6  # exact factors; alpha is a small whole number


@pytest.mark.parametrize(
    ("pattern", "alpha"),
    [
        ("to_q", 2),
        (r".*\.attn\.to_q", 2),
        (r"^transformer_blocks\.\d+\.attn\.to_(q|k)", 2),
        (r"transformer_blocks\.[1-9]\.attn\.to_q", 16),
        ("^attn.to_q", 16),
        ("o_q", 16),
    ],
)
def test_alpha_patterns_match_as_in_peft(pattern, alpha):
    from peft.utils.other import get_pattern_key

    path, config = "transformer_blocks.0.attn.to_q", {"lora_alpha": 16, "alpha_pattern": {pattern: 2}}
    assert peft_config.alpha_of(config, path, 4, "it") == alpha
    assert {pattern: 2}.get(get_pattern_key([pattern], path), 16) == alpha


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*a){9}", "(a)\\1", "a" * 400, ".*.*.*.*b", "(?=x)", "["])
def test_patterns_that_are_no_safe_expressions_are_refused(pattern):
    with pytest.raises(Refused, match=r"too complex|no regular expression"):
        peft_config.alpha_of({"lora_alpha": 1, "alpha_pattern": {pattern: 2}}, "a" * 60, 4, "it")


# ---------- PEFT


def peft_folder(folder: Path, config: Mapping, state: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(
        {f"base_model.model.{key}": v.contiguous() for key, v in state.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config})
    )
    return folder


def test_every_field_of_peft_is_listed():
    """A field that a newer PEFT adds must be listed here with its meaning before files with it are read."""
    from peft import LoraConfig

    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    tables = (peft_config.USED, peft_config.HARMLESS, peft_config.OFF_ONLY)
    listed = [name for table in tables for name in table]
    assert fields <= set(listed) and len(listed) == len(set(listed))
    default = LoraConfig(target_modules=["to_q"]).to_dict() | {"peft_type": "LORA"}
    peft_config.check_config(default, "a default configuration")


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"init_lora_weights": "loftq"}, "quantised base"),
        ({"init_lora_weights": "of_next_year"}, "no start that is known"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"target_parameters": ["w"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"of_next_year": 0.5}, "of_next_year=0.5 .* not known"),
        ({"of_next_year": None}, None),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, None),
        ({"init_lora_weights": "gaussian"}, None),
        ({"fan_in_fan_out": True}, None),
    ],
)
def test_peft_fields_are_refused_or_harmless(config, why, tmp_path):
    up, down = pair(8, 8)
    state = {f"{UNET}.attn1.to_q.lora_A.weight": down, f"{UNET}.attn1.to_q.lora_B.weight": up}
    folder = peft_folder(tmp_path / "unet", config, state)
    header = json.dumps({f"unet.{key}": value for key, value in {"lora_alpha": 8, **config}.items()})
    file = written(tmp_path, {f"unet.{k}": v for k, v in state.items()}, {"lora_adapter_metadata": header})
    for path in (folder, folder / "adapter_model.safetensors", file):
        if why is None:
            assert apart(change(read_adapter(path, "sd15"), f"{UNET}.attn1.to_q"), product(up, down, 2)) == 0
        else:
            with pytest.raises(Refused, match=why):
                read_adapter(path, "sd15")


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_16"])
@pytest.mark.parametrize("rslora", [False, True])
def test_start_in_peft_folder_is_subtracted(init, rslora, tmp_path):
    """In PEFT the base became W − s·B₀A₀, so that the change of W is s·(BA − B₀A₀)."""
    (up, down), (up0, down0) = pair(8, 6), pair(8, 6, seed=1)
    name, config = f"{UNET}.attn1.to_q", {"init_lora_weights": init, "use_rslora": rslora}
    folder = peft_folder(
        tmp_path / "unet", config, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    )
    start = {f"{name}.lora_A.weight": down0, f"{name}.lora_B.weight": up0}
    peft_folder(folder / "initial_adapter", {"init_lora_weights": True, "use_rslora": rslora}, start)
    scale = 8 / 4**0.5 if rslora else 8 / 4
    want = product(up, down, scale) - product(up0, down0, scale)
    assert apart(change(read_adapter(folder, "sd15"), name), want) <= 1e-6  # the sum of two products


# ---------- dialects

H = 16
FLUX = {  # a module as another program names it: (its outputs as a multiple of H, layers and their shares)
    "transformer.double_blocks.0.img_attn.qkv.1": (1, {"transformer_blocks.0.attn.to_k": (0, 1)}),
    "lora_transformer_transformer_blocks_0_attn_to_k": (1, {"transformer_blocks.0.attn.to_k": (0, 1)}),
    "transformer.single_blocks.3.linear1.3": (4, {"single_transformer_blocks.3.proj_mlp": (0, 4)}),
    "transformer.img_in.proj": (1, {"x_embedder": (0, 1)}),
    "double_blocks.2.processor.proj_lora2": (1, {"transformer_blocks.2.attn.to_add_out": (0, 1)}),
    "diffusion_model.single_blocks.2.processor.proj_lora": (
        1,
        {"single_transformer_blocks.2.proj_out": (0, 1)},
    ),
    "double_blocks.2.processor.qkv_lora1": (
        3,
        {f"transformer_blocks.2.attn.to_{x}": (i, i + 1) for i, x in enumerate("qkv")},
    ),
    "single_blocks.2.processor.qkv_lora": (
        3,
        {f"single_transformer_blocks.2.attn.to_{x}": (i, i + 1) for i, x in enumerate("qkv")},
    ),
    "transformer.transformer_blocks.1.attn.to_added_qkv": (
        3,
        {f"transformer_blocks.1.attn.add_{x}_proj": (i, i + 1) for i, x in enumerate("qkv")},
    ),
    "base_model.model.single_blocks.0.linear1": (
        7,
        {
            **{f"single_transformer_blocks.0.attn.to_{x}": (i, i + 1) for i, x in enumerate("qkv")},
            "single_transformer_blocks.0.proj_mlp": (3, 7),
        },
    ),
    "lora_unet_double_blocks_0_txt_mlp_2": (1, {"transformer_blocks.0.ff_context.net.2": (0, 1)}),
    "model.diffusion_model.final_layer.linear": (1, {"proj_out": (0, 1)}),
    "transformer._orig_mod.x_embedder": None,
}


@pytest.mark.parametrize("module", [name for name, known in FLUX.items() if known])
@pytest.mark.parametrize(
    "suffixes", [("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")]
)
def test_flux_dialects(module, suffixes, tmp_path):
    """Each layer is its rows of the joined layer: ΔW = s·U[rows]·D."""
    if "processor" in module:
        suffixes = ("down.weight", "up.weight")
    share, layers = FLUX[module] or (0, {})
    up, down = pair(share * H, H)
    state = {
        f"{module}.{suffixes[0]}": down,
        f"{module}.{suffixes[1]}": up,
        f"{module}.alpha": torch.tensor(2.0),
    }
    adapter = read_adapter(written(tmp_path, state), "flux")
    assert {place.path for place in adapter.layers} == set(layers)
    for path, (first, last) in layers.items():
        assert apart(change(adapter, path), product(up[first * H : last * H], down, 0.5)) <= 1e-6
    assert (
        importing.main(
            [str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), "--family", "flux"]
        )
        == 0
    )


TEXT = {
    "clip_l.transformer.text_model.encoder.layers.0.mlp.fc2": "te1",
    "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc2": "te2",
    "clip_g.text_model.encoder.layers.0.mlp.fc2": "te2",
    "lora_te2_text_model_encoder_layers_0_mlp_fc2": "te2",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc2": "te2",
    "base_model.model.text_encoder.text_model.encoder.layers.0.mlp.fc2": "te1",
}


@pytest.mark.parametrize("module", TEXT)
def test_text_encoder_dialects(module, tmp_path):
    up, down = pair(8, 12)
    adapter = read_adapter(written(tmp_path, kohya(module, up, down)), "sdxl")
    path = "text_model.encoder.layers.0.mlp.fc2"
    assert apart(change(adapter, path, TEXT[module]), product(up, down)) == 0


def test_fused_attention_of_unet_is_split(tmp_path):
    (up, down), (up2, down2) = pair(3 * H, H), pair(2 * H, 12)
    state = kohya(f"unet.{UNET}.attn1.to_qkv", up, down, 8.0) | kohya(f"unet.{UNET}.attn2.to_kv", up2, down2)
    adapter = read_adapter(written(tmp_path, state), "sd15")
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        assert (
            apart(change(adapter, f"{UNET}.attn1.{name}"), product(up[i * H : (i + 1) * H], down, 2.0)) == 0
        )
    for i, name in enumerate(("to_k", "to_v")):
        assert apart(change(adapter, f"{UNET}.attn2.{name}"), product(up2[i * H : (i + 1) * H], down2)) == 0


# ---------- what is left out


UNUSED = {  # that no tool uses
    "lora_te1_text_model_embeddings_token_embedding.lora_embedding_A": torch.ones(4, 8),
    f"{SDXL}attn1_to_k.weight": torch.ones(64, 64),
    "bundle_emb.cat.clip_l": torch.ones(1, 8),
}
OTHERS = {  # that import and other files leave out
    f"{SDXL}norm1.w_norm": torch.ones(64),
    f"{SDXL}norm1.b_norm": torch.ones(64),
    f"{SDXL}attn1_to_out_0.diff_b": torch.ones(64),
}


def test_tools_list_what_is_left_out(tiny_xl, tmp_path, capsys):
    path = written(tmp_path, kohya(f"{SDXL}attn1_to_q", *pair(64, 64)) | UNUSED)
    line = (
        "2 of 5 tensors are used; left out: embedding × 2, full weight × 1, for example bundle_emb.cat.clip_l"
    )
    out = tmp_path / "out.safetensors"
    both = ["--style_lora_path", str(path), "--content_lora_path", str(path), "--model_path", str(tiny_xl)]
    both += ["--output_dir", str(tmp_path / "merged"), "--save_merged", "--skip_images"]
    for tool, words in (
        (importing, [str(path), str(out)]),
        (export, [str(path), str(out)]),
        (inspection, [str(path)]),
        (merge, both),
    ):
        assert tool.main(words) == 0
        printed = capsys.readouterr().out
        assert printed.rstrip().endswith(line) and printed.count("left out") == 1, printed
        with pytest.raises(Refused, match=r"--strict.* embedding × 2"):
            tool.main([*words, "--strict"])


def test_norm_layers_and_biases_are_listed_where_they_are_left_out(tmp_path, capsys):
    path = written(tmp_path, kohya(f"{SDXL}attn1_to_q", *pair(64, 64)) | OTHERS)
    for tool in (importing, export):
        assert tool.main([str(path), str(tmp_path / "out.safetensors")]) == 0
        assert re.search(
            r"2 of 5 tensors are used; left out: .* × 2, .* × 1, for example", capsys.readouterr().out
        )
        with pytest.raises(Refused, match="3 of 5 tensors"):
            tool.main([str(path), str(tmp_path / "out.safetensors"), "--strict"])


def test_failed_export_leaves_nothing(tmp_path, monkeypatch):
    path = written(tmp_path, kohya(f"{SDXL}attn1_to_q", *pair(64, 64)))
    monkeypatch.setattr(export.verify, "LIMITS", {})
    monkeypatch.setattr(export.verify, "check_export", lambda *_: (_ for _ in ()).throw(Refused("differs")))
    monkeypatch.setattr(importing, "difference", lambda *_: (_ for _ in ()).throw(Refused("differs")))
    for tool, words in ((export, ["--to", "kohya"]), (export, ["--to", "peft"]), (importing, [])):
        target = tmp_path / ("out" if "peft" in words else "out.safetensors")
        with pytest.raises(Refused, match="differs"):
            tool.main([str(path), str(target), *words])
        assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]


# ---------- U-Nets with another number of layers in a block


def one_layer_unet(kind: str = "sdxl"):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel.from_config({**make_tiny_sd.unet(kind, 4).config, "layers_per_block": 1})


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """A LoRA on each attention layer of an SDXL U-Net with one layer in a block; ΔW by the model's paths."""
    from networks import lora

    folder = tmp_path_factory.mktemp("one_layer")
    model = one_layer_unet()
    model.save_pretrained(folder / "base" / "unet")
    network = lora.create_network(1.0, 2, 2.0, None, [], model)
    network.apply_to([], model, False, True)
    for layer in network.layers():
        torch.nn.init.normal_(layer.up)
    network.save_weights(str(folder / "in.safetensors"), None, {"ss_base_model_version": "sdxl_base_v1-0"})
    names = {target.name: target.path for target in network.targets.values()}
    changes = {
        names[x.name]: product(x.up.detach().flatten(1), x.down.detach().flatten(1)) for x in network.layers()
    }
    return folder, changes


def test_one_layer_in_a_block_is_recognised(one_layer):
    folder, changes = one_layer
    for base in ((), BaseCheckpoint(folder / "base").places()):
        adapter = read_adapter(folder / "in.safetensors", base=base)
        assert adapter.per_block == 1 and {place.path for place in adapter.layers} == set(changes)
        assert max(apart(change(adapter, path), want) for path, want in changes.items()) <= 1e-6


def test_one_layer_in_a_block_is_inspected(one_layer):
    folder, changes = one_layer
    layers = inspection_report(folder / "in.safetensors")["layers"]
    assert {layer["path"] for layer in layers} == set(changes)


def test_shared_basis_has_original_names_of_one_layer_in_a_block(one_layer, tmp_path):
    """A file with diffusers' names gives the layers that a file with original names gives."""
    folder, changes = one_layer
    native = folder / "in.safetensors"
    assert export.main([str(native), str(tmp_path / "d.safetensors"), "--to", "diffusers"]) == 0
    updates, again = (read_updates(path).updates for path in (native, tmp_path / "d.safetensors"))
    assert updates.keys() == again.keys() and len(updates) == len(changes)
    for name, update in updates.items():
        assert apart(product(again[name].up, again[name].down), product(update.up, update.down)) <= 1e-6


def test_one_layer_in_a_block_goes_to_lycoris_tlora_and_back(tmp_path):
    """Its names are diffusers'; those of the native file are SDXL's original ones."""
    model = one_layer_unet()
    arguments = {"use_data_init": "True", "sig_type": "principal", "target": "attn1.to_q"}
    network = tlora.create_network(1.0, 2, 2.0, None, [], model, **arguments)
    network.apply_to([], model, False, True)
    for layer in network.layers():
        torch.nn.init.normal_(layer.get_parameter("lambda_layer"))
    facts = {"ss_base_model_version": "sdxl_base_v1-0", "lowrank.layers_per_block": "1"}
    source, target, native = (str(tmp_path / f"{name}.safetensors") for name in ("in", "out", "native"))
    network.save_weights(source, None, facts)
    assert export.main([source, target, "--to", "lycoris-tlora"]) == 0
    paths = {target.path for target in network.targets.values()}
    names = {key.partition(".")[0] for key in load_file(target)}
    assert names == {f"lycoris_{path.replace('.', '_')}" for path in paths}
    model.save_pretrained(tmp_path / "base" / "unet")
    assert importing.main([target, native, "--model", str(tmp_path / "base")]) == 0
    assert load_file(native).keys() == load_file(source).keys()


@pytest.mark.slow
def test_one_layer_in_a_block_is_converted(one_layer, tmp_path):
    """diffusers' names, and kohya's original ones again, with and without the model."""
    folder, changes = one_layer
    source, base = str(folder / "in.safetensors"), str(folder / "base")
    for words in (
        ["--to", "diffusers"],
        ["--to", "kohya"],
        ["--to", "kohya", "--model", base, "--verify", "layers"],
    ):
        target = tmp_path / "out.safetensors"
        assert export.main([source, str(target), *words]) == 0
        if "diffusers" in words:
            names = {key.removeprefix("unet.").rsplit(".lora_", 1)[0] for key in load_file(target)}
            assert names == set(changes)
        else:
            assert load_file(target).keys() == load_file(source).keys()
        again = read_adapter(target)
        assert again.per_block == 1
        assert max(apart(change(again, path), want) for path, want in changes.items()) <= 1e-6
    native = tmp_path / "native.safetensors"
    assert importing.main([str(tmp_path / "out.safetensors"), str(native)]) == 0
    assert load_file(native).keys() == load_file(source).keys()
    assert export.main([source, str(tmp_path / "merged"), "--to", "merged", "--model", base]) == 0
    path = "up_blocks.1.attentions.1.proj_out"
    W, merged = (
        load_file(where / "unet" / "diffusion_pytorch_model.safetensors")[f"{path}.weight"]
        for where in (folder / "base", tmp_path / "merged")
    )
    assert apart(merged.double() - W.double(), changes[path]) <= 1e-5  # fp32 sum


# ---------- merged checkpoints


def test_merged_checkpoint_has_fresh_metadata_and_no_infinities(tiny_xl, tmp_path, capsys):
    state = {
        k: v.bfloat16() if v.is_floating_point() else v
        for k, v in load_file(tiny_xl / "single" / "model.safetensors").items()
    }
    wide = next(k for k in state if k.startswith("first_stage_model") and state[k].dim() == 4)
    state[wide].view(-1)[0] = 1e5  # more than fp16 has
    stale = {
        "modelspec.hash_sha256": "0xd7",
        "sshs_model_hash": "aa",
        "sshs_legacy_hash": "bb",
        "modelspec.title": "Base",
        "modelspec.license": "x",
    }
    save_file(state, tmp_path / "base.safetensors", stale)
    adapter = written(tmp_path, kohya(f"{SDXL}attn1_to_q", *pair(64, 64)))
    target = tmp_path / "mine.safetensors"
    words = ["--to", "merged", "--model", str(tmp_path / "base.safetensors"), "--dtype", "fp16"]
    assert export.main([str(adapter), str(target), *words]) == 0
    assert wide in capsys.readouterr().out
    data = target.read_bytes()
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    with safe_open(target, "pt") as file:
        facts = file.metadata()
    assert facts["sshs_model_hash"] == digest and facts["modelspec.hash_sha256"] == f"0x{digest}"
    assert (facts["modelspec.title"], facts["modelspec.license"]) == (
        "mine",
        "x",
    ) and "sshs_legacy_hash" not in facts
    merged = load_file(target)
    assert merged[wide].dtype == torch.bfloat16 and torch.equal(merged[wide], state[wide])
    assert all(v.isfinite().all() for v in merged.values() if v.is_floating_point())


def test_text_projection_is_transposed_in_single_files(tiny_xl, tmp_path):
    """One adapter changes the folder and the single file of a model by the same ΔW."""
    up, down = pair(128, 128)
    adapter = written(tmp_path, kohya("lora_te2_text_projection", up, down, 4.0))
    folder, file = tmp_path / "folder", tmp_path / "file.safetensors"
    single = tiny_xl / "single" / "model.safetensors"
    for base, target in ((tiny_xl, folder), (single, file)):
        assert export.main([str(adapter), str(target), "--to", "merged", "--model", str(base)]) == 0
    key = "conditioner.embedders.1.model.text_projection"
    have = load_file(file)[key].double() - load_file(single)[key].double()
    assert apart(have.T, product(up, down)) <= 1e-6  # a sum in fp32 of numbers of one size
    there = load_file(folder / "text_encoder_2" / "model.safetensors")["text_projection.weight"]
    assert torch.equal(there.T, load_file(file)[key])


def test_text_layers_on_a_transformer_name_the_way_out(tmp_path):
    key = "model.diffusion_model.double_blocks.0.img_attn.proj.weight"
    save_file({key: torch.randn(H, H)}, tmp_path / "base.safetensors")
    state = kohya("lora_unet_double_blocks_0_img_attn_proj", *pair(H, H))
    path = written(tmp_path, state | kohya("lora_te1_text_model_encoder_layers_0_mlp_fc1", *pair(12, 8)))
    words = [
        str(path),
        str(tmp_path / "out.safetensors"),
        "--to",
        "merged",
        "--model",
        str(tmp_path / "base.safetensors"),
    ]
    with pytest.raises(Refused, match="no such encoder; leave them out with --parts unet"):
        export.main(words)
    assert export.main([*words, "--parts", "unet"]) == 0


# ---------- DoRA with a length for each input


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_lengths_of_inputs_are_merged_exactly(kernel, tmp_path):
    """LyCORIS' own layer (wd_on_output=False) is the oracle: W′ = (W + ΔW)·m/‖W + ΔW‖ by columns."""
    from lycoris.modules.locon import LoConModule

    torch.manual_seed(0)
    host = torch.nn.Conv2d(8, 12, 3, padding=1) if kernel else torch.nn.Linear(8, 12)
    theirs = LoConModule("m", host, 1.0, 4, 2.0, weight_decompose=True, wd_on_out=False)
    torch.nn.init.normal_(theirs.lora_up.weight)
    theirs.dora_scale.data *= 1.5
    name = "mid_block.resnets.0.conv1" if kernel else f"{UNET}.attn1.to_q"
    module = "lora_unet_" + name.replace(".", "_")
    state = {
        f"{module}.{key}": value.detach() for key, value in theirs.state_dict().items() if "org" not in key
    }
    adapter = read_adapter(written(tmp_path, state), "sd15")
    layer = adapter.layers[LayerPath("unet", name)]
    assert layer.by_input
    want = theirs.get_merged_weight()[0].detach().double().flatten(1)
    assert apart(layer.changed(host.weight.detach().double().flatten(1)), want) <= 1e-6
    with pytest.raises(Refused, match="wd_on_output=False"):
        importing.main(
            [str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), "--family", "sd15"]
        )
    (tmp_path / "base" / "unet").mkdir(parents=True)
    save_file(
        {f"{name}.weight": host.weight.detach()},
        tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors",
    )
    words = ["--to", "merged", "--model", str(tmp_path / "base")]
    assert export.main([str(tmp_path / "in.safetensors"), str(tmp_path / "merged"), *words]) == 0
    merged = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")[f"{name}.weight"]
    assert apart(merged.double().flatten(1), want) <= 1e-6
    assert (
        export.main(
            [str(tmp_path / "in.safetensors"), str(tmp_path / "kohya.safetensors"), "--family", "sd15"]
        )
        == 0
    )
    assert torch.equal(
        load_file(tmp_path / "kohya.safetensors")[f"{module}.dora_scale"], state[f"{module}.dora_scale"]
    )
