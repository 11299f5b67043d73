"""The shipped methods on FLUX's shapes and under kohya's contract."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel
from files import FLUX_DEV
from flux_adapters import base_of, flux, made  # noqa: F401 (fixture)
from toys import SHIPPED, base, network, shake

from lowrank.adapters import network_module
from lowrank.adapters.method import Factor, Gate, Magnitude, Method
from lowrank.adapters.targets import find
from lowrank.errors import Refused
from lowrank.tensors import read_tensors
from lowrank.train.network_module import facade_of, find_module, optimizer_groups

# Trainable parameters of FLUX.1-dev, by arithmetic over its layer shapes (rank × inputs, outputs × rank).
COUNTS = {
    64: {"lora": 179_306_496, "delta_r": 89_653_248, "delta_r_triu": 88_963_776, "qrlora": 179_306_496},
    16: {"lora": 44_826_624, "delta_r": 22_413_312, "delta_r_triu": 22_372_272, "qrlora": 44_826_624},
}
COUNTS = {rank: {**counts, "tlora": counts["lora"] + 342 * rank} for rank, counts in COUNTS.items()}
OUTPUTS = 19 * (8 * 3072 + 2 * (12288 + 3072)) + 38 * 3 * 3072  # DoRA has one length more for each
MORE = {"dora": OUTPUTS, "lalora": 0}  # than LoRA has
NULL = {  # halves of both sides and their norms; cores between directions
    rank: {
        "null_lora": counts["lora"] // 2 + 342 * rank,
        "universal_lora": 342 * rank**2,
        "network_null_lalora_plus": 342 * (rank**2 // 2 + rank),
    }
    for rank, counts in COUNTS.items()
}
COUNTS = {
    rank: {**counts, **NULL[rank], **{name: counts["lora"] + more for name, more in MORE.items()}}
    for rank, counts in COUNTS.items()
}
# EffiLoRA: a down for picture, text, and the hidden values of each; 4 ups and a router for each layer
EFFI = {rank: rank * (2 * (3072 + 12288) + 4 * OUTPUTS + 4 * 342) for rank in COUNTS}
COUNTS = {rank: {**counts, "effilora": EFFI[rank]} for rank, counts in COUNTS.items()}


@pytest.fixture(scope="module")
def flux_dev():
    with torch.device("meta"):
        return FluxTransformer2DModel(**FLUX_DEV)


@pytest.mark.parametrize("rank", COUNTS)
@pytest.mark.parametrize("name", SHIPPED)
def test_parameter_counts_of_flux_dev(name, rank, flux_dev, cache):
    net = made(name, flux_dev, cache, rank)
    assert len(net.layers()) == 342
    counted = sum(p.numel() for p in net.parameters())
    if name == "delta_r_triu":  # free entries: what the projection leaves of a matrix of ones
        counted = sum(
            int(layer.method.factor.constrain["delta_r"](torch.ones(layer.delta_r.shape)).sum())
            for layer in net.layers()
        )
    assert counted == COUNTS[rank][name]
    frozen = {b for layer in net.layers() for b in dict(layer.named_buffers()) if b != "alpha"}
    basis = {"delta_r": {"q"}, "delta_r_triu": {"q"}, "qrlora": {"q", "base_r"}}
    basis |= {"null_lora": {"null_up", "null_down"}, "universal_lora": {"basis_up", "basis_down"}}
    basis["network_null_lalora_plus"] = basis["null_lora"] | basis["universal_lora"]
    basis["tlora"] = {"base_p", "base_lambda", "base_q"}
    assert frozen == basis.get(name, set())
    net.restore()


def test_tensors_own_their_bytes(flux, cache):
    for name in SHIPPED:
        net = made(name, flux, cache)
        for layer in net.layers():
            for tensor in layer.tensors().values():
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
        net.restore()


NATIVE = {
    "lora": {"lora_A.weight", "lora_B.weight"},
    "dora": {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"},
    "lalora": {"lora_A.weight", "lora_B.weight"},
    "effilora": {"lora_A.weight", "lora_B.weight", "router"},
    "delta_r": {"lora.q.weight", "lora.base_r.weight", "lora.delta_r.weight"},
    "delta_r_triu": {"lora.q.weight", "lora.base_r.weight", "lora.delta_r.weight"},
    "qrlora": {"trained_down.weight", "trained_up.weight", "lora.q.weight", "lora.base_r.weight"},
    "null_lora": {"free_up", "free_down", "norm_up", "norm_down", "null_up", "null_down"},
    "universal_lora": {"basis_up", "basis_down", "core"},
    "network_null_lalora_plus": {
        *("null_up", "null_down", "norm_up", "norm_down"),
        *("basis_up", "basis_down", "core_up", "core_down"),
    },
    "tlora": {
        *("p_layer.weight", "lambda_layer", "q_layer.weight"),
        *("base_p", "base_lambda", "base_q"),
    },
}


@pytest.mark.parametrize("name", SHIPPED)
def test_native_keys(name, flux, cache, tmp_path):
    net = shake(made(name, flux, cache))
    net.save_weights(str(tmp_path / "a.safetensors"), None, {"ss_network_module": f"networks.{name}"})
    state, metadata = read_tensors(tmp_path / "a.safetensors")
    module = "transformer.single_transformer_blocks.0.attn.to_q"
    assert {key.removeprefix(module + ".") for key in state if key.startswith(module + ".")} == {
        *NATIVE[name],
        "alpha",
    }
    assert len(state) == 15 * (len(NATIVE[name]) + 1)
    told = {"lalora": "lora"}.get(name, name)  # what is held is an ordinary LoRA
    assert metadata["lowrank.method"] == told and metadata["lowrank.rank"] == "4"
    assert len(metadata["sshs_model_hash"]) == 64 and metadata["sshs_legacy_hash"] == "e3b0c442"
    net.restore()
    again, told = find_module(name).create_network_from_weights(
        1.0, str(tmp_path / "a.safetensors"), None, [], flux
    )
    assert again.load_state_dict(told, False) == ([], [])  # as kohya's gen_img does
    for ours, theirs in zip(net.layers(), again.layers(), strict=True):
        assert ours.rank == theirs.rank and ours.scale == theirs.scale
        assert all(torch.equal(value, theirs.tensors()[role]) for role, value in ours.tensors().items())


def test_save_basis_false_round_trip(flux, cache, tmp_path):
    for name in ("delta_r", "qrlora"):
        sizes = {}
        for keep in ("full", "q", "none"):
            net = shake(made(name, flux, cache, save_basis=keep))
            path = tmp_path / f"{name}-{keep}.safetensors"
            net.save_weights(str(path), None, {})
            net.restore()
            other = made(name, flux, cache)
            other.load_weights(str(path))
            other.restore()
            assert all(
                torch.equal(a, b)
                for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True)
            )
            sizes[keep] = len(read_tensors(path)[0])
        assert sizes["none"] < sizes["full"]
    net = made("delta_r", flux, cache)
    state, metadata = read_tensors(tmp_path / "delta_r-none.safetensors")
    with torch.no_grad():
        flux.transformer_blocks[0].attn.to_q.weight.add_(0.1)
    with pytest.raises(Refused, match="basis"):
        net.read_state(state, metadata, "other.safetensors")


def test_triu_stays_trapezoidal(flux, cache):
    net = made("delta_r_triu", flux, cache)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
    layer = net.layers()[0]
    for step in range(100):
        x = torch.randn(2, 3, layer.host.in_features, generator=torch.Generator().manual_seed(step))
        layer.host(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert layer.delta_r.abs().max() > 0.01
    assert torch.equal(layer.delta_r.tril(-1), torch.zeros_like(layer.delta_r))


def test_delta_r_in_bf16_keeps_small_updates(flux, cache):
    net = made("delta_r", flux, cache)
    layer = net.layers()[0]
    with torch.no_grad():
        layer.delta_r.normal_(generator=torch.Generator().manual_seed(0)).mul_(1e-4)
    x = torch.randn(64, layer.host.in_features)
    want = x.double() @ layer.delta_weight().double().T
    with torch.autocast("cpu", torch.bfloat16):
        got = layer.delta(x).double()
    assert ((got - want).norm() / want.norm()) < 5e-3  # bf16 rounds x, ΔR, h and the result once each


def test_official_files_are_read(flux, cache, tmp_path):
    net = shake(made("delta_r", flux, cache))
    official = {}
    for target, layer in zip(net.targets.values(), net.layers(), strict=True):
        module = target.native + (".to_out.0" if target.native.endswith("to_out.0") else "")
        for role, suffix in (("q", "q"), ("base_r", "base_r"), ("delta_r", "delta_r")):
            official[f"{module}.lora.{suffix}.weight"] = layer.tensors()[role].clone()
    other = made("delta_r", base_of(flux), cache)
    told = other.read_state(official, {}, "official.safetensors")
    assert not told.missing_keys and not told.unexpected_keys
    assert all(
        torch.equal(a.delta_weight(), b.delta_weight())
        for a, b in zip(net.layers(), other.layers(), strict=True)
    )


def test_contract_groups_rates_and_zero_rates(flux, cache):
    net = made("lora", flux, cache, loraplus_lr_ratio="16")
    groups, names = optimizer_groups(net, None, None, 1e-4)
    assert [(group["lr"], name) for group, name in zip(groups, names, strict=True)] == [
        (1e-4, "unet"),
        (1.6e-3, "unet plus"),
    ]
    ups = {id(layer.up) for layer in net.layers()}
    assert {id(p) for p in groups[1]["params"]} == ups
    with pytest.raises(Refused, match="learning rate is 0"):
        optimizer_groups(net, None, 0.0, 1e-4)
    net.restore()
    with pytest.raises(Refused, match="trains none"):
        made("delta_r", flux, cache, loraplus_lr_ratio="16")


def test_max_norm_scales_only_what_is_trained(cache):
    model = base("linear")
    for name in ("lora", "delta_r"):
        net = shake(network(name, model, cache), scale=3.0)
        frozen = [layer.q.clone() for layer in net.layers()] if name == "delta_r" else []
        count, mean, largest = net.apply_max_norm_regularization(1.0, "cpu")
        assert count == 2 and largest <= 1.0 and mean <= largest
        for layer in net.layers():
            assert layer.delta_weight().norm().item() == pytest.approx(1.0, rel=1e-4)
        assert all(torch.equal(q, layer.q) for q, layer in zip(frozen, net.layers(), strict=False))
        net.restore()


def test_composition_of_slots():
    factor = Factor(lambda *_: ({}, {}), ("down", "up"))
    gated = Method("a", factor, rates={"up": 4.0}) | Method("b", gate=Gate(lambda t, r: t))
    assert (
        gated.name == "a+b"
        and gated.factor is factor
        and gated.gate is not None
        and gated.rates == {"up": 4.0}
    )
    with pytest.raises(Refused, match="both fill the factor slot"):
        Method("a", factor) | Method("c", factor)
    with pytest.raises(Refused, match="sets rate up"):
        Method("a", rates={"up": 4.0}) | Method("c", rates={"up": 2.0})
    with pytest.raises(Refused, match="cannot work"):
        Method("a", gate=Gate(lambda t, r: t)) | Method("d", magnitude=Magnitude())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda f, c: find_module("delta_rr"), "did you mean 'delta_r'"),
        (lambda f, c: find_module("json"), "create_network"),
        (lambda f, c: made("delta_r", f, c, use_zeroinit="True"), "did you mean 'use_zero_init'"),
        (lambda f, c: made("delta_r", f, c, use_zero_init="maybe"), "not a yes or no"),
        (lambda f, c: made("lora", f, c, rank=33), "does not fit transformer.transformer_blocks.0.attn"),
        (lambda f, c: made("lora", f, c, target="nothing"), "no layer of FluxTransformer2DModel matches"),
        (lambda f, c: made("lora", f, c, exclude="nothing"), "no target layer"),
        (lambda f, c: made("lora", f, c, target="("), "not a regular expression"),
        (lambda f, c: find("unet", torch.nn.Sequential(torch.nn.Linear(2, 2))), "no default targets"),
    ],
)
def test_bad_network_arguments_are_refused(call, words, flux, cache):
    with pytest.raises(Refused, match=words) as told:
        call(flux, cache)
    assert "\n" not in str(told.value)


def test_nan_weight_is_named(flux, cache):
    with torch.no_grad():
        flux.transformer_blocks[0].ff.net[2].weight[3, 3] = float("nan")
    with pytest.raises(Refused, match="ff_net_2"):
        made("delta_r", flux, cache)


def test_mismatched_file_is_refused(flux, cache, tmp_path):
    net = made("delta_r", flux, cache)
    net.save_weights(str(tmp_path / "a.safetensors"), None, {})
    net.restore()
    with pytest.raises(Refused, match="use --network_module delta_r"):
        made("qrlora", flux, cache).load_weights(str(tmp_path / "a.safetensors"))
    with pytest.raises(Refused, match="--dim_from_weights"):
        made("delta_r", base_of(flux), cache, rank=2).load_weights(str(tmp_path / "a.safetensors"))
    with pytest.raises(Refused, match="keeps at zero"):
        state = {key: value + 1 for key, value in read_tensors(tmp_path / "a.safetensors")[0].items()}
        made("delta_r_triu", base_of(flux), cache).read_state(state, {}, "a.safetensors")
    with pytest.raises(Refused, match="made for another base"):
        network("lora", base("linear"), cache).read_state(
            read_tensors(tmp_path / "a.safetensors")[0], {}, "a"
        )
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:5000])
    with pytest.raises(Refused, match="not a whole safetensors file"):
        made("delta_r", base_of(flux), cache).load_weights(str(tmp_path / "b.safetensors"))


def test_facade_knows_its_defaults():
    assert facade_of(find_module("delta_r")).default_alpha(64) == 64.0
    assert facade_of(find_module("networks.lora")).default_alpha(64) == 1.0
    assert "target" in facade_of(find_module("lora")).known
    assert isinstance(facade_of(find_module("qrlora")), network_module.NetworkModule)


def test_unknown_arguments_warn_in_kohya_trainers(flux, cache, caplog):
    find_module("lora").create_network(1.0, 4, 1.0, None, [], flux, algo="loha")
    assert "algo" in caplog.text


def test_describe_is_complete(flux, cache):
    facts = made("delta_r", flux, cache, delta_scale="0.02").describe()
    assert json.loads(facts["lowrank.options"])["delta_scale"] == 0.02
    assert facts["lowrank.layers"] == "15" and len(facts["lowrank.basis_hash"]) == 64
