"""Reading a denoiser to its storage tensor by tensor: equal weights, little host memory, a cache on disk."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank.adapters.targets import original_weight
from lowrank.errors import Refused
from lowrank.files import cache_folder
from lowrank.models import blocks, frozen, single, storage, stored_load
from lowrank.models.family import Source
from lowrank.models.flux import FLUX
from lowrank.models.sd import SD15
from lowrank.models.sd_single import UNET
from lowrank.plan.live import LiveMemory

BF16 = torch.bfloat16


def layers_of(model) -> dict:
    return {name: layer for name, layer in model.named_modules() if frozen.is_frozen(layer)}


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["flux folder", "sd folder", "sd file"])
def model(request, tiny_flux, tiny_sd):
    paths = {"flux folder": tiny_flux, "sd folder": tiny_sd}
    path = paths.get(request.param) or next((tiny_sd / "single").glob("*.safetensors"))
    return FLUX if "flux" in request.param else SD15, Source(str(path), dtype=BF16)


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_weights_are_those_of_the_whole_model_stored_afterwards(model, kind):
    family, source = model
    whole = family.load(source, ("denoiser",)).denoiser
    parts = {name: part for name, part in whole.named_modules() if frozen.can_freeze(part)}
    originals = {name: part.weight.detach().clone() for name, part in parts.items()}
    blocks.freeze_base(whole)
    blocks.store_base(whole, kind)
    stored = family.load(replace(source, storage=kind), ("denoiser",)).denoiser
    own, other = layers_of(stored), layers_of(whole)
    assert own.keys() == other.keys() and stored.dtype == BF16
    for name, layer in own.items():
        assert torch.equal(layer.weight, other[name].weight), name
        assert torch.equal(original_weight(layer), originals[name].flatten(1)), name
        assert kind == "bf16" or torch.equal(layer.row_norms, other[name].row_norms), name
    for mine, theirs in zip(stored.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("method", ["delta_r", "dora", "null_lora"])
def test_adapters_start_from_the_weights_before_storing(method, tiny_flux, cache):
    source, made = Source(str(tiny_flux), dtype=BF16), []
    module = importlib.import_module(f"networks.{method}")
    for kind in (None, "nf4"):
        torch.manual_seed(0)
        denoiser = FLUX.load(replace(source, storage=kind), ("denoiser",)).denoiser
        made.append(module.create_network(1.0, 4, 4, None, [], denoiser))
    assert made[0].start_metadata == made[1].start_metadata
    for plain, stored in zip(made[0].layers(), made[1].layers(), strict=True):
        for role, value in plain.tensors().items():
            assert torch.equal(value, stored.tensors()[role]), (plain.name, role)


def test_second_start_reads_the_cache(tiny_flux, monkeypatch, caplog):
    source = Source(str(tiny_flux), dtype=BF16, storage="nf4")
    first = layers_of(FLUX.load(source, ("denoiser",)).denoiser)
    (file,) = cache_folder("base").iterdir()

    def refuse(*_):
        raise AssertionError("quantised again")

    with monkeypatch.context() as patch:
        patch.setattr(frozen, "pack", refuse)
        again = layers_of(FLUX.load(source, ("denoiser",)).denoiser)
    for name, layer in again.items():
        assert torch.equal(layer.packed, first[name].packed)
        assert torch.equal(original_weight(layer), original_weight(first[name]))
    for damage in (b"damaged", None):
        if damage:
            file.write_bytes(damage)
        else:  # a quantised file of another model under this name
            tensors = {name: value[:-1].clone() for name, value in load_file(file).items()}
            save_file(tensors, file, {"lowrank.base": file.stem})
        caplog.clear()
        repaired = layers_of(FLUX.load(source, ("denoiser",)).denoiser)
        assert "of another model" in caplog.text
        assert all(torch.equal(layer.packed, first[name].packed) for name, layer in repaired.items())


@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp8_scaled", "int8", "nf4"])
def test_host_memory_of_loading(kind, tiny_flux, monkeypatch):
    monkeypatch.setattr(storage, "_PIECE", 256)  # in the proportion of 4 million values to FLUX's largest
    models = FLUX.load(Source(str(tiny_flux), dtype=BF16, storage=kind), ())
    largest = max(p.numel() for p in FLUX.empty(models).parameters()) * 4  # the file is in fp32
    read = stored_load._read

    def counted(path, name):
        value = read(path, name)
        live.count([value])
        return value

    monkeypatch.setattr(stored_load, "_read", counted)
    live = LiveMemory()
    with live:
        FLUX.add(models, ("denoiser",))
    stored = frozen.stored_bytes(models.denoiser)
    assert stored < live.peak <= stored + 2 * largest, (live.peak, stored, largest)


def test_already_fp8_file(tiny_flux, tmp_path):
    folder = Path(tiny_flux) / "transformer"
    (weights,) = folder.glob("*.safetensors")
    state = {name: value.to(torch.float8_e4m3fn) for name, value in load_file(weights).items()}
    save_file(state, tmp_path / weights.name)
    readers = stored_load.folder_readers(tmp_path, None)
    assert readers is not None
    models = FLUX.load(Source(str(tiny_flux), dtype=BF16), ())
    source = Source("", dtype=BF16, storage="fp8")
    made = stored_load.load_stored(FLUX.empty(models), readers, tmp_path, source, lambda: "a hash")
    for name, layer in layers_of(made).items():
        assert torch.equal(layer.weight, state[f"{name}.weight"].to(BF16))


def test_broken_files_are_refused(tiny_flux, tmp_path):
    models = FLUX.load(Source(str(tiny_flux), dtype=BF16), ())
    (weights,) = (Path(tiny_flux) / "transformer").glob("*.safetensors")
    state, name = load_file(weights), "transformer_blocks.0.attn.to_q.weight"
    cases = {
        "1 × missing": {k: v for k, v in state.items() if k != name},
        "1 × mismatched": {**state, name: state[name][:-1].clone()},
        f"{name} .* holds NaN": {**state, name: state[name] * torch.nan},
    }
    for message, changed in cases.items():
        save_file(changed, tmp_path / weights.name)
        readers = stored_load.folder_readers(tmp_path, None)
        with pytest.raises(Refused, match=message):
            source = Source("", dtype=BF16, storage="bf16")
            stored_load.load_stored(FLUX.empty(models), readers or {}, tmp_path, source, lambda: "a hash")


def scaled_file(source: Path, target: Path) -> dict[str, torch.Tensor]:
    """Write a file with scaled float8 weights in its U-Net; returns the numbers that they stand for."""
    state, wide = load_file(source), {}
    names = [k for k, v in state.items() if k.startswith(UNET) and v.dim() == 2 and v.shape[1] % 4 == 0]
    for number, name in enumerate(names):
        weight = state[name]
        groups = weight.view(len(weight), -1, 4).abs().amax(-1, keepdim=True)  # (O, I/4, 1)
        scale = (weight.abs().max() / 400, weight.abs().amax(1, keepdim=True) / 400, groups / 400)[number % 3]
        spread = scale.repeat(1, 1, 4).flatten(1) if scale.dim() == 3 else scale
        state[name] = (weight / spread).to(torch.float8_e4m3fn)
        state[name.replace(".weight", (".scale_weight", ".weight_scale")[number % 2])] = scale
        state[name.replace(".weight", ".scale_input")] = torch.ones(())
        wide[name.removeprefix(UNET)] = state[name].float() * spread
    save_file({**state, f"{UNET}scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, target)
    return wide


def test_scaled_fp8_file(tiny_sd, tmp_path):
    path = tmp_path / "model.safetensors"
    wide = scaled_file(next((tiny_sd / "single").glob("*.safetensors")), path)
    assert dict(single.open_checkpoint(path).under(UNET).read(wide)).keys() == wide.keys()
    for name, value in single.open_checkpoint(path).under(UNET).read(wide):
        assert torch.equal(value, wide[name]), name
    source = Source(str(path), dtype=BF16, tokenizer_cache_dir=str(tiny_sd / "single"))
    whole = SD15.load(source, ("denoiser",)).denoiser
    stored = SD15.load(replace(source, storage="bf16"), ("denoiser",)).denoiser
    for name, layer in layers_of(stored).items():
        assert torch.equal(layer.weight, whole.get_submodule(name).weight), name


@pytest.mark.parametrize("key", ["img_in.weight.absmax", "img_in.scale_weight", "img_in.weight_scale_2"])
def test_other_quantised_files_are_refused(key, tiny_flux, tmp_path):
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({"img_in.weight": torch.zeros(2, 2, dtype=torch.uint8), key: torch.ones(1)}, path)
    with pytest.raises(Refused, match=f"quantised in a way that is not read.*{key}"):
        single.open_checkpoint(path)
    with pytest.raises(Refused, match=f"quantised in a way that is not read.*{key}"):
        stored_load.folder_readers(tmp_path, None)
    shutil.copytree(tiny_flux, tmp_path / "model")
    (weights,) = (tmp_path / "model/transformer").glob("*.safetensors")
    save_file({**load_file(weights), key: torch.ones(1)}, weights)
    with pytest.raises(Refused, match=f"quantised in a way that is not read.*{key}"):
        FLUX.load(Source(str(tmp_path / "model")), ("denoiser",))
