"""PiSSA, OLoRA, LoRA-FA and VeRA against PEFT's layers and independent formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FluxTransformer2DModel
from files import FLUX
from flux_adapters import made
from peft import LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from toys import HOSTS, RANK, base, network, shake

from lowrank.errors import Refused
from lowrank.formats.read import read_adapter
from networks import lora_fa, pissa, vera

ALPHA = 3.0
SCALE = ALPHA / RANK


def started(method, model, tmp_path, **arguments):
    """`method` (a module of networks/) on every layer of a model, at its start values, attached."""
    if "basis_cache" in method.create_network.__self__.known:
        arguments["basis_cache"] = str(tmp_path / "bases")
    net = method.create_network(1.0, RANK, ALPHA, None, [], model, target=".", **arguments)
    net.apply_to([], model, False, True)
    net.prepare_grad_etc([], model)
    return net


@pytest.mark.parametrize("kind", HOSTS)
def test_pissa_starts_at_the_principal_components(kind, tmp_path):
    model = base(kind)
    for layer in started(pissa, model, tmp_path).layers():
        W = layer.host.weight.double().flatten(1)
        P, S, V = torch.linalg.svd(W, full_matrices=False)
        top = P[:, :RANK] * S[:RANK] @ V[:RANK]
        U, D = layer.base_up.double().flatten(1), layer.base_down.double().flatten(1)
        # float32 factors: relative rounding 6e-8 of each entry, summed over RANK products
        assert (SCALE * U @ D - top).norm() <= 1e-6 * top.norm()
        for side in (U.mT @ U, D @ D.mT):  # the singular values are split evenly between both
            torch.testing.assert_close(side.diagonal(), S[:RANK] / SCALE, rtol=1e-5, atol=0)
            assert (side - side.diagonal().diag()).abs().max() <= 1e-5 * side.max()
        assert torch.equal(layer.up, layer.base_up) and torch.equal(layer.down, layer.base_down)


def test_olora_starts_at_the_qr_factors(tmp_path):
    model = base("linear")
    for layer in started(pissa, model, tmp_path, pissa_init="olora").layers():
        Q, R = torch.linalg.qr(layer.host.weight.double())
        torch.testing.assert_close(layer.up.double(), Q[:, :RANK], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.down.double(), R[:RANK], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", pissa.STARTS)
def test_forward_and_gradients_equal_peft(init, tmp_path):
    """PEFT subtracts the start from its copy of W; both compute one function of U and D."""
    model = base("linear", torch.float64)
    ours = started(pissa, model, tmp_path, pissa_init=init).to(torch.float64)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["first", "second"], init_lora_weights=init)
    theirs = get_peft_model(base("linear"), config).double()
    layers = [theirs.base_model.model.first, theirs.base_model.model.second]
    shake(ours, 0.1)
    for layer, peft in zip(ours.layers(), layers, strict=True):
        # the start that PEFT subtracted, with ours in its place: only rounding of the start differs
        peft.base_layer.weight.data = layer.host.weight - SCALE * layer.base_up @ layer.base_down
        peft.lora_A["default"].weight.data = layer.down.detach().clone()
        peft.lora_B["default"].weight.data = layer.up.detach().clone()
    x = HOSTS["linear"].example().double()
    for run in (model, theirs):
        run(x).square().sum().backward()
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-12, atol=1e-12)
    for layer, peft in zip(ours.layers(), layers, strict=True):
        torch.testing.assert_close(
            layer.down.grad, peft.lora_A["default"].weight.grad, rtol=1e-10, atol=1e-12
        )
        torch.testing.assert_close(layer.up.grad, peft.lora_B["default"].weight.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("init", pissa.STARTS)
def test_start_equals_peft(init, tmp_path):
    """The product of the start is the one that PEFT makes, whose SVD is in float32: 1e-5 of ‖W‖."""
    model = base("linear")
    ours = started(pissa, model, tmp_path, pissa_init=init)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["first", "second"], init_lora_weights=init)
    theirs = get_peft_model(base("linear"), config)
    for layer, peft in zip(
        ours.layers(), (theirs.base_model.model.first, theirs.base_model.model.second), strict=True
    ):
        start = peft.lora_B["default"].weight @ peft.lora_A["default"].weight
        assert (layer.up @ layer.down - start).norm() <= 1e-5 * layer.host.weight.norm()


def test_unknown_start_of_pissa():
    with pytest.raises(Refused, match=r"pissa_init 'corda' is not one of pissa, olora"):
        pissa.Options(pissa_init="corda")


def test_lora_fa_trains_the_up_alone(tmp_path):
    model = base("linear")
    net = started(lora_fa, model, tmp_path)
    assert {role for layer in net.layers() for role in layer.roles()} == {"up"}
    for layer in net.layers():
        bound = 1 / math.sqrt(layer.host.in_features)
        assert layer.down.abs().max() <= bound and layer.down.std() == pytest.approx(
            bound / math.sqrt(3), rel=0.2
        )
        assert not layer.up.any() and not layer.down.requires_grad
    with pytest.raises(Refused, match="save_basis=none leaves out down, which are drawn at random"):
        lora_fa.create_network(1.0, RANK, ALPHA, None, [], base("linear"), target=".", save_basis="none")


def test_vera_equals_peft(tmp_path):
    model = nn.Sequential(nn.Linear(24, 40)).double().requires_grad_(False)
    twin = nn.Sequential(nn.Linear(24, 40)).double()
    twin.load_state_dict(model.state_dict())
    net = vera.create_network(1.0, RANK, RANK, None, [], model, target=".")
    net.apply_to([], model, False, True)
    shake(net.to(torch.float64), 0.3)
    (layer,) = net.layers()
    theirs = get_peft_model(twin, VeraConfig(r=RANK, target_modules=["0"], d_initial=0.1))
    peft = theirs.base_model.model[0]
    peft.vera_A["default"].data = layer.vera_A.clone()
    peft.vera_B["default"].data = layer.vera_B.clone()
    peft.vera_lambda_d["default"].data = layer.vera_lambda_d.detach().clone()
    peft.vera_lambda_b["default"].data = layer.vera_lambda_b.detach().clone()
    x = torch.randn(3, 24, dtype=torch.float64)
    for run in (model, theirs):
        run(x).square().sum().backward()
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-12, atol=1e-12)
    for role in ("vera_lambda_d", "vera_lambda_b"):
        torch.testing.assert_close(
            layer.roles()[role].grad, getattr(peft, role)["default"].grad, rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize("kind", HOSTS)
def test_vera_delta_weight(kind):
    model = base(kind)
    net = shake(network("vera", model), 0.3)
    for layer in net.layers():
        A, B = (value.double().flatten(1) for value in (layer.vera_A, layer.vera_B))
        want = SCALE * layer.vera_lambda_b.double().diag() @ B @ layer.vera_lambda_d.double().diag() @ A
        got = layer.delta_weight().double().flatten(1)
        assert (got - want).norm() <= 1e-6 * want.norm()  # products of float32 factors


def blocks() -> nn.Module:
    """Three layers of one shape and one of another."""
    torch.manual_seed(3)
    return nn.Sequential(*(nn.Linear(24, 24) for _ in range(3)), nn.Linear(24, 16)).requires_grad_(False)


def test_vera_layers_of_one_shape_share_their_matrices(tmp_path):
    net = vera.create_network(1.0, RANK, RANK, None, [], blocks(), target=".")

    def storages(role: str) -> int:
        return len({getattr(layer, role).data_ptr() for layer in net.layers()})

    assert (storages("vera_A"), storages("vera_B")) == (1, 2)
    net.cast_frozen(torch.bfloat16)
    assert (storages("vera_A"), storages("vera_B")) == (1, 2)
    net.to(torch.float64)
    assert (storages("vera_A"), storages("vera_B")) == (1, 2)
    again = vera.create_network(1.0, RANK, RANK, None, [], blocks(), target=".", vera_seed="1")
    assert not torch.equal(net.layers()[0].vera_A.float(), again.layers()[0].vera_A)


def test_vera_file_without_its_matrices(tmp_path):
    model, path = blocks(), tmp_path / "vera.safetensors"
    net = vera.create_network(1.0, RANK, RANK, None, [], model, target=".", vera_seed="5", save_basis="none")
    net.apply_to([], model, False, True)
    shake(net, 0.3)
    net.save_weights(str(path), None, {})
    assert {key.rsplit(".", 1)[1] for key in load_file(path)} == {"vera_lambda_d", "vera_lambda_b", "alpha"}
    x = torch.randn(2, 24)
    want = model(x)
    net.restore()
    again, _ = vera.create_network_from_weights(1.0, str(path), None, [], model)
    again.apply_to([], model, False, True)
    again.load_weights(str(path))
    assert torch.equal(model(x), want)


def test_vera_file_with_other_matrices_for_one_layer(tmp_path):
    model, path = blocks(), tmp_path / "vera.safetensors"
    net = vera.create_network(1.0, RANK, RANK, None, [], model, target=".")
    net.apply_to([], model, False, True)
    net.save_weights(str(path), None, {})
    state = load_file(path)
    changed = next(key for key in state if key.endswith("1.vera_A"))
    save_file(state | {changed: state[changed] + 1}, path)
    with pytest.raises(Refused, match="different vera_A tensors for lora_unet_1 and lora_unet_0"):
        net.load_weights(str(path))


@pytest.mark.parametrize("method", ["pissa", "lora_fa", "vera"])
def test_file_is_read_as_one_low_rank_change(method, tmp_path):
    model, path = FluxTransformer2DModel(**FLUX).requires_grad_(False), tmp_path / "a.safetensors"
    net = shake(made(method, model, tmp_path / "bases"), 0.2)
    net.save_weights(str(path), None, {"ss_network_module": f"networks.{method}"})
    adapter = read_adapter(path, "flux")
    assert len(adapter.layers) == len(net.layers())
    deltas = {adapter.name(place): delta for place, delta in adapter.layers.items()}
    for layer in net.layers():
        delta = deltas[net.targets[layer.name].native.removeprefix("transformer.")]
        want = layer.delta_weight().double()
        got = delta.scale * delta.up.double() @ delta.down.double()
        assert (got - want).norm() <= 1e-6 * want.norm()  # products of float32 factors
