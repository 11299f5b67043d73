"""Exports: every method, family and format, read back by the program that the format is of."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import files
import pytest
import torch
from adapter_files import _flux, _random
from compatibility import FAMILIES, METHODS, READERS, refusal
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from files import FLUX_DEV
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toys import SHIPPED

from lowrank.cli import export
from lowrank.config.tools import EXPORT, EXTRACT_LORA, IMPORT, INSPECT
from lowrank.config.tools import FORMATS as EXPORTED
from lowrank.errors import Refused
from lowrank.formats import base_checkpoint, merging, verify
from lowrank.formats.delta import Delta, delta_of, distance
from lowrank.formats.read import Adapter, read_adapter
from lowrank.formats.resize import RankRule, resize
from lowrank.formats.write import FORMATS, only, write
from lowrank.formats.writers import Choices
from lowrank.models import published
from lowrank.naming import flux as flux_names
from lowrank.naming import places
from lowrank.naming import unet as unet_names
from lowrank.naming.places import LayerPath
from tools import make_compatibility


@pytest.fixture(scope="module")
def saved(tmp_path_factory, bases):
    """A function that gives the native file of a family and method, made once."""
    folder, made = tmp_path_factory.mktemp("native"), {}

    def get(family: str, method: str):
        if (family, method) not in made:
            made[family, method] = files.save(folder, family, method, bases)
        return made[family, method]

    return get


class Weights:
    """A base whose weights come from a model in memory."""

    def __init__(self, model):
        self._layers = dict(model.named_modules())

    def weight(self, place):
        return self._layers[place.path].weight.float().flatten(1)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_export_matrix_read_back(family, method, to, saved, tmp_path):
    adapter = read_adapter(saved(family, method))
    target = tmp_path / ("out" if FORMATS[to].folder else "out.safetensors")
    choices = Choices(base=Weights(files.denoiser(family)), flat_clip=export.flat_clip())
    if (method, to) == ("dora", "diffusers"):
        write(adapter, to, target, choices)
        with pytest.raises(Refused, match="does not load the lengths of their rows"):
            verify.check_export(adapter, to, target, choices)
    if to in ("lycoris", "qrlora") or (method, to) == ("dora", "diffusers"):
        adapter = only(adapter, "unet")
    if why := refusal(family, method, to):
        with pytest.raises(Refused, match=why):
            write(adapter, to, target, choices)
        return
    written = write(adapter, to, target, choices)
    checked = verify.check_export(adapter, to, target, choices)  # refuses missing and unexpected keys
    assert checked and max(one.worst for one in checked) <= 1e-5
    assert checked[0].reader == READERS.get(to, "our own reader")
    if to in ("kohya", "lycoris"):
        state = load_file(written[0])
        downs = [key for key in state if key.endswith("lora_down.weight")]
        assert downs and all(key.replace("lora_down.weight", "alpha") in state for key in downs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["dora", "qrlora"])
def test_forward_verification_of_diffusers_model(family, method, saved, bases, tmp_path):
    adapter, model = only(read_adapter(saved(family, method)), "unet"), files.denoiser(family)
    plain = files.answer(family, model)
    live = files.network(family, method, model, None, bases)
    live.load_weights(str(saved(family, method)))
    ours = files.answer(family, model)
    live.restore()
    write(adapter, "diffusers", tmp_path / "out.safetensors", Choices())
    verify.load_by_diffusers(tmp_path / "out.safetensors", adapter, model)
    theirs = files.answer(family, model)
    assert (ours - plain).norm() / plain.norm() > 1e-2  # an adapter without effect would agree as well
    assert (theirs - ours).norm() / ours.norm() <= 1e-5


def test_broken_export_is_refused(saved, tmp_path):
    adapter, path = only(read_adapter(saved("sd15", "lora")), "unet"), tmp_path / "out.safetensors"
    for to in ("kohya", "diffusers", "lycoris"):
        write(adapter, to, path, Choices())
        state = load_file(path)
        key = next(key for key in state if key.endswith(("lora_up.weight", "lora_B.weight")))
        save_file({**state, key: state[key] * 1.001}, path)
        with pytest.raises(Refused, match="differs from the adapter"):
            verify.check_export(adapter, to, path, Choices())
    write(adapter, "kohya", path, Choices())
    save_file({key.replace("mid_block", "middle"): v for key, v in load_file(path).items()}, path)
    with pytest.raises(Refused, match=r"lycoris\.kohya finds"):
        verify.check_export(adapter, "kohya", path, Choices())


# ---------- names


def _meta(family: str):
    with torch.device("meta"):
        if family == "flux":
            return FluxTransformer2DModel(**FLUX_DEV)
        return UNet2DConditionModel.from_config(published.configurations(family)["unet"])


def _layers(model):
    return [path for path, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]


# kohya_contract §2, one row of each table
EXAMPLES = {
    "sd15": {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (
            "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        ),
        "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj": (
            "up_blocks_3_attentions_2_transformer_blocks_0_ff_net_0_proj"
        ),
        "down_blocks.2.downsamplers.0.conv": "down_blocks_2_downsamplers_0_conv",
        "mid_block.resnets.1.time_emb_proj": "mid_block_resnets_1_time_emb_proj",
    },
    "sdxl": {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q"
        ),
        "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
        "down_blocks.1.downsamplers.0.conv": "input_blocks_6_0_op",
        "mid_block.attentions.0.transformer_blocks.9.ff.net.2": (
            "middle_block_1_transformer_blocks_9_ff_net_2"
        ),
        "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
        "up_blocks.0.attentions.2.proj_in": "output_blocks_2_1_proj_in",
        "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
        "up_blocks.2.resnets.0.conv_shortcut": "output_blocks_6_0_skip_connection",
    },
    "flux": {
        "transformer_blocks.18.norm1_context.linear": "double_blocks_18_txt_mod_lin",
        "transformer_blocks.0.attn.to_v": "double_blocks_0_img_attn_qkv",
        "transformer_blocks.0.attn.add_q_proj": "double_blocks_0_txt_attn_qkv",
        "transformer_blocks.3.ff_context.net.0.proj": "double_blocks_3_txt_mlp_0",
        "single_transformer_blocks.37.proj_mlp": "single_blocks_37_linear1",
        "single_transformer_blocks.37.proj_out": "single_blocks_37_linear2",
        "single_transformer_blocks.0.norm.linear": "single_blocks_0_modulation_lin",
        "proj_out": "final_layer_linear",
        "norm_out.linear": "final_layer_adaLN_modulation_1",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in_out_layer",
    },
}
# names that kohya's trainer gives the whole of each model, with convolutions; FLUX with its ten top layers
COUNTS = {"sd15": 278, "sdxl": 788, "flux": 304 + 10}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_full_size_models(family):
    """kohya's names are those of the contract's tables, and each leads back to its place."""
    paths = _layers(_meta(family))
    told = {path: places.kohya_layer(LayerPath("unet", path), family) for path in paths}
    for path, name in EXAMPLES[family].items():
        assert told[path] == f"lora_unet_{name}"
    for path, name in told.items():
        found = [place.path for place, _ in places.places(name)]
        assert path in found and (len(found) == 1 or flux_names.joined_rows(path).total > 1)
        for other in (
            places.lycoris_layer(LayerPath("unet", path)),
            places.diffusers_layer(LayerPath("unet", path), family),
        ):
            assert [place.path for place, _ in places.places(other)] == [path]
    inside = [
        p for p in paths if family == "flux" or ".attentions." in p or "resnets" in p or "samplers" in p
    ]
    assert len({told[path] for path in inside}) == COUNTS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_maps_every_exported_key(family):
    """ComfyUI's map (comfy/lora.py, model_lora_keys_unet): `lora_unet_` and the flat path of each weight in
    its own model, which has the original names, and for a U-Net `lora_unet_` and diffusers' path too."""
    model = _meta(family)
    own = _layers(model)
    if family == "flux":
        theirs = {flux_names.joined_rows(path).module for path in own}
    else:
        theirs = {unet_names.unet_name(path, unet_names.Blocks.of(model)) for path in own} | set(own)
    comfy = {"lora_unet_" + path.replace(".", "_") for path in theirs}
    comfy |= {"lycoris_" + path.replace(".", "_") for path in own}
    exported = {places.kohya_layer(LayerPath("unet", path), family) for path in own}
    exported |= {places.lycoris_layer(LayerPath("unet", path)) for path in own}
    assert exported <= comfy


@pytest.mark.parametrize(
    ("family", "part", "name"),
    [
        ("sd15", "te1", "lora_te_"),
        ("sdxl", "te1", "lora_te1_"),
        ("sdxl", "te2", "lora_te2_"),
        ("flux", "te1", "lora_te1_"),
    ],
)
def test_names_of_text_encoders(family, part, name):
    place = LayerPath(part, "text_model.encoder.layers.11.self_attn.out_proj")
    flat = f"{name}text_model_encoder_layers_11_self_attn_out_proj"
    assert places.kohya_layer(place, family) == flat
    assert places.places(flat) == [(place, None)]
    t5 = LayerPath("te3", "encoder.block.3.layer.1.DenseReluDense.wi_0")
    assert places.places(places.kohya_layer(t5, "flux")) == [(t5, None)]


# ---------- FLUX's joined layers


def test_joined_layers_of_unequal_parts(tmp_path):
    block = "single_transformer_blocks.0"
    adapter = _flux(
        {
            f"{block}.attn.to_q": _random(8, 6, 2, 0.5),
            f"{block}.attn.to_v": _random(8, 6, 3, 2.0, 1),
            f"{block}.proj_mlp": _random(32, 6, 1, 0.25, 2),
            "norm_out.linear": _random(16, 6, 2),
        }
    )
    path = tmp_path / "out.safetensors"
    write(adapter, "kohya", path, Choices())
    state = load_file(path)
    joined = {k: v for k, v in state.items() if "linear1" in k}
    assert {k.partition(".")[2]: tuple(v.shape) for k, v in joined.items()} == {
        "lora_down.weight": (6, 6),
        "lora_up.weight": (56, 6),
        "alpha": (),
    }
    up, down = (
        joined["lora_unet_single_blocks_0_linear1.lora_up.weight"],
        joined["lora_unet_single_blocks_0_linear1.lora_down.weight"],
    )
    whole = float(joined["lora_unet_single_blocks_0_linear1.alpha"]) / 6 * up @ down
    assert not whole[8:16].any()  # to_k is not adapted
    torch.testing.assert_close(whole[16:24], adapter.layers[LayerPath("unet", f"{block}.attn.to_v")].delta())
    swapped = "lora_unet_final_layer_adaLN_modulation_1"
    last = 0.5 * state[f"{swapped}.lora_up.weight"] @ state[f"{swapped}.lora_down.weight"]
    torch.testing.assert_close(
        torch.cat(last.chunk(2)[::-1]), adapter.layers[LayerPath("unet", "norm_out.linear")].delta()
    )
    back = read_adapter(path)
    assert verify.difference(adapter, back) <= 1e-6
    assert {one.rank for one in back.layers.values()} == {2, 3, 1}  # each its own again


@pytest.mark.parametrize(
    "name", ["single_transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.add_k_proj"]
)
@pytest.mark.slow
def test_diffusers_reads_partly_adapted_joined_layer(name, tmp_path):
    """Zeros for the layers beside it are no unexpected keys: a model has them."""
    adapter = _flux({name: _random(3072, 3072, 1, 0.5)})
    write(adapter, "kohya", tmp_path / "out.safetensors", Choices())
    told = verify.check_export(adapter, "kohya", tmp_path / "out.safetensors", Choices())
    assert {one.reader: one.layers for one in told}["diffusers"] == 1
    small = _flux({"single_transformer_blocks.0.proj_mlp": _random(32, 8, 1, 0.5)})  # unknown to diffusers
    assert "diffusers" not in verify.readers("kohya", small, Choices())


def test_shared_down_is_written_once(tmp_path):
    """A joined layer that is parted and joined again has the rank it had."""
    wide = _random(24, 6, 4)
    state = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": wide.down,
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": wide.up,
        "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(2.0),
    }
    save_file(state, tmp_path / "in.safetensors")
    parted = read_adapter(tmp_path / "in.safetensors")
    assert sorted(place.path for place in parted.layers) == [
        f"transformer_blocks.0.attn.to_{one}" for one in "kqv"
    ]
    write(parted, "kohya", tmp_path / "out.safetensors", Choices())
    again = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(again[key], value) for key, value in state.items())


def test_diffusers_reads_kohya_flux_at_full_width(tmp_path):
    """It knows no other width; two blocks at rank 2 are small."""
    double, single = "transformer_blocks.0.attn", "single_transformer_blocks.0"
    names = {f"{double}.to_{one}": 3072 for one in "qkv"} | {
        f"{double}.add_{one}_proj": 3072 for one in "qkv"
    }
    names |= {f"{single}.attn.to_{one}": 3072 for one in "qk"} | {f"{single}.proj_mlp": 12288}
    names |= {f"{single}.norm.linear": 9216}
    adapter = _flux({path: _random(outs, 3072, 2, 0.5, i) for i, (path, outs) in enumerate(names.items())})
    path = tmp_path / "out.safetensors"
    write(adapter, "kohya", path, Choices())
    state, _, _ = verify._diffusers_state(path, adapter)
    for place, layer in adapter.layers.items():
        up, down = (state[f"transformer.{place.path}.lora_{which}.weight"] for which in "BA")
        assert distance(layer, Delta(up, down, 1.0)) <= 1e-6 * layer.norm()


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_mixed_alphas_of_attention_layers_reach_diffusers(family, saved, tmp_path):
    """diffusers reads one alpha for all attention layers of a kohya file: `writers._with_common_alpha`."""
    adapter = only(read_adapter(saved(family, "lora")), "unet")
    alphas = (0.5, 1.0, 3.0)
    layers = {
        place: layer._replace(scale=alphas[index % 3] / layer.rank)
        for index, (place, layer) in enumerate(adapter.layers.items())
    }
    mixed, target = replace(adapter, layers=layers), tmp_path / "out.safetensors"
    write(mixed, "kohya", target, Choices())
    checked = verify.check_export(mixed, "kohya", target, Choices())
    assert "diffusers" in {result.reader for result in checked}
    state = load_file(target)
    assert len({float(value) for key, value in state.items() if key.endswith(".alpha")}) == 1


def test_mixed_alphas_outside_of_attention_are_written_as_they_are(saved, tmp_path):
    adapter = only(read_adapter(saved("sd15", "lora")), "unet")
    other = next(place for place in adapter.layers if ".attn" not in place.path)
    layers = {**adapter.layers, other: adapter.layers[other]._replace(scale=0.125)}
    mixed, target = replace(adapter, layers=layers), tmp_path / "out.safetensors"
    write(mixed, "kohya", target, Choices())
    state = load_file(target)
    assert len({float(value) for key, value in state.items() if key.endswith(".alpha")}) == 2
    assert verify.check_export(mixed, "kohya", target, Choices())


# ---------- DoRA's two conventions


def test_lengths_in_both_norm_conventions(saved, tmp_path):
    """m·(W + ΔW)/‖W + ΔW‖, as LyCORIS divides (by ‖W + ΔW‖) and as ComfyUI does for outputs (by ‖W‖)."""
    adapter = only(read_adapter(saved("sdxl", "dora")), "unet")
    base = Weights(files.denoiser("sdxl"))
    for norm in ("merged", "base"):
        write(adapter, "kohya", tmp_path / "out.safetensors", Choices(None, norm, base))
        state = load_file(tmp_path / "out.safetensors")
        for place, layer in adapter.layers.items():
            name = places.kohya_layer(place, "sdxl")
            W, scale = base.weight(place), state[f"{name}.dora_scale"]
            assert scale.shape == (len(W), *(1,) * (len(layer.kernel) + 1))
            dW = layer.delta()
            divisor = torch.linalg.vector_norm(W + dW if norm == "merged" else W, dim=1)
            theirs = (W + dW) * (scale.flatten() / divisor)[:, None]
            torch.testing.assert_close(theirs, layer.changed(W), rtol=1e-5, atol=1e-6)
    with pytest.raises(Refused, match="give it with --model"):
        write(adapter, "kohya", tmp_path / "out.safetensors", Choices(None, "base", None))


def test_joined_dora_layer_needs_base(saved, tmp_path):
    adapter = only(read_adapter(saved("flux", "dora")), "unet")
    part = {p: one for p, one in adapter.layers.items() if not p.path.endswith("proj_mlp")}
    adapter = Adapter("probe", "flux", part)
    with pytest.raises(Refused, match="proj_mlp has no DoRA magnitude"):
        write(adapter, "kohya", tmp_path / "out.safetensors", Choices())
    base = Weights(files.denoiser("flux"))
    write(adapter, "kohya", tmp_path / "out.safetensors", Choices(base=base))
    assert verify.check_export(adapter, "kohya", tmp_path / "out.safetensors", Choices(base=base))
    scale = load_file(tmp_path / "out.safetensors")["lora_unet_single_blocks_0_linear1.dora_scale"]
    own = base.weight(LayerPath("unet", "single_transformer_blocks.0.proj_mlp")).norm(dim=1)
    torch.testing.assert_close(scale[96:, 0], own)


# ---------- metadata, precision, rank


def test_metadata_read_by_web_interfaces(saved, tmp_path):
    for family, version, module in (
        ("sd15", "sd_v1", "networks.lora"),
        ("sdxl", "sdxl_base_v1-0", "networks.lora"),
        ("flux", "flux1", "networks.lora_flux"),
    ):
        write(read_adapter(saved(family, "delta_r")), "kohya", tmp_path / "out.safetensors", Choices())
        with safe_open(tmp_path / "out.safetensors", "pt") as file:
            told = file.metadata()
        assert told["ss_base_model_version"] == version and told["ss_network_module"] == module
        assert told["ss_steps"] == "7" and told["modelspec.title"] == "probe"
        assert told["modelspec.architecture"].endswith("/lora") and len(told["sshs_model_hash"]) == 64
        assert told["lowrank.exported_from"] == "delta_r" and "lowrank.method" not in told
        assert json.loads(told["ss_network_args"]) == {}


@pytest.mark.parametrize(
    ("name", "dtype", "most"), [("bf16", torch.bfloat16, 1e-2), ("fp16", torch.float16, 2e-3)]
)
def test_half_precision_rounding_is_reported(name, dtype, most, saved, tmp_path, capsys):
    path = tmp_path / "out.safetensors"
    assert export.main([str(saved("flux", "lora")), str(path), "--dtype", name]) == 0
    state = load_file(path)
    assert {v.dtype for v in state.values() if v.dim()} == {dtype}
    assert {v.dtype for v in state.values() if not v.dim()} == {torch.float32}  # alphas stay exact
    told = float(capsys.readouterr().out.split("at most ")[1].split(" ")[0])
    assert 1e-5 < told < most


def test_rank_reduction_reports_its_loss(saved, tmp_path, capsys):
    adapter = read_adapter(saved("sd15", "qrlora"))
    small, loss = resize(adapter, RankRule(most=3))
    assert {one.rank for one in small.layers.values()} == {3}
    apart = {p: distance(one, small.layers[p]) for p, one in adapter.layers.items()}
    whole = {p: one.norm() for p, one in adapter.layers.items()}
    together = math.sqrt(sum(d**2 for d in apart.values()) / sum(n**2 for n in whole.values()))
    assert loss.together == pytest.approx(together, rel=1e-4)
    assert loss.worst == pytest.approx(max(apart[p] / whole[p] for p in apart), rel=1e-4)
    place = next(iter(apart))
    best = torch.linalg.svdvals(adapter.layers[place].delta().double())[3:].square().sum().sqrt()
    assert apart[place] == pytest.approx(float(best), rel=1e-4)  # Eckart–Young: none is nearer
    same, none = resize(adapter, RankRule(most=8))
    assert none.together == 0 and same.layers == adapter.layers
    assert export.main([str(saved("sd15", "qrlora")), str(tmp_path / "o.safetensors"), "--rank", "3"]) == 0
    assert f"rank 3: {loss.together:.2%} of ‖ΔW‖ is lost" in capsys.readouterr().out


# ---------- merged checkpoints


@pytest.mark.parametrize("method", ["dora", "qrlora"])
def test_merged_folder_and_file_equal_live_adapter(method, tiny_sdxl, bases, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl / "unet")
    live = files.network("sdxl", method, unet, None, bases)
    live.save_weights(str(tmp_path / "in.safetensors"), None, {})
    ours = files.answer("sdxl", unet)
    adapter = read_adapter(tmp_path / "in.safetensors")
    hashed = (tiny_sdxl / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    lost = merging.merge(base_checkpoint.BaseCheckpoint(tiny_sdxl), adapter.layers, tmp_path / "merged", {})
    assert lost <= 1e-6  # fp32
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged" / "unet")
    assert (files.answer("sdxl", merged) - ours).norm() / ours.norm() <= 1e-5
    assert (tiny_sdxl / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == hashed
    assert (tmp_path / "merged" / "model_index.json").is_file()
    single = tiny_sdxl / "single" / "model.safetensors"
    merging.merge(
        base_checkpoint.BaseCheckpoint(single), adapter.layers, tmp_path / "one.safetensors", {"a": "b"}
    )
    theirs, before = load_file(tmp_path / "one.safetensors"), load_file(single)
    assert theirs.keys() == before.keys()
    changed = {key for key in theirs if not torch.equal(theirs[key], before[key])}
    blocks = unet_names.Blocks.of(unet)
    state = merged.state_dict()
    wanted = {
        f"model.diffusion_model.{unet_names.unet_name(p.path, blocks)}.weight": p.path for p in adapter.layers
    }
    assert changed == wanted.keys()
    for key, path in wanted.items():
        torch.testing.assert_close(theirs[key].reshape(-1), state[f"{path}.weight"].reshape(-1))


def test_merge_reads_shards_and_rounds_once(tmp_path, monkeypatch):
    """Rows at a time: never more than a piece, whatever a tensor's size; the sum is in fp32."""
    W = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    layer = "model.diffusion_model.double_blocks.0.img_attn.qkv.weight"
    other = {"model.diffusion_model.img_in.weight": torch.ones(3, 5), "scalar": torch.tensor(2.0)}
    save_file({layer: W.bfloat16(), **other}, tmp_path / "base.safetensors", {"kept": "yes"})
    adapter = {LayerPath("unet", "transformer_blocks.0.attn.to_k"): _random(32, 64, 2, 0.01)}
    monkeypatch.setattr(merging, "PIECE", 640)
    most, rows = [], merging.TensorFile.rows

    def watched(self, *args):
        most.append(rows(self, *args).numel())
        return rows(self, *args)

    monkeypatch.setattr(merging.TensorFile, "rows", watched)
    target = tmp_path / "out.safetensors"
    lost = merging.merge(
        base_checkpoint.BaseCheckpoint(tmp_path / "base.safetensors"), adapter, target, {}, strength=0.5
    )
    assert max(most) == 640
    state = load_file(target)
    exact = W.bfloat16().float()[32:64] + 0.5 * next(iter(adapter.values())).delta()
    assert torch.equal(state[layer][32:64], exact.bfloat16())
    assert torch.equal(state[layer][:32], W.bfloat16()[:32]) and torch.equal(
        state[layer][64:], W.bfloat16()[64:]
    )
    assert torch.equal(state["scalar"], other["scalar"])
    change = 0.5 * next(iter(adapter.values())).delta()
    assert lost == pytest.approx(float((exact.bfloat16().float() - exact).norm() / change.norm()), rel=1e-3)
    with safe_open(target, "pt") as file:
        assert file.metadata() == {"kept": "yes"}


def test_merge_into_base_errors(saved, tiny_sd, tmp_path):
    base = base_checkpoint.BaseCheckpoint(tiny_sd)
    adapter = read_adapter(saved("flux", "lora"))
    with pytest.raises(Refused, match="is not in"):
        merging.merge(base, adapter.layers, tmp_path / "out", {})
    wrong = {LayerPath("unet", "mid_block.attentions.0.proj_in"): _random(8, 8, 2)}
    with pytest.raises(Refused, match="8×8 in the adapter"):
        merging.merge(base, wrong, tmp_path / "out", {})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    right = {LayerPath("unet", "mid_block.attentions.0.proj_in"): _random(64, 64, 2)}
    with pytest.raises(Refused, match="exists already"):
        merging.merge(base, right, tmp_path / "full", {})
    with pytest.raises(Refused, match="never written"):
        one = base_checkpoint.BaseCheckpoint(tiny_sd / "single" / "model.safetensors")
        merging.merge(one, right, tiny_sd / "single" / "model.safetensors", {})
    key = "model.diffusion_model.double_blocks.0.img_attn.proj.weight"
    for extra, dtype in (
        ({key.replace("weight", "scale_weight"): torch.ones(1)}, torch.float8_e4m3fn),
        ({}, torch.int8),
    ):
        save_file({key: torch.ones(8, 8).to(dtype), **extra}, tmp_path / "packed.safetensors")
        packed = base_checkpoint.BaseCheckpoint(tmp_path / "packed.safetensors")
        with pytest.raises(Refused, match="is quantised"):
            merging.merge(
                packed,
                {LayerPath("unet", "transformer_blocks.0.attn.to_out.0"): _random(8, 8, 2)},
                tmp_path / "o.safetensors",
                {},
            )
    assert not (tmp_path / "out").exists() and not (tmp_path / "o.safetensors").exists()


# ---------- the command


def test_export_command_errors(saved, tmp_path):
    source, target = str(saved("sd15", "lora")), str(tmp_path / "out.safetensors")
    for words, why in (
        (["--to", "merged"], "needs the base model"),
        (["--rank", "0"], "below 1"),
        (["--to", "lycoris"], "--parts unet"),
        (["--to", "peft"], "writes a folder"),
        (["--strength", "2"], "for --to merged"),
        (["--base", "flux"], "which is not in flux; leave --base out"),
        (["--base", "sdxl"], "which is not in sdxl"),
        (["--to", "lycoris-tlora", "--rank", "2"], "--rank has no effect with --to lycoris-tlora"),
        (["--to", "qrlora"], "is for FLUX"),
    ):
        with pytest.raises(Refused, match=why):
            export.main([source, target, *words])
    with pytest.raises(Refused, match=r"no \.safetensors name"):
        export.main([source, str(tmp_path / "out.bin")])
    with pytest.raises(SystemExit, match="2"):  # a word that is no number, as in every command line here
        export.main([source, target, "--strength", "nan", "--to", "merged", "--model", "none"])
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("lora", []),
        ("tlora", ["--at-timestep", "300"]),  # goes by way of another file
        ("tlora", ["--to", "lycoris-tlora"]),
        ("lora", ["--to", "merged", "--model", "none"]),
        ("effilora", ["--calibrate", "none", "--model", "none"]),
    ],
)
def test_export_onto_adapter_path_is_refused(method, words, saved, tmp_path):
    (tmp_path / "in.safetensors").write_bytes(saved("sd15", method).read_bytes())
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "in.safetensors")
    for name in ("in", "link"):
        with pytest.raises(Refused, match="is the adapter itself"):
            export.main([str(tmp_path / "in.safetensors"), str(tmp_path / f"{name}.safetensors"), *words])
    assert (tmp_path / "in.safetensors").read_bytes() == saved("sd15", method).read_bytes()


def test_merge_onto_base_path_is_refused(saved, tiny_sd):
    words = [str(saved("sd15", "lora")), str(tiny_sd / "new"), "--to", "merged", "--model", str(tiny_sd)]
    with pytest.raises(Refused, match="is inside the base model"):
        export.main(words)
    assert not (tiny_sd / "new").exists()


def test_too_many_layers_are_not_verified_elsewhere(saved, tmp_path, capsys, monkeypatch):
    """diffusers and PEFT take minutes for 30000 layers."""
    monkeypatch.setattr(verify, "MANY", 3)
    for to, said in (("kohya", "read back by our own reader: 31 layers"), ("peft", "not read back")):
        target = tmp_path / ("out" if to == "peft" else "out.safetensors")
        assert export.main([str(saved("sd15", "lora")), str(target), "--to", to]) == 0
        assert said in capsys.readouterr().out


@pytest.mark.parametrize("method", ["delta_r", "tlora"])  # the second one masked at the probe's timestep
def test_forward_verification_of_command(method, tiny_sd, bases, tmp_path, capsys):
    unet = UNet2DConditionModel.from_pretrained(tiny_sd / "unet")
    made = files.network("sd15", method, unet, None, bases)
    made.save_weights(str(tmp_path / "in.safetensors"), None, {})
    words = [str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), "--model", str(tiny_sd)]
    assert export.main(words) == 0
    out = capsys.readouterr().out
    assert "read back by lycoris.kohya" in out
    assert float(out.split("one forward of the model: ")[1].split(" ")[0]) <= 1e-5


def test_experts_are_refused(tmp_path):
    state = {f"transformer.transformer_blocks.0.attn.to_q.{k}": torch.ones(3, 4) for k in ("lora_A.weight",)}
    state["transformer.transformer_blocks.0.attn.to_q.router"] = torch.ones(3, 4)
    with pytest.raises(Refused, match="3 experts and a router"):
        delta_of("m", {"down": torch.ones(4, 4), "up": torch.ones(3, 4, 4), "router": torch.ones(3, 4)}, "f")


def test_gated_copy_keeps_rank_order():
    """Component i of a gated method with an initial copy is the neighbours 2i and 2i + 1: a mask of the first
    2n columns is the method with n ranks open."""
    from toys import network, probes

    model = torch.nn.Linear(24, 16)
    method = probes()["gate+copy"]
    layer = network("gate+copy", torch.nn.Sequential(model)).layers()[0]
    with torch.no_grad():
        layer.up.add_(torch.randn_like(layer.up))
        layer.down.mul_(1.5)
    one = delta_of("m", layer.tensors(), "the file", method)
    for n in (1, 3):
        U, D = layer.up.detach(), layer.down.detach()
        copy = layer.get_buffer("q")[:, :n] @ layer.get_buffer("base_r")[:n]
        want = layer.scale * (U[:, :n] @ D[:n] - copy)
        torch.testing.assert_close(one.scale * one.up[:, : 2 * n] @ one.down[: 2 * n], want)


def test_compatibility_pages_are_current():
    """Every method and flag is on a page; the compatibility table is that of these tests."""
    assert make_compatibility.PAGE.read_text(encoding="utf-8") == make_compatibility.page()
    assert set(SHIPPED) == set(METHODS), "give each method a row in tests/support/compatibility.py"
    text = (make_compatibility.ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    positional = ("--source", "--target", "--tuned", "--files")
    for made in (EXPORT, EXTRACT_LORA, IMPORT, INSPECT):
        flags = [flag for spec in made.specs.values() for flag in spec.names if flag not in positional]
        assert flags and all(f"`{flag}`" in text for flag in flags)
    assert all(f"`{to}`" in text for to in FORMATS)
    assert set(FORMATS) < set(EXPORTED), "the formats that the flag --to takes are those that are written"
