"""The eight laws of every method × host × precision."""

from __future__ import annotations

import hashlib

import pytest
import torch
import torch.nn.functional as F
from toys import HOSTS, MERGED, METHODS, SHIPPED, base, network, shake

from lowrank.adapters import gate, penalty
from lowrank.adapters.targets import dense_weight
from lowrank.errors import Refused
from lowrank.models.memory import checkpointed

CASES = [
    (method, kind) for kind in HOSTS for method in METHODS if (method, kind) != ("experts on x", "conv")
]  # refused
laws = pytest.mark.parametrize(("method", "kind"), CASES, ids=[f"{m}-{k}" for m, k in CASES])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def digest(model) -> str:
    return hashlib.sha256(
        b"".join(p.detach().contiguous().view(torch.uint8).numpy().tobytes() for p in model.parameters())
    ).hexdigest()


def at(made, batch: int):
    """A timestep for every sample, for methods that need one."""
    return made.denoise_at(torch.tensor([100.0, 500.0, 900.0])[:batch])


@laws
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_law_1_starts_bit_equal_to_base(method, kind, dtype, cache):
    torch.manual_seed(0)
    model, x = base(kind, dtype), HOSTS[kind].example().to(dtype)
    before = model(x)
    made = network(method, model, cache)
    with at(made, 3):
        after = model(x)
        assert torch.equal(before, after)
        shake(made)
        assert not torch.equal(before, model(x))  # the law would be empty if the layers were not there
    made = network(method, model := base(kind), cache)
    made.cast_frozen(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), at(made, 3):
        inside = model(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inside, base(kind)(x.float()))


@laws
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_law_2_delta_weight_is_delta(method, kind, dtype, cache):
    torch.manual_seed(0)
    model = base(kind, dtype)
    made = shake(network(method, model, cache))
    t = torch.tensor([500.0])
    for layer in made.layers():
        if layer.method.experts is not None:
            assert layer.delta_weight() is None
            continue
        host, dW = layer.host, layer.delta_weight(t)
        x = torch.randn(1, host.in_channels, 9, 7) if layer.conv else torch.randn(1, 5, host.in_features)
        with made.denoise_at(t):
            y = (
                F.conv2d(x, host.weight.float(), None, host.stride, host.padding)
                if layer.conv
                else F.linear(x, host.weight.float())
            )
            bias = (
                0
                if host.bias is None
                else (host.bias.float()[:, None, None] if layer.conv else host.bias.float())
            )
            delta = layer.delta(x, y + bias)
        want = F.conv2d(x, dW, None, host.stride, host.padding) if layer.conv else F.linear(x, dW)
        assert dW.shape == host.weight.shape
        torch.testing.assert_close(delta, want, rtol=1e-4, atol=1e-4)  # fp32 sums in another order


@laws
def test_law_3_roles_partition_the_parameters(method, kind, cache):
    made = network(method, base(kind), cache)
    by_role = [p for layer in made.layers() for p in layer.roles().values()]
    assert len({id(p) for p in by_role}) == len(by_role)
    assert {id(p) for p in by_role} == {id(p) for p in made.parameters() if p.requires_grad}
    groups, names = made.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-3, 1e-4)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in by_role)
    assert len(names) == len(groups)


def test_law_3_gates_are_nested_and_never_empty():
    t = torch.arange(0, 1001)
    for rank, least, alpha in ((64, 1, 1.0), (51, 1, 1.0), (16, 8, 0.5), (8, 8, 2.0)):
        masks = gate.prefix(gate.open_ranks(t, rank, least, alpha), rank)
        opened = masks.sum(1)
        assert opened.min() >= least and opened[0] == rank
        assert bool((masks[1:] <= masks[:-1]).all())  # later in noise, never a rank more
        assert torch.equal(masks, (torch.arange(rank) < opened[:, None]).float())


def test_law_4_penalties():
    theta = [
        torch.randn(3, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(5, dtype=torch.float64, requires_grad=True),
    ]
    anchor, precision = [p.detach() + 0.5 for p in theta], [torch.rand(3, 4, dtype=torch.float64), 2.0]
    assert penalty.quadratic(theta, anchor, precision) > 0
    assert penalty.quadratic(anchor, anchor, precision) == 0
    assert torch.autograd.gradcheck(lambda *p: penalty.quadratic(p, anchor, precision), theta)


@laws
def test_law_5_save_load_is_bit_identical(method, kind, cache, tmp_path):
    made = shake(network(method, base(kind), cache))
    made.save_weights(str(tmp_path / "a.safetensors"), None, {"ss_note": "kept"})
    other = network(method, base(kind), cache)
    told = other.load_weights(str(tmp_path / "a.safetensors"))
    assert not told.missing_keys and not told.unexpected_keys
    ours, theirs = made.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    state = network(method, base(kind), cache)
    assert state.load_state_dict(ours, False) == ([], [])
    assert all(torch.equal(ours[key], value) for key, value in state.state_dict().items())


@laws
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_law_6_restore_keeps_base_unchanged(method, kind, dtype, cache):
    torch.manual_seed(0)
    model, x = base(kind, dtype), HOSTS[kind].example().to(dtype)
    hashed, before, names = digest(model), model(x), set(dict(model.named_modules()))
    one = shake(network(method, model, cache))
    with at(one, 3):
        changed = model(x)
    two = shake(network(method, model, cache), seed=1)
    with at(one, 3), at(two, 3):
        assert not torch.equal(model(x), changed)
    assert set(dict(model.named_modules())) == names and len(list(model.parameters())) == len(
        list(base(kind).parameters())
    )
    two.restore()
    with at(one, 3):
        assert torch.equal(model(x), changed)
    one.restore()
    assert torch.equal(model(x), before) and digest(model) == hashed
    assert all("forward" not in module.__dict__ for module in model.modules())


@laws
def test_law_7_checkpointed_gradient(method, kind, cache):
    torch.manual_seed(0)
    model, x = base(kind), HOSTS[kind].example()
    made = shake(network(method, model, cache))

    def gradient(recompute: bool, between: bool) -> list[torch.Tensor]:
        made.zero_grad()
        with at(made, 3):
            out = checkpointed(made.clock.now)(model, x) if recompute else model(x)
        if between:
            with torch.no_grad(), made.denoise_at(torch.tensor([1.0, 1.0, 1.0])):
                model(x)
        out.square().sum().backward()
        return [p.grad.clone() for p in made.parameters()]

    plain = gradient(False, False)
    assert any(g.abs().max() > 0 for g in plain)
    for between in (False, True):
        assert all(torch.equal(a, b) for a, b in zip(plain, gradient(True, between), strict=True))


@laws
def test_law_8_batch_equals_single_samples(method, kind, cache):
    """In float64: a CPU may choose another fp32 kernel for another batch size."""
    torch.manual_seed(0)
    model, x = base(kind), HOSTS[kind].example().double()
    made = shake(network(method, model, cache)).double()
    model.double()
    t = torch.tensor([100.0, 500.0, 900.0])
    with made.denoise_at(t):
        together = model(x)
        doubled = model(x.repeat_interleave(2, 0))  # two images per prompt
    for index in range(3):
        with made.denoise_at(t[index : index + 1]):
            alone = model(x[index : index + 1])
        assert alone.dtype == torch.float64
        exact = {"rtol": 1e-12, "atol": 1e-12}  # two layers in float64, whose rounding is 1e-16
        torch.testing.assert_close(together[index : index + 1], alone, **exact)
        twice = alone.expand(2, *alone.shape[1:])
        torch.testing.assert_close(doubled[2 * index : 2 * index + 2], twice, **exact)


@laws
def test_law_8_a_batch_of_strengths_is_batches_of_one(method, kind, cache):
    """With a strength for each sample a linear layer uses `delta`, not the fused sum of one strength."""
    torch.manual_seed(0)
    model, x = base(kind), HOSTS[kind].example().double()
    made = shake(network(method, model, cache)).double()
    model.double()
    strengths, t = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([100.0, 500.0, 900.0])
    made.set_multiplier(strengths)
    with made.denoise_at(t):
        together = model(x)
    for index, strength in enumerate(strengths):
        made.set_multiplier(float(strength))
        with made.denoise_at(t[index : index + 1]):
            alone = model(x[index : index + 1])
        # two layers in float64, whose rounding is 1e-16
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", (*MERGED, "tlora"))
def test_small_updates_survive_half_precision(method, cache):
    made = shake(network(method, base("linear"), cache), scale=1e-4)
    with torch.no_grad():
        before = [layer.delta_weight(torch.zeros(1)) for layer in made.layers()]
        made.to(torch.bfloat16)
        for layer, dW in zip(made.layers(), before, strict=True):
            if layer.method.magnitude is None:  # whose lengths are rounded
                assert dW is not None and dW.any()
                after = layer.delta_weight(torch.zeros(1))
                torch.testing.assert_close(after, dW.to(after), rtol=0, atol=0.02 * float(dW.abs().max()))


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("method", MERGED)
def test_merge_to_equals_live_output_and_restores(method, kind, cache):
    torch.manual_seed(0)
    model, x = base(kind), HOSTS[kind].example()
    hashed = digest(model)
    made = shake(network(method, model, cache))
    live = model(x)
    made.backup_weights()
    made.pre_calculation()
    torch.testing.assert_close(model(x), live, rtol=1e-5, atol=1e-5)
    made.restore_weights()
    assert digest(model) == hashed


@pytest.mark.parametrize("kind", HOSTS)
def test_dense_weight_flattens(kind):
    for module in base(kind).children():
        assert dense_weight(module).shape == (module.weight.shape[0], module.weight[0].numel())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", SHIPPED)
def test_quantised_base_is_adapted_and_unchanged(method, bits, cache):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 64)
    if bits == 4:
        packed = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    else:
        packed = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    packed.load_state_dict(plain.state_dict())
    model = torch.nn.Sequential(packed.to("cpu")).requires_grad_(False)
    x = torch.randn(3, 64)
    before = model(x)
    # 0.03: its rounding
    torch.testing.assert_close(dense_weight(packed).float(), plain.weight.detach(), rtol=0, atol=0.03)
    made, t = network(method, model, cache), torch.tensor([500.0])
    with made.denoise_at(t):
        assert torch.equal(model(x), before)
        shake(made)
        dW = made.layers()[0].delta_weight(t)
        delta = made.layers()[0].delta(x) if dW is None else F.linear(x, dW)
        torch.testing.assert_close(model(x), before + delta, rtol=1e-4, atol=1e-4)
    made.restore()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("method", SHIPPED)
def test_grouped_convolution_is_refused(method, cache):
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1, groups=4)).requires_grad_(False)
    with pytest.raises(Refused, match=r"lora_unet_0 is a grouped convolution \(groups=4\)"):
        network(method, model, cache)
    model(torch.randn(1, 8, 5, 5))  # and the model is as it was
    assert not {"forward"} & model[0].__dict__.keys()
