"""Other programs' adapters as native files, and files that are out to harm."""

from __future__ import annotations

import json
import pickle
import time

import files
import pytest
import torch
from adapter_files import HOSTILE, A, B, Code, _flux, _random, whole
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from lowrank.adapter_file import read_adapter_file
from lowrank.cli import export, importing, inspection
from lowrank.combine.mixture import read_mixture
from lowrank.errors import Refused
from lowrank.formats import base_checkpoint
from lowrank.formats.delta import Delta, distance
from lowrank.formats.read import read_adapter
from lowrank.formats.verify import difference
from lowrank.formats.write import FORMATS, only, write
from lowrank.formats.writers import Choices
from lowrank.naming import keys
from lowrank.naming.flux_join import join_layers, strength
from lowrank.naming.places import LayerPath
from lowrank.tensors import read_tensors
from networks import lora


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft", "lycoris"])
@pytest.mark.parametrize(
    ("family", "method"), [("sd15", "lora"), ("sdxl", "dora"), ("flux", "dora"), ("flux", "delta_r")]
)
@pytest.mark.slow
def test_export_import_round_trip(family, method, to, bases, tmp_path, capsys):
    adapter = read_adapter(files.save(tmp_path, family, method, bases, text=to != "lycoris"))
    target = tmp_path / ("out" if FORMATS[to].folder else "out.safetensors")
    write(adapter, to, target, Choices(flat_clip=export.flat_clip()))
    words = ["--base", family] if family == "sdxl" else []
    assert importing.main([str(target), str(tmp_path / "back.safetensors"), *words]) == 0
    assert "read back, at most" in capsys.readouterr().out
    back = read_adapter(tmp_path / "back.safetensors")
    assert difference(adapter, back) <= 1e-6 and back.family == family
    assert back.metadata["lowrank.method"] == ("dora" if method == "dora" else "lora")
    assert back.metadata["lowrank.imported_from"] == target.name and back.metadata["ss_steps"] == "7"
    model, encoders = files.denoiser(family), files.encoders(family) if to != "lycoris" else []
    net, _ = lora.create_network_from_weights(
        1.0, None, None, encoders or None, model, load_file(tmp_path / "back.safetensors")
    )
    assert len(net.layers()) == len(adapter.layers)  # a network finds every layer of it


@pytest.mark.parametrize("method", ["delta_r", "qrlora"])
def test_official_qr_lora_files(method, bases, tmp_path):
    """ΔR comes back as it was; a QR pair comes without its start, which the base gives back."""
    model = files.denoiser("flux")
    (tmp_path / "base" / "transformer").mkdir(parents=True)
    model.save_pretrained(tmp_path / "base" / "transformer")
    source = files.save(tmp_path, "flux", method, bases, text=False)
    adapter = read_adapter(source)
    official = tmp_path / "official.safetensors"
    write(adapter, "qrlora", official, Choices())
    told = load_file(official)
    assert not any(key.endswith("alpha") for key in told)
    if method == "qrlora":
        assert "transformer.transformer_blocks.0.attn.to_out.0.to_out.0.lora.up.weight" in told
    words = [str(official), str(tmp_path / "back.safetensors")]
    if method == "qrlora":
        words += ["--method", "qrlora", "--model", str(tmp_path / "base"), "--basis_cache_dir", str(bases)]
    assert importing.main(words) == 0
    back = read_adapter(tmp_path / "back.safetensors")
    assert back.metadata["lowrank.method"] == method
    assert difference(adapter, back) <= 1e-4  # Q₀R₀ is computed anew, from W


@pytest.mark.parametrize("method", ["delta_r", "delta_r_triu"])
def test_lora_projected_on_basis(method, bases, tmp_path, capsys):
    """ΔR = Qᵀ ΔW is the nearest in the basis; what is said to be lost is lost; the basis is the trainer's."""
    unet = files.denoiser("sd15")
    unet.save_pretrained(tmp_path / "base" / "unet")
    source = files.save(
        tmp_path, "sd15", "lora", text=False, target=r"mid_block\.attentions\.0\.transf.*attn1"
    )
    words = [str(source), str(tmp_path / "out.safetensors"), "--method", method, "--rank", "8"]
    words += ["--model", str(tmp_path / "base"), "--basis_cache_dir", str(bases)]
    assert importing.main(words) == 0
    out = capsys.readouterr().out
    adapter, made = read_adapter(source), read_adapter(tmp_path / "out.safetensors")
    lost = sum(distance(one, made.layers[p]) ** 2 for p, one in adapter.layers.items()) ** 0.5
    whole = sum(one.norm() ** 2 for one in adapter.layers.values()) ** 0.5
    assert f"{lost / whole:.2%} of ‖ΔW‖ is lost" in out and 0.01 < lost / whole < 1
    target = r"mid_block\.attentions\.0\.transf.*attn1"
    trained = files.network("sd15", method, unet, None, bases, target=target)
    net = importing_network(method, tmp_path / "out.safetensors", unet)
    assert net.load_weights(str(tmp_path / "out.safetensors")).missing_keys == []
    start = other_rank(method, unet, bases, target).start_metadata
    assert made.metadata["lowrank.basis_hash"] == start["basis_hash"]
    assert trained.layers()
    place, layer = next(iter(adapter.layers.items()))
    Q = made.raw[place]["q"].double()
    want = Q.T @ layer.delta().double()
    want = torch.triu(want) if method == "delta_r_triu" else want
    torch.testing.assert_close(made.raw[place]["delta_r"].double(), want, rtol=1e-4, atol=1e-5)


def importing_network(method, path, model):
    module = __import__(f"networks.{method}", fromlist=["x"])
    return module.create_network_from_weights(1.0, str(path), None, None, model)[0]


def other_rank(method, model, bases, target):
    module = __import__(f"networks.{method}", fromlist=["x"])
    return module.create_network(1.0, 8, 8.0, None, [], model, target=target, basis_cache=str(bases))


def test_peft_scales_from_config(tmp_path):
    path = "transformer_blocks.0.attn.to_q"
    state = {
        f"base_model.model.{path}.lora_A.weight": torch.ones(4, 6),
        f"base_model.model.{path}.lora_B.weight": torch.ones(5, 4),
    }
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    for config, scale in (
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": 1}}, 0.25),
        ({"lora_alpha": 8, "alpha_pattern": {"^attn.to_q": 1}}, 2.0),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
        assert read_adapter(folder).layers[LayerPath("unet", path)].scale == scale
    for config, why in (
        ({"peft_type": "LOHA", "lora_alpha": 1}, "LOHA"),
        ({"peft_type": "LORA", "lora_alpha": 8, "alpha_pattern": {"(a+)+$": 1}}, "too complex"),
        ({"peft_type": "LORA"}, "cannot be read"),
        ([], "is no JSON object"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(Refused, match=why):
            read_adapter(tmp_path)
    with pytest.raises(Refused, match=r"has no adapter_config\.json"):
        (tmp_path / "none").mkdir()
        read_adapter(tmp_path / "none")


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"transformer.lora_alpha": 8}, 2.0),
        ({"transformer.lora_alpha": 8, "transformer.use_rslora": True}, 4.0),
        ({"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"to_q": 1}}, 0.25),
        ({"text_encoder.lora_alpha": 8}, 1.0),
    ],
)
def test_alpha_in_header_in_every_tool(config, scale, tmp_path, capsys):
    """diffusers and SimpleTuner write alpha nowhere else; at scale 1 such a file is silently wrong."""
    path, target = "transformer_blocks.0.attn.to_q", tmp_path / "out.safetensors"
    state = {f"transformer.{path}.lora_A.weight": torch.ones(4, 6)}
    state[f"transformer.{path}.lora_B.weight"] = torch.ones(5, 4)
    save_file(state, tmp_path / "in.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    want = scale * torch.full((5, 6), 4.0)
    assert torch.equal(
        read_adapter(tmp_path / "in.safetensors").layers[LayerPath("unet", path)].delta(), want
    )
    for main in (export.main, importing.main):
        words = [str(tmp_path / "in.safetensors"), str(target)]
        assert main([*words, *(("--to", "diffusers") if main is export.main else ())]) == 0
        assert torch.equal(read_adapter(target).layers[LayerPath("unet", path)].delta(), want)
    pairs = read_mixture([tmp_path / "in.safetensors"]).pairs
    (name,) = pairs.modules
    assert torch.equal(pairs.up(name) @ pairs.down(name, [1.0]), want)
    capsys.readouterr()
    assert inspection.main([str(tmp_path / "in.safetensors"), "--json"]) == 0
    (layer,) = json.loads(capsys.readouterr().out)["layers"]
    assert layer["norm"] == pytest.approx(float(want.norm()))


def test_lycoris_tucker_convolution_is_folded(tmp_path):
    made = torch.Generator().manual_seed(0)
    up, mid, down = (torch.randn(*s, generator=made) for s in ((8, 3, 1, 1), (3, 3, 3, 3), (3, 6, 1, 1)))
    name = "lycoris_down_blocks_0_attentions_0_conv1"
    save_file(
        {f"{name}.lora_up.weight": up, f"{name}.lora_mid.weight": mid, f"{name}.lora_down.weight": down},
        tmp_path / "t.safetensors",
    )
    layer = next(iter(read_adapter_file(tmp_path / "t.safetensors").layers.values()))
    x = torch.randn(1, 6, 5, 5, generator=made)
    conv = torch.nn.functional.conv2d
    theirs = conv(conv(conv(x, down), mid, padding=1), up)
    torch.testing.assert_close(conv(conv(x, layer["down"], padding=1), up), theirs, rtol=1e-4, atol=1e-4)


CLIP = "text_model.encoder.layers.0"


@pytest.mark.parametrize(
    ("key", "place"),
    [
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight",
            ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"),
        ),
        (
            f"text_encoder.{CLIP}.self_attn.to_q_lora.up.weight",
            ("te1", f"{CLIP}.self_attn.q_proj"),
        ),
        (
            f"text_encoder_2.{CLIP}.mlp.fc1.lora_linear_layer.up.weight",
            ("te2", f"{CLIP}.mlp.fc1"),
        ),
        (
            "diffusion_model.input_blocks.4.1.proj_in.lora_A.weight",
            ("unet", "down_blocks.1.attentions.0.proj_in"),
        ),
        (
            "lora_transformer_single_transformer_blocks_7_attn_to_k.lora_up.weight",
            ("unet", "single_transformer_blocks.7.attn.to_k"),
        ),
        (
            "base_model.model.transformer_blocks.1.ff.net.0.proj.lora_B.default.weight",
            ("unet", "transformer_blocks.1.ff.net.0.proj"),
        ),
        (
            f"text_encoders.clip_g.transformer.{CLIP}.mlp.fc2.lora_A.weight",
            ("te2", f"{CLIP}.mlp.fc2"),
        ),
    ],
)
def test_key_names_of_other_programs(key, place):
    from lowrank.naming.places import places

    module, _ = keys.role_of(key)
    assert places(keys.module_path(module)) == [(LayerPath(*place), None)]


# ---------- files that are out to harm


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused(what, tmp_path, capsys):
    """In export, import and merging; inspecting tells what is wrong with it. Networks and mixtures too, where
    they would use what is wrong."""
    state, why = HOSTILE[what]
    path, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(state, path)
    for main in (export.main, importing.main):
        with pytest.raises(Refused, match=why):
            main([str(path), str(target)])
    assert not target.exists()
    assert inspection.main([str(path)]) == 0
    told = capsys.readouterr().out
    clean = "another kind", "two models", "one layer twice", "not ours", "joined rows that are no shares"
    assert "problem" in told or what in clean
    if what in clean or what == "a length for each input":
        return
    with pytest.raises(Refused):
        read_mixture([path])
    model = files.denoiser("sd15")
    net = lora.create_network(1.0, 2, 1.0, None, [], model, target=r"mid_block\.attentions\.0\.proj")
    if what not in ("whole numbers", "alpha of two numbers", "three axes"):
        with pytest.raises(Refused):
            net.load_weights(str(path))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64])
def test_mixed_precisions_are_read(dtype, tmp_path, capsys):
    state = {**whole(A, dtype=dtype), **whole(B)}
    path, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(state, path)
    assert export.main([str(path), str(target)]) == 0
    back, wide = read_adapter(target), state[f"{A}.lora_up.weight"].float().flatten(1)
    mine = back.layers[LayerPath("unet", "mid_block.attentions.0.proj_in")]
    torch.testing.assert_close(mine.up.float(), wide)
    assert inspection.main([str(path)]) == 0 and str(dtype).removeprefix("torch.") in capsys.readouterr().out


def test_alpha_zero_means_strength_zero(tmp_path, capsys, caplog):
    """As in ComfyUI, A1111 and diffusers; kohya's networks take the rank. No file that is written has one."""
    path, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    zero = {f"{A}.alpha": torch.tensor(0.0)}
    save_file({**whole(A), **whole(B), **zero}, path)
    assert inspection.main([str(path)]) == 0
    assert "alpha is 0" in capsys.readouterr().out
    for main in (export.main, importing.main):
        caplog.clear()
        assert main([str(path), str(target)]) == 0
        assert f"alpha is 0 in 1 of 2 layers, for example {A}" in caplog.text
        assert {key.rpartition(".lora_")[0] for key in load_file(target) if "lora_" in key[9:]} == {B}
    mixture = read_mixture([path]).pairs
    changes = {n: mixture.up(n) @ mixture.down(n, [1.0]) for n in mixture.modules}
    assert [bool(dW.any()) for dW in changes.values()] == [False, True]
    net = lora.create_network(
        1.0, 2, 1.0, None, [], files.denoiser("sd15"), target=r"mid_block\.attentions\.0\.proj"
    )
    caplog.clear()
    net.load_weights(str(path))
    assert "alpha is 0 in 1 of 2 layers" in caplog.text
    assert {layer.name: layer.scale for layer in net.layers()} == {A: 0.0, B: 0.5}
    save_file({**whole(A), **zero}, path)
    for main in (export.main, importing.main):
        with pytest.raises(Refused, match="nothing to convert"):
            main([str(path), str(target)])
    lengths = {**whole(A), **zero, f"{A}.dora_scale": torch.ones(64, 1, 1, 1)}
    save_file(lengths, path)  # W′ = m·W/‖W‖ is a change all the same
    assert importing.main([str(path), str(target)]) == 0
    state = load_file(target)
    assert state[f"{A}.alpha"] == 2 and not state[f"{A}.lora_up.weight"].any()


def test_joined_layers_with_zero_alpha():
    """q adds nothing, k and v what they did; the first part does not decide for all."""
    made = torch.Generator().manual_seed(0)
    parts = [
        {
            "down": torch.randn(2, 6, generator=made),
            "up": torch.randn(4, 2, generator=made),
            "alpha": torch.tensor(alpha),
        }
        for alpha in (0.0, 1.0, 2.0)
    ]
    joined = join_layers(parts, [4, 4, 4])
    dW = strength(joined, 6) * joined["up"] @ joined["down"]
    want = [strength(part, 2) * part["up"] @ part["down"] for part in parts]
    torch.testing.assert_close(dW, torch.cat(want))
    assert not want[0].any() and want[1].any()


def test_pickle_is_read_with_weights_only(tmp_path, capsys):
    torch.save(whole(A), tmp_path / "good.pt")
    assert export.main([str(tmp_path / "good.pt"), str(tmp_path / "out.safetensors")]) == 0
    torch.save({**whole(A), "x": Code()}, tmp_path / "bad.pt")
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps({"x": Code()}, protocol=2))
    (tmp_path / "named.safetensors").write_bytes(pickle.dumps({"x": Code()}, protocol=2))
    capsys.readouterr()
    for name in ("bad.pt", "raw.ckpt", "named.safetensors"):
        for main in (export.main, importing.main, lambda words: inspection.main(words[:1])):
            with pytest.raises(Refused):
                main([str(tmp_path / name), str(tmp_path / "out2.safetensors")])
    assert "run" not in capsys.readouterr().out.split() and not (tmp_path / "out2.safetensors").exists()
    torch.save(whole(A), tmp_path / "base.ckpt")
    with pytest.raises(Refused, match="not opened here"):
        base_checkpoint.BaseCheckpoint(tmp_path / "base.ckpt")


def test_damaged_metadata_is_ignored(tmp_path, capsys):
    path = tmp_path / "in.safetensors"
    for told in (
        {"lowrank.method": "../../evil", "lowrank.options": "{"},
        {"lowrank.method": "lora", "lowrank.options": "[" * 10_000},
        {"ss_output_name": "\x1b[2Jgone", "lowrank.command": "\x07"},
    ):
        save_file(whole(A), path, told)
        assert inspection.main([str(path)]) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out and "\x07" not in out  # a terminal would obey
    save_file(whole(A), path, {"lowrank.method": "lora", "lowrank.options": "{"})
    with pytest.raises(Refused, match="damaged metadata"):
        export.main([str(path), str(tmp_path / "out.safetensors")])


def read_and_write_many(n: int, folder, capsys) -> float:
    """CPU seconds to read, write and refuse a file of N layers among 7 N strange keys and 20 long ones."""
    state = {f"x{i}.weight": torch.zeros(1) for i in range(7 * n)}
    state |= {("a." * 2_000) + f"{i}.lora_down.weigh": torch.zeros(1) for i in range(20)}
    for i in range(n):
        name = f"lora_unet_mid_block_attentions_{i}_proj_in"
        state |= {f"{name}.lora_down.weight": torch.ones(1, 2), f"{name}.lora_up.weight": torch.ones(2, 1)}
        state[f"{name}.alpha"] = torch.tensor(1.0)
    path = folder / f"{n}.safetensors"
    save_file(state, path)
    started = time.process_time()
    adapter = read_adapter(
        path, base=[LayerPath("unet", f"mid_block.attentions.{i}.proj_in") for i in range(n)]
    )
    assert len(adapter.layers) == n and len(adapter.not_understood) == 7 * n + 20
    assert f"left out: full weight × {7 * n}, unknown (lora_down.weigh) × 20" in adapter.usage
    write(adapter, "kohya", folder / "out.safetensors", Choices())
    assert len(read_tensors(folder / "out.safetensors")[0]) == 3 * n
    with pytest.raises(Refused):
        small_network().load_weights(str(path))  # rank 1 and other sizes
    return time.process_time() - started


def small_network():
    target = r"mid_block\.attentions\.0\.proj"
    return lora.create_network(1.0, 2, 1.0, None, [], files.denoiser("sd15"), target=target)


@pytest.mark.slow
def test_time_is_linear_in_number_of_keys(tmp_path, capsys):
    """Strange keys are counted, long names are read, and five times the keys take about five times as long.

    What is quadratic would take 25 times. The limit has room for both sides' noise and for costs that do not
    depend on the keys, which only lower the ratio.
    """
    small_network()  # imports and first calls are not timed
    few = read_and_write_many(500, tmp_path, capsys)
    many = read_and_write_many(2_500, tmp_path, capsys)
    assert many < 12 * few


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base", "flux"], "is not in flux; leave --family out"),
        (["--base", "flux", "--tlora_min_rank", "1"], "is not in flux; leave --family out"),
        (["--tlora_min_rank", "0"], "--tlora_min_rank 0 is below 1"),
        (["--tlora_min_rank", "1", "--tlora_alpha", "-1"], "--tlora_alpha -1 is not above 0"),
        (["--tlora_min_rank", "1", "--method", "lora"], "--method is lora; leave one out"),
    ],
)
def test_flags_that_do_not_fit_file(words, said, tmp_path):
    save_file(whole(A), tmp_path / "in.safetensors")
    with pytest.raises(Refused, match=said):
        importing.main([str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), *words])
    assert not (tmp_path / "out.safetensors").exists()


def test_only_one_part(bases, tmp_path):
    adapter = read_adapter(files.save(tmp_path, "sd15", "lora"))
    assert {p.part for p in only(adapter, "text").layers} == {"te1"}
    assert {p.part for p in only(adapter, "unet").layers} == {"unet"}
    with pytest.raises(Refused, match="no layer of the text part"):
        only(_flux({"proj_out": _random(4, 4, 2)}), "text")
    assert isinstance(next(iter(adapter.layers.values())), Delta)
    assert isinstance(files.denoiser("sd15"), UNet2DConditionModel)
