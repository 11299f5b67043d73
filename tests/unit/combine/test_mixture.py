"""Adding adapters, exporting them, and the residual file that is only checked."""

from __future__ import annotations

import os

import pytest
import torch
from diffusers import FluxTransformer2DModel
from files import FLUX
from flux_adapters import base_of, digest, flux, forward, made, saved  # noqa: F401 (fixtures)
from safetensors.torch import load_file, save_file
from toys import shake

from lowrank.adapter_file import read_adapter_file
from lowrank.adapters.targets import dense_weight
from lowrank.bases.qr_basis import decompose
from lowrank.combine.mixture import read_mixture
from lowrank.combine.pair_sum import PairSum
from lowrank.errors import Refused
from lowrank.formats.delta import delta_of
from lowrank.formats.read import read_adapter
from lowrank.formats.residual import check_residual, write_residual
from lowrank.formats.verify import difference
from lowrank.formats.write import write
from lowrank.formats.writers import Choices


def as_lora(source, target):
    """The file as a plain LoRA of diffusers; returns its path."""
    (path,) = write(read_adapter(source), "diffusers", target, Choices())
    return path


def layers_of(path):
    file = read_adapter_file(path)
    return file.layers, file.metadata


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_zero_weights_are_the_base_bit_for_bit(dtype, flux, saved):
    style, content = saved("delta_r_triu", 1), saved("delta_r_triu", 2)
    model = flux.to(dtype)
    hashed, before = digest(model), forward(model)
    attached = read_mixture([style, content]).attach(model, dtype=dtype)
    attached.set((0.0, 0.0))
    assert torch.equal(forward(model), before)
    attached.set((1.0, 0.5))
    assert not torch.equal(forward(model), before)
    attached.set((0.0, 0.0))
    assert torch.equal(forward(model), before)
    attached.restore()
    assert digest(model) == hashed


def exact(path_a, path_b, weights, module):
    """Σ wᵢ ΔWᵢ in float64, from the files alone."""
    total = 0
    for path, weight in zip((path_a, path_b), weights, strict=True):
        layer = delta_of(module, read_adapter_file(path).layers[module])
        total = total + weight * layer.scale * (layer.up.double() @ layer.down.double())
    return total


@pytest.mark.parametrize(
    ("first", "second", "rank"),
    [("delta_r_triu", "delta_r_triu", 4), ("delta_r", "lora", 8), ("qrlora", "delta_r", 12)],
)
def test_a_mixture_is_the_sum_in_float64(first, second, rank, flux, saved):
    style, content = saved(first, 1, alpha=2.0), saved(second, 2)
    mixture = read_mixture([style, content])
    weights = (0.7, -1.3)
    attached = mixture.attach(flux)
    attached.set(weights)
    for layer in attached.networks[0].layers():
        want = exact(
            style,
            content,
            weights,
            attached.networks[0].targets[layer.name].native.removeprefix("transformer."),
        )
        assert ((layer.delta_weight().double() - want).norm() / want.norm()) <= 1e-6
        assert layer.rank == rank
    assert ("share one basis" in mixture.describe()) == (first == second)


@pytest.mark.parametrize(("first", "second"), [("delta_r_triu", "delta_r_triu"), ("delta_r", "lora")])
def test_the_saved_merge_is_the_live_merge(first, second, flux, saved, tmp_path):
    mixture = read_mixture([saved(first, 1), saved(second, 2)])
    attached = mixture.attach(flux)
    attached.set((0.9, 1.1))
    live = forward(flux)
    attached.restore()
    mixture.save(tmp_path / "merged.safetensors", (0.9, 1.1), {})
    again = read_mixture([tmp_path / "merged.safetensors"])
    assert again.adapters[0].fact("method") == (first if first == second else "lora")
    attached = again.attach(flux)
    attached.set((1.0,))
    torch.testing.assert_close(forward(flux), live, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "delta_r", "delta_r_triu", "qrlora"])
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_exports_load_in_stock_diffusers(name, alpha, flux, saved, cache, tmp_path):
    path = saved(name, 1, alpha=alpha)
    with_us = made(name, base := base_of(flux), cache, alpha=alpha)
    with_us.load_weights(str(path))
    ours = forward(base)
    plain = forward(flux)
    state = load_file(as_lora(path, tmp_path / "lora.safetensors"))
    assert {v.shape[0] for k, v in state.items() if k.endswith("lora_A.weight")} == {
        8 if name == "qrlora" else 4
    }
    flux.load_lora_adapter(state, prefix="transformer")
    theirs = forward(flux)
    assert len({n for n, _ in flux.named_modules() if n.endswith("lora_A")}) == 15
    assert (ours - plain).norm() / plain.norm() > 1e-2  # an adapter without effect would agree as well
    assert (theirs - ours).norm() / ours.norm() <= 1e-5


def test_an_export_of_another_adapter_is_another(saved, tmp_path):
    source, target = saved("qrlora", 1, alpha=2.0), tmp_path / "plain.safetensors"
    as_lora(source, target)
    assert difference(read_adapter(source), read_adapter(target)) <= 1e-6
    as_lora(saved("qrlora", 2, alpha=2.0), target)
    assert difference(read_adapter(source), read_adapter(target)) > 0.1


def test_native_lora_loads_through_the_stock_pipeline_loader(flux, saved):
    from diffusers.loaders import FluxLoraLoaderMixin

    file = saved("lora", 1, alpha=2.0)
    state, alphas = FluxLoraLoaderMixin.lora_state_dict(
        str(file.parent), weight_name=file.name, return_alphas=True
    )
    flux.load_lora_adapter(state, network_alphas=alphas, prefix="transformer")
    scalings = {
        float(module.scaling["default_0"]) for _, module in flux.named_modules() if hasattr(module, "scaling")
    }
    assert scalings == {0.5}


def test_mixtures_refuse_what_does_not_belong_together(flux, saved, cache, tmp_path):
    style = saved("delta_r", 1)
    other = shake(made("delta_r", base_of(flux), cache))
    for base, path in (("a", "one"), ("b", "two")):
        other.save_weights(
            str(tmp_path / path), None, {"lowrank.base_hash": base * 64, "lowrank.base_model": base}
        )
    with pytest.raises(Refused, match="different base models"):
        read_mixture([tmp_path / "one", tmp_path / "two"])
    sd = tmp_path / "sd.safetensors"
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.lora_down.weight": torch.ones(1, 8), f"{name}.lora_up.weight": torch.ones(8, 1)}, sd)
    with pytest.raises(Refused, match=f"{style} is for flux and {sd} is for sd15"):
        read_mixture([style, sd])
    smaller = FluxTransformer2DModel(**{**FLUX, "num_attention_heads": 1})
    with pytest.raises(Refused, match="another base"):
        read_mixture([style]).attach(smaller)
    with pytest.raises(Refused, match="not in"):
        read_mixture([style]).attach(FluxTransformer2DModel(**{**FLUX, "num_layers": 0}))
    with pytest.raises(Refused, match="has no adapter"):
        torch_file = tmp_path / "none.safetensors"
        save_file({"x": torch.zeros(1)}, torch_file)
        read_adapter(torch_file)


def test_adapters_without_a_common_layer_are_added(flux, cache, tmp_path):
    """As B-LoRA's style and content, which are on two blocks of one model."""
    files, alone = [], 0
    plain = forward(flux)
    for name, target in (("single", "single_transformer"), ("double", r"^transformer_blocks.*to_q")):
        files.append(tmp_path / f"{name}.safetensors")
        shake(made("lora", base_of(flux), cache, target=target)).save_weights(str(files[-1]), None, {})
        alone += len(read_adapter(files[-1]).layers)
    mixture = read_mixture(files)
    assert len(mixture.adapters[0].layers.keys() | mixture.adapters[1].layers.keys()) == alone
    assert "one adapter only" in mixture.describe()
    attached = mixture.attach(flux)
    attached.set((0.7, 1.2))
    together = forward(flux)
    attached.restore()
    assert (together - plain).norm() / plain.norm() > 1e-2
    mixture.save(tmp_path / "sum.safetensors", (0.7, 1.2), {})
    saved_sum = read_adapter(tmp_path / "sum.safetensors")
    for file, weight in zip(files, (0.7, 1.2), strict=True):
        for place, layer in read_adapter(file).layers.items():
            wanted = weight * layer._replace(up=layer.up.double(), down=layer.down.double()).delta()
            difference_ = saved_sum.layers[place].delta() - wanted
            assert difference_.norm() <= 1e-6 * wanted.norm()  # fp32 with one rounding of the weight


def test_qr_without_its_initial_copy_is_not_merged_as_a_lora(saved, tmp_path):
    path = saved("qrlora", 1, save_basis="none")
    for use in (lambda: read_mixture([path]), lambda: as_lora(path, tmp_path / "plain.safetensors")):
        with pytest.raises(Refused, match=r"has no q, base_r, only .*; train with --save_basis full"):
            use()
    assert not (tmp_path / "plain.safetensors").exists()


def test_official_keys_without_a_basis_are_read_with_a_note(tmp_path, caplog):
    layer = {"m.lora.up.weight": torch.ones(6, 2), "m.lora.down.weight": torch.ones(2, 8)}
    save_file(layer, tmp_path / "a.safetensors")
    read_adapter(tmp_path / "a.safetensors", strict=False)
    assert "is read as a plain LoRA; if it is an official QR-LoRA file" in caplog.text
    caplog.clear()
    save_file({**layer, "m.lora.q.weight": torch.ones(6, 2)}, tmp_path / "b.safetensors")
    read_adapter(tmp_path / "b.safetensors", strict=False)
    assert not caplog.text


PAIR = {"up": torch.ones(6, 2), "down": torch.ones(2, 8)}
DELTA = {"q": torch.ones(6, 2), "delta_r": torch.ones(2, 8)}


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ({**PAIR, "up": torch.ones(6, 3)}, r"a: m has rank 2, 3 in 'up' \(6, 3\)"),
        ({**DELTA, "delta_r": torch.ones(3, 8)}, "has rank 3, 2 in 'q'"),
        ({**DELTA, "base_r": torch.ones(2, 9)}, "has inputs 8, 9 in 'base_r'"),
        ({**PAIR, "q": torch.ones(5, 2), "base_r": torch.ones(2, 8)}, "has outputs 5, 6 in 'up'"),
        ({**PAIR, "up": torch.ones(6, 0), "down": torch.ones(0, 8)}, r"m\.down is \(0, 8\)"),
        ({**PAIR, "up": torch.ones(12)}, r"m\.up is \(12,\), which is neither"),
        ({**PAIR, "up": torch.ones(3, 6, 2)}, r"m\.up is \(3, 6, 2\)"),
        ({**PAIR, "up": torch.ones(6, 2, 3, 3)}, "has rank 2, 18 in 'up'"),
        ({**PAIR, "alpha": torch.ones(2)}, r"m\.alpha is \(2,\) and must be one number"),
        ({**PAIR, "q": torch.ones(6, 2)}, "has no base_r, only .*--save_basis full"),
        ({"delta_r": torch.ones(2, 8)}, "has no q, only delta_r; .*--save_basis full"),
        ({"up": torch.ones(6, 2)}, "has no down, only up; the file is not whole"),
        ({"alpha": torch.ones(1)}, "has no down, up, only alpha"),
    ],
)
def test_factors_that_do_not_fit_are_named(roles, words):
    with pytest.raises(Refused, match=words) as told:
        delta_of("m", roles, "a")
    assert "\n" not in str(told.value)


def test_convolutions_fit():
    up, down, scale, _, kernel, _ = delta_of(
        "m", {"up": torch.ones(6, 2, 1, 1), "down": torch.ones(2, 3, 5, 5)}
    )
    assert kernel == (5, 5)
    assert up.shape == (6, 2) and down.shape == (2, 75) and scale == 1


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_read_as_fp32_and_integers_are_refused(dtype, tmp_path):
    file = tmp_path / "a.safetensors"
    state = {"m.lora_A.weight": torch.ones(2, 8), "m.lora_B.weight": torch.ones(6, 2)}
    save_file({key: value.to(dtype) for key, value in state.items()}, file)
    assert {value.dtype for value in read_adapter_file(file).layers["m"].values()} == {torch.float32}
    save_file({**state, "m.lora_A.weight": torch.ones(2, 8, dtype=torch.int8)}, file)
    with pytest.raises(Refused, match=r"m\.lora_A\.weight in .* is int8"):
        read_adapter_file(file)


def test_layers_of_two_models_are_not_added(tmp_path):
    for name, inputs in (("a", 8), ("b", 9)):
        state = {"m.lora_A.weight": torch.ones(2, inputs), "m.lora_B.weight": torch.ones(6, 2)}
        save_file(state, tmp_path / name)
    with pytest.raises(Refused, match=r"m is 6×8 in .*a and 6×9 in .*b; merge adapters of one base"):
        read_mixture([tmp_path / "a", tmp_path / "b"])


class Code:
    """A pickle of it would run a program."""

    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is damaged or holds more than tensors"),
        (b"hello world\nthis is text\n", "is damaged or holds"),
        (b"PK\x03\x04", "is damaged or holds"),
        ({"a": Code()}, "code in it is not run"),
        ([torch.ones(1)], "holds no dictionary of named tensors but a list"),
        (torch.ones(1), "but a Tensor"),
        ({1: torch.ones(1)}, "but a dict"),
        ({"epoch": 3}, "but a dict"),
    ],
)
def test_pickles_are_dictionaries_of_tensors_or_one_sentence(suffix, content, words, tmp_path):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(Refused, match=words) as told:
        read_adapter_file(path)
    assert "\n" not in str(told.value) and "weights_only" not in str(told.value)


def test_a_state_dict_is_unwrapped(tmp_path):
    state = {"m.lora_A.weight": torch.ones(2, 8), "m.lora_B.weight": torch.ones(6, 2)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.ckpt")
    assert read_adapter_file(tmp_path / "a.ckpt").layers["m"].keys() == {"up", "down"}


def test_a_residual_that_nothing_can_be_compared_with_is_refused(flux, saved, tmp_path):
    module = "transformer_blocks.0.attn.to_q"
    hosts = {module: flux.get_submodule(module)}
    file = tmp_path / "residual.safetensors"
    save_file({f"{module}.residual.weight": dense_weight(hosts[module])}, file)
    for path in (saved("lora", 1), saved("delta_r", 1, save_basis="q")):
        with pytest.raises(Refused, match=r"nothing in .* can be compared.*leave --residual_path out"):
            check_residual(file, *layers_of(path), hosts)
    layers, metadata = layers_of(saved("delta_r", 1))
    with pytest.raises(Refused, match="32×8 in the adapter and 32×32 in the model"):
        cut = {role: value[:, :8] if "r" in role else value for role, value in layers[module].items()}
        check_residual(file, {module: {k: v for k, v in cut.items() if k != "alpha"}}, metadata, hosts)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
def test_residual_is_written_and_checked(dtype, flux, saved, tmp_path):
    path = saved("delta_r", 1)
    layers, metadata = layers_of(path)
    hosts = {module: flux.get_submodule(module) for module in layers}
    weights = {module: dense_weight(host) for module, host in hosts.items()}
    file = tmp_path / "flux_residual_weights.safetensors"
    write_residual(file, weights, lambda module: decompose(weights[module], 4), dtype, {"lowrank.rank": "4"})
    from safetensors.torch import load_file

    stored = load_file(file)
    assert set(stored) == {f"{module}.residual.weight" for module in layers}
    assert {value.dtype for value in stored.values()} == {dtype}
    assert "15 layers present" in check_residual(file, layers, metadata, hosts)
    with pytest.raises(Refused, match="rank"):
        check_residual(file, layers, {"lowrank.rank": "8"}, hosts)
    with torch.no_grad():
        hosts["transformer_blocks.0.attn.to_k"].weight.mul_(1.5)
    with pytest.raises(Refused, match="misses W"):
        check_residual(file, layers, metadata, hosts, sample=100)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(Refused, match="not a complete"):
        check_residual(file, layers, metadata, hosts)


def test_a_magnitude_is_not_left_out_silently(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(saved("lora", 1))
    first = next(key for key in state if key.endswith("lora_B.weight"))
    state[first.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(state[first].shape[0])
    save_file(state, tmp_path / "dora.safetensors")
    with pytest.raises(Refused, match="DoRA magnitude"):
        PairSum([read_adapter(tmp_path / "dora.safetensors")])
    with pytest.raises(Refused, match="made by dora, whose change is no pair of low-rank factors"):
        read_mixture([tmp_path / "dora.safetensors"]).save(tmp_path / "out.safetensors", (1.0,), {})
