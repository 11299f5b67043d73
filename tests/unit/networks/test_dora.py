"""DoRA against PEFT's and LyCORIS' own layers, its files among theirs, and what half precision does to it."""

from __future__ import annotations

import importlib

import pytest
import torch
from diffusers import FluxTransformer2DModel
from files import FLUX
from flux_adapters import made
from lycoris.modules.locon import LoConModule
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from toys import HOSTS, RANK, base, network, shake

from lowrank.adapters import magnitude
from lowrank.errors import Refused
from lowrank.tensors import read_tensors

ALPHA = 3.0


def adapted(kind: str, dtype: torch.dtype = torch.float64):
    """A host in `dtype` and DoRA on it, with every trained tensor moved."""
    model = base(kind, dtype)
    made = network("dora", model, rank=RANK, alpha=ALPHA).to(dtype)
    for layer in made.layers():
        layer.start_magnitude()  # the one made in fp32 is not ‖W‖ in float64
    return model, shake(made, 0.1)


def peft_twin(kind: str, ours):
    """PEFT's DoRA on the same host with the same values, and its layers in the order of ours."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["first", "second"], use_dora=True)
    model = get_peft_model(base(kind, torch.float64), config)
    layers = [model.base_model.model.first, model.base_model.model.second]
    for layer, own in zip(layers, ours.layers(), strict=True):
        layer.lora_A["default"].weight.data = own.down.detach().clone()
        layer.lora_B["default"].weight.data = own.up.detach().clone()
        vector = layer.lora_magnitude_vector["default"]
        vector.weight.data = own.magnitude.detach().reshape(vector.weight.shape).clone()
    return model, layers


def test_loraplus_speeds_up_alone():
    """Only U is in LoRA+'s fast group; the lengths m keep the rate of the down, unlike PEFT's."""
    arguments = {"target": ".", "loraplus_lr_ratio": "16"}
    made = importlib.import_module("networks.dora").create_network(
        1.0, 4, 4.0, None, [], base("linear"), **arguments
    )
    made.apply_to([], None, False, False)
    groups, _ = made.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-4, 1e-4)
    rates = {id(p): round(group["lr"] / 1e-4) for group in groups for p in group["params"]}
    for layer in made.layers():
        found = {role: rates[id(p)] for role, p in layer.roles().items()}
        assert found == {"up": 16, "down": 1, "magnitude": 1}


@pytest.mark.parametrize("kind", HOSTS)
def test_forward_and_gradients_equal_peft(kind):
    model, ours = adapted(kind)
    theirs, layers = peft_twin(kind, ours)
    x = HOSTS[kind].example().double().requires_grad_()
    target = torch.randn_like(model(x))
    gradients = []
    for run in (model, theirs):
        x.grad = None
        y = run(x)
        (y - target).square().sum().backward()
        gradients.append((y.detach(), x.grad.clone()))
    for mine, his in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-12, atol=1e-12)
    for layer, own in zip(layers, ours.layers(), strict=True):
        pairs = (
            (own.down, layer.lora_A["default"].weight),
            (own.up, layer.lora_B["default"].weight),
            (own.magnitude, layer.lora_magnitude_vector["default"].weight),
        )
        for mine, his in pairs:
            torch.testing.assert_close(mine.grad.flatten(), his.grad.flatten(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", HOSTS)
def test_merge_equals_peft(kind):
    _, ours = adapted(kind)
    theirs, layers = peft_twin(kind, ours)
    ours.restore()
    ours.merge_to(None, None)
    theirs.merge_adapter()
    for layer, own in zip(layers, ours.layers(), strict=True):
        # merged in fp32, as every method is
        torch.testing.assert_close(own.host.weight, layer.base_layer.weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("kind", HOSTS)
def test_equation_in_float64(kind, strength):
    _, made = adapted(kind)
    made.set_multiplier(strength)
    x = HOSTS[kind].example().double()
    first = made.layers()[0]
    W = first.host.weight.flatten(1)
    V = W + ALPHA / RANK * first.up.flatten(1) @ first.down.flatten(1)
    turned = first.magnitude.flatten(1) * V / V.square().sum(1, keepdim=True).sqrt()
    want = strength * (turned - W).reshape(first.host.weight.shape)
    torch.testing.assert_close(first.delta_weight(), want, rtol=1e-12, atol=1e-13)
    host = base(kind, torch.float64).first
    merged = type(host).forward(host, x), host.weight.data.add_(want)
    torch.testing.assert_close(first.host(x), host(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(merged[0], host(x))


def test_strength_per_sample():
    model, made = adapted("linear")
    x = HOSTS["linear"].example(2).double()
    alone = []
    for index, strength in enumerate((0.25, 2.0)):
        made.set_multiplier(strength)
        alone.append(model(x[index : index + 1]))
    made.set_multiplier(torch.tensor([0.25, 2.0]))
    torch.testing.assert_close(model(x), torch.cat(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", HOSTS)
def test_lycoris_reads_the_file(kind, tmp_path):
    torch.manual_seed(0)
    _, made = adapted(kind, torch.float32)
    made.save_weights(str(tmp_path / "a.safetensors"), None, {})
    state, _ = read_tensors(tmp_path / "a.safetensors")
    x = HOSTS[kind].example()
    host = base(kind).first
    want = made.layers()[0].host(x)
    name = made.layers()[0].name
    theirs = LoConModule(name, host, 1.0, RANK, ALPHA, weight_decompose=True, wd_on_out=True)
    suffixes = {key.removeprefix(name + "."): value for key, value in state.items() if key.startswith(name)}
    assert suffixes.keys() == {"lora_up.weight", "lora_down.weight", "alpha", "dora_scale"}
    assert suffixes["dora_scale"].shape == theirs.dora_scale.shape
    theirs.load_state_dict(suffixes)
    theirs.apply_to()
    torch.testing.assert_close(host(x), want, rtol=1e-4, atol=1e-5)  # fp32 sums in another order


@pytest.mark.parametrize("kind", HOSTS)
def test_files_of_peft_and_lycoris_are_read(kind):
    _, ours = adapted(kind)
    theirs, _ = peft_twin(kind, ours)
    native = {
        key.replace("base_model.model.", "unet."): value
        for key, value in get_peft_model_state_dict(theirs).items()
    }
    assert any(key.endswith("lora_magnitude_vector") for key in native)
    other = network("dora", base(kind), rank=RANK, alpha=ALPHA).double()
    told = other.read_state(native, {}, "peft.safetensors")
    assert not told.missing_keys and not told.unexpected_keys
    for mine, his in zip(other.layers(), ours.layers(), strict=True):
        assert torch.equal(mine.delta_weight(), his.delta_weight())
    wrong = {key: value for key, value in ours.state_dict().items() if "first" in key}
    wrong[f"{ours.layers()[0].name}.dora_scale"] = torch.ones(
        1, 24 if kind == "linear" else 6, *((1, 1) if kind == "conv" else ())
    )
    with pytest.raises(Refused, match="wd_on_output=False"):
        other.read_state(wrong, {}, "lycoris.safetensors")


def test_diffusers_loads_the_native_flux_file(cache, tmp_path):
    torch.manual_seed(0)
    flux = FluxTransformer2DModel(**FLUX).requires_grad_(False)
    other = FluxTransformer2DModel(**FLUX).requires_grad_(False)
    other.load_state_dict(flux.state_dict())
    net = shake(made("dora", flux, cache, rank=4, alpha=4.0), 0.1)
    net.save_weights(str(tmp_path / "a.safetensors"), None, {})
    state = read_tensors(tmp_path / "a.safetensors")[0]
    state = {key: value for key, value in state.items() if not key.endswith(".alpha")}  # it is the rank
    other.load_lora_adapter(state, prefix="transformer")
    inputs = {
        "hidden_states": torch.randn(1, 6, 16),
        "encoder_hidden_states": torch.randn(1, 3, 24),
        "pooled_projections": torch.randn(1, 20),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    torch.testing.assert_close(other(**inputs).sample, flux(**inputs).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_starts_equal_to_base(kind, dtype):
    model, x = base(kind, dtype), HOSTS[kind].example().to(dtype)
    before = model(x)
    network("dora", model).to(dtype)  # --full_bf16: the lengths themselves are rounded
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", HOSTS)
def test_norm_is_fp32(kind):
    _, made = adapted(kind, torch.bfloat16)
    for layer in made.layers():
        U, D = layer.factors()
        V = (
            layer.host.weight.double().flatten(1)
            + layer.scale * U.flatten(1).double() @ D.flatten(1).double()
        )
        with torch.autocast("cpu", torch.bfloat16):
            norm = layer.row_norm(U, D)
        torch.testing.assert_close(norm.double(), V.square().sum(1).sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", HOSTS)
def test_trained_adapter_under_autocast(kind):
    model, made = adapted(kind, torch.float32)
    x = HOSTS[kind].example()
    plain = base(kind)

    def change(out) -> torch.Tensor:
        made.zero_grad()
        d = (out(x) - plain(x)).float()
        d.square().sum().backward()
        return torch.cat([d.detach().flatten(), *(p.grad.flatten() for p in made.parameters())])

    want = change(model)
    with torch.autocast("cpu", torch.bfloat16):
        got = change(model)
    assert (got - want).norm() / want.norm() < 0.02  # a norm in bf16 would move y itself by 0.4 %


def test_dead_row_stays_finite_and_trainable():
    model = base("linear")
    with torch.no_grad():
        model.first.weight[3] = 0
    made = network("dora", model)
    x = HOSTS["linear"].example()
    model(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters())
    shake(made)
    made.zero_grad()
    model(x).square().sum().backward()
    assert made.layers()[0].magnitude.grad[3].abs() > 0


def test_row_norm_of_sum():
    generator = torch.Generator().manual_seed(0)
    W, U, D = (torch.randn(n, generator=generator, dtype=torch.float64) for n in ((9, 7), (9, 2), (2, 7)))
    want = (W + 0.3 * U @ D).square().sum(1).sqrt()
    torch.testing.assert_close(magnitude.row_norm(W, U, D, 0.3), want, rtol=1e-13, atol=0)
