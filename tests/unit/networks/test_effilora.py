"""EffiLoRA: who shares a down, the mixture by its formula, which layers learn, one ΔW by least squares."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from flux_run import same
from kohya_models import SD15, tiny
from processes import launch_several
from repository import ROOT
from safetensors.torch import load_file
from sd_run import arguments, folders, one_thread  # noqa: F401 - the first two are fixtures
from torch import nn
from toys import HOSTS, Linears, base, shake

from lowrank.adapter_file import read_adapter_file
from lowrank.adapters import experts
from lowrank.adapters.method import Chain, Factor, Gate, Method
from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.targets import find
from lowrank.cli.sd_train import main
from lowrank.errors import Refused
from lowrank.formats.delta import delta_of
from lowrank.formats.nearest_lora import least_squares, unrouted
from lowrank.formats.read import read_adapter
from lowrank.naming.places import LayerPath
from lowrank.tensors import read_tensors, write_tensors
from lowrank.train.layer_sampling import LayerSampler
from networks import dora, effilora, lora, null_lora


def network(model, rank: int = 4, alpha: float = 3.0, target: str = ".", **own) -> AdapterNetwork:
    given = {name: str(value) for name, value in own.items()}
    torch.manual_seed(0)
    net = effilora.create_network(1.0, rank, alpha, None, [], model, target=target, **given)
    net.apply_to([], model, False, True)
    net.prepare_grad_etc([], model)
    return net


def joined(method: Method, model, rank: int = 4) -> AdapterNetwork:
    torch.manual_seed(0)
    net = AdapterNetwork(method, find("unet", model, target="."), lambda _: (rank, 3.0))
    net.start()
    net.apply_to([], model, False, True)
    return net


# ------------------------------------------------------------------ who shares a down

READS = {
    "picture": (
        *("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k", "mid_block.attentions.0.proj_in"),
        *("input_blocks.4.1.transformer_blocks.0.attn2.to_q", "up_blocks.1.attentions.0.proj_out"),
        *("middle_block.1.transformer_blocks.0.attn2.to_out.0", "down_blocks.0.resnets.0.conv1"),
        *("output_blocks.0.1.transformer_blocks.0.ff.net.0.proj", "input_blocks.1.0.in_layers.2"),
        *("transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.3.attn.to_q"),
        *("double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0", "single_blocks.1.linear1"),
        *("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.0.mlp.fc1"),
    ),
    "text": (
        *(
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
            "transformer_blocks.0.attn.to_add_out",
        ),
        *("output_blocks.0.1.transformer_blocks.0.attn2.to_v", "transformer_blocks.7.attn.add_q_proj"),
        *("transformer_blocks.0.ff_context.net.0.proj", "double_blocks.2.txt_attn.qkv"),
        *("double_blocks.2.txt_mlp.0", "double_blocks.2.txt_attn.proj"),
    ),
    "hidden": (
        *("down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2", "double_blocks.0.img_mlp.2"),
        *("transformer_blocks.0.ff.net.2", "text_model.encoder.layers.0.mlp.fc2"),
    ),
    "text hidden": ("transformer_blocks.0.ff_context.net.2", "double_blocks.0.txt_mlp.2"),
    "tokens and hidden": ("single_transformer_blocks.0.proj_out", "single_blocks.0.linear2"),
    "condition": (
        *("down_blocks.0.resnets.0.time_emb_proj", "input_blocks.1.0.emb_layers.1"),
        *("transformer_blocks.0.norm1_context.linear", "double_blocks.0.img_mod.lin"),
    ),
}


@pytest.mark.parametrize("stream", READS)
def test_input_space_of_layer_path(stream):
    assert {path: effilora.stream_of(path) for path in READS[stream]} == dict.fromkeys(READS[stream], stream)


def test_shared_downs_by_kohya_and_diffusers_names():
    """Of a tiny U-Net with text encoders: one A for each part, stream and shape, and one parameter group."""
    encoders, unet = tiny("sd")
    net = effilora.create_network(1.0, 4, 2.0, None, encoders, unet, conv_dim="2")
    net.apply_to(encoders, unet, True, True)
    classes: dict[tuple, set[int]] = {}
    for layer in net.layers():
        target = net.targets[layer.name]
        key = (target.part, effilora.stream_of(target.path), tuple(layer.roles()["down"].shape))
        classes.setdefault(key, set()).add(id(layer.roles()["down"]))
    assert all(len(found) == 1 for found in classes.values())
    assert len(set.union(*classes.values())) == len(classes) > 10
    assert {key[0] for key in classes} == {"te", "unet"}
    groups, _ = net.prepare_optimizer_params(1e-3, 1e-3)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(net.parameters()))


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({"num_experts": 1}, 411_392),
        ({"num_experts": 3}, 12_032 + 3 * 399_360 + 128 * 4 * 3),
        ({"num_experts": 3, "router_input": "x"}, 12_032 + 3 * 399_360 + 298_368),
    ],
)
def test_parameter_counts_of_sd15_attention(given, count):
    """The formulas of the paper's setting: rank 4, q, k, v and out of every attention."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
    net = network(unet, target=r"attn\d\.to_", **given)
    assert len(net.layers()) == 128
    assert sum(p.numel() for p in net.parameters()) == count


# ------------------------------------------------------------------ the mixture


@pytest.mark.parametrize("scope", effilora.SCOPES)
@pytest.mark.parametrize(("kind", "read"), [("linear", "h"), ("linear", "x"), ("conv", "h")])
def test_branch_equals_formula(kind, read, scope):
    """s·Σₑ wₑ(x)·Bₑ·A x, position by position in float64."""
    model = base(kind, torch.float64)
    net = shake(network(model, num_experts=3, router_input=read, router_scope=scope).double(), 1.0)
    x = HOSTS[kind].example().double()
    layer, host = net.layers()[0], model.first
    before = (
        F.conv2d(x, host.weight, host.bias, 2, 1) if kind == "conv" else F.linear(x, host.weight, host.bias)
    )
    A, B, G = layer.down, layer.up.flatten(2), layer.router
    h = F.conv2d(x, A, None, 2, 1).movedim(1, -1) if kind == "conv" else x @ A.T
    z = h if read == "h" else x
    want = torch.zeros(*h.shape[:-1], B.shape[1], dtype=x.dtype)
    for n in range(len(x)):
        for place in torch.cartesian_prod(*(torch.arange(size) for size in h.shape[1:-1])).reshape(
            -1, h.dim() - 2
        ):
            at = (n, *place.tolist())
            seen = z[at] if scope == "token" else z[n].flatten(0, -2).mean(0)
            w = (G @ seen).softmax(0)
            want[at] = layer.scale * sum(w[e] * (B[e] @ h[at]) for e in range(3))
    want = want.movedim(-1, 1) if kind == "conv" else want
    torch.testing.assert_close(host(x), before + want)
    torch.testing.assert_close(layer.delta(x), want)


def test_training_equals_evaluation_mode():
    model, x = base("linear"), Linears.example()
    net = shake(network(model))
    assert torch.equal(net.train() and model(x), net.eval() and model(x))


@pytest.mark.parametrize("kind", HOSTS)
def test_experts_train_and_diverge(kind):
    model, x = base(kind), HOSTS[kind].example()
    net = network(model)
    torch.manual_seed(1)
    want = torch.randn_like(model(x))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for step in range(10):
        optimizer.zero_grad()
        loss = (model(x) - want).square().mean()
        loss.backward()
        for layer in net.layers():
            assert (layer.up.grad.flatten(1).norm(dim=1) > 0).all()
            assert step == 0 or (layer.router.grad.norm(dim=1) > 0).all()
            assert step == 0 or layer.down.grad.norm() > 0
        optimizer.step()
    for layer in net.layers():
        ups = layer.up.detach().flatten(1)
        assert torch.pdist(ups).min() > 1e-3 * ups.norm()


def test_experts_of_other_factor_role():
    """A core between frozen sides has experts as well as an up: role = factor.loraplus[0]."""

    def start(weights, ranks, scales):
        made = {}
        for name, weight in weights.items():
            (outs, ins), rank = weight.shape, ranks[name]
            sides = {"basis_up": torch.randn(outs, rank), "basis_down": torch.randn(rank, ins)}
            made[name] = {**sides, "core_up": torch.zeros(rank, rank)}
        return made, {}

    chain = Chain(("basis_up", "core_up"), ("basis_down",))
    factor = Factor(start, ("core_up",), (chain,), loraplus=("core_up",))
    own = effilora.experts(effilora.Options(num_experts=2), factor)
    assert own.factor is None and own.experts is not None and own.experts.role == "core_up"
    model, x = base("linear"), Linears.example()
    before = model(x)
    net = joined(Method("core", factor) | own, model)
    assert torch.equal(model(x), before) and net.layers()[0].core_up.shape == (2, 4, 4)
    layer = shake(net).layers()[0]
    h = x @ layer.basis_down.T
    w = experts.softmax_router(h, layer.router)
    want = sum(w[..., e, None] * (h @ (layer.basis_up @ layer.core_up[e]).T) for e in range(2))
    torch.testing.assert_close(layer.delta(x), layer.scale * want)
    with pytest.raises(Refused, match="trains none"):
        effilora.experts(effilora.Options(), dataclasses.replace(factor, loraplus=()))


@pytest.mark.parametrize("kind", HOSTS)
def test_experts_of_null_space_with_dora(kind, tmp_path):
    """Two chains, of which one has experts: the base at first, every tensor learns, files, one ΔW."""
    null = null_lora.method(null_lora.Options())
    routed = null | effilora.experts(effilora.Options(num_experts=3), null.require_factor()) | dora.LENGTHS
    model, x = base(kind), HOSTS[kind].example()
    before = model(x)
    net = joined(routed, model)
    assert torch.equal(model(x), before)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(p.grad.flatten(1).norm(dim=1).gt(0).all() for p in net.parameters() if p.dim() > 1)
    live = model(x)
    net.save_weights(str(tmp_path / "a"), None, {})
    state, errors = unrouted(net, lambda: model(x))
    net.restore()
    again = joined(routed, model)
    assert again.load_weights(str(tmp_path / "a")) == ([], []) and torch.equal(model(x), live)
    again.restore()
    plain, _ = dora.create_network_from_weights(1.0, None, None, [], model, weights_sd=state, target=".")
    plain.apply_to([], model, False, True)
    assert plain.load_state_dict(state, False) == ([], [])
    assert (model(x) - live).norm() < 0.1 * (live - before).norm() and max(
        one.share for one in errors.values()
    ) < 0.5


def test_effilora_error_messages():
    for given, words in (
        ({"num_experts": 0}, "num_experts=0 is below 1"),
        ({"num_experts": 1_000_000}, "num_experts=1000000 is above 256"),
        ({"router_input": "y"}, "router_input=y is not one of h, x"),
        ({"router_scope": "tokens"}, "did you mean"),
        ({"effi_update_ratio": 0.0}, "effi_update_ratio=0"),
        ({"effi_probe_every": 0}, "effi_probe_every=0"),
    ):
        with pytest.raises(Refused, match=words):
            effilora.Options(**given)
    with pytest.raises(Refused, match="route on h"):
        network(base("conv"), router_input="x")


# ------------------------------------------------------------------ files


def test_file_metadata(tmp_path):
    model, x, path = base("linear"), Linears.example(), str(tmp_path / "a.safetensors")
    net = shake(network(model, num_experts=3, router_input="x", router_scope="sample"))
    live = model(x)
    net.save_weights(path, None, {})
    net.restore()
    again, _ = effilora.create_network_from_weights(1.0, path, None, [], model, target=".")
    again.apply_to([], model, False, True)
    assert again.load_weights(path) == ([], [])
    assert torch.equal(model(x), live)


def test_one_expert_equals_lora_with_shared_down(tmp_path):
    model, path = nn.Sequential(*(nn.Linear(24, 24) for _ in range(3))).requires_grad_(False), tmp_path / "a"
    net = shake(network(model, num_experts=1), 0.1)
    x = torch.randn(2, 5, 24)
    live = model(x)
    assert net.method.experts is None and len({id(layer.down) for layer in net.layers()}) == 1
    net.save_weights(str(path), None, {})
    state = {}
    for module, roles in read_adapter_file(path).layers.items():
        layer = delta_of(module, roles, str(path))
        state |= {f"{module}.lora_up.weight": layer.up, f"{module}.lora_down.weight": layer.down}
        state[f"{module}.alpha"] = torch.tensor(layer.scale * layer.rank)
    write_tensors(tmp_path / "plain", state, {"lowrank.method": "lora"})
    net.restore()
    plain, _ = lora.create_network_from_weights(1.0, str(tmp_path / "plain"), None, [], model, target=".")
    plain.apply_to([], model, False, True)
    assert plain.load_weights(str(tmp_path / "plain")) == ([], [])
    assert torch.equal(model(x), live)


# ------------------------------------------------------------------ which layers learn


class Chained(nn.Module):
    """Six layers added to one stream, the last of which nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x):
        for index, part in enumerate(self.parts):
            x = x + (0 if index == 5 else 1) * torch.tanh(part(x))
        return x


def sampled(ratio: float = 0.5, probed: int = 2, every: int = 1):
    """(model, network, sampler, loss) on fixed data; the probes' loss is the training's."""
    torch.manual_seed(0)
    model = Chained().requires_grad_(False)
    given = {"effi_update_ratio": ratio, "effi_probe_every": every, "effi_probe_layers": probed}
    net = network(model, rank=2, num_experts=2, **given)
    x = torch.randn(16, 8)
    want = torch.randn(16, 8)

    def loss():
        return (model(x) - want).square().mean()

    held = SimpleNamespace(seed=5, measure=lambda *_: float(loss()))
    return model, net, LayerSampler(net.method.updates, net, held, Accelerator(cpu=True)), loss


def test_ups_of_undrawn_layers_do_not_change():
    _, net, sampler, loss = sampled(every=1000)
    shake(net)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.1)
    moved: dict[str, int] = {layer.name: 0 for layer in net.layers()}
    for step in range(8):
        before = {layer.name: layer.up.detach().clone() for layer in net.layers()}
        routers = [layer.router.detach().clone() for layer in net.layers()]
        optimizer.zero_grad()
        loss().backward()
        sampler.mask_gradients(step)
        optimizer.step()
        learned = {layer.name for layer in net.layers() if not torch.equal(layer.up, before[layer.name])}
        assert learned == sampler.learning(step) and len(learned) == 3
        assert not any(torch.equal(a.router, b) for a, b in zip(net.layers(), routers, strict=True))
        for name in learned:
            moved[name] += 1
    assert all(0 < count < 8 for count in moved.values())
    assert network(Chained(), rank=2).method.updates is None


def test_all_layers_train_in_kohya_trainers():
    net = network(Chained(), rank=2, effi_update_ratio=0.5)
    with pytest.raises(Refused, match=r"updates a fraction of 0\.5 of its layers"):
        net.prepare_network(SimpleNamespace(mixed_precision="bf16"))


def test_importance_of_unused_layer():
    _, net, sampler, loss = sampled()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-2)
    strengths = [layer.multiplier for layer in net.layers()]
    for step in range(40):
        optimizer.zero_grad()
        loss().backward()
        told = sampler.mask_gradients(step)
        assert (told.keys() == {"updates/loss_rise"}) == (step > 0)
        optimizer.step()
    assert strengths == [layer.multiplier for layer in net.layers()]
    *useful, useless = (sampler.importance[layer.name] for layer in net.layers())
    assert useless < min(useful)
    most = max(sampler.importance, key=lambda name: sampler.importance[name])
    drawn = [name for step in range(200) for name in sampler.learning(step)]
    assert drawn.count(net.layers()[-1].name) < 0.8 * drawn.count(most)


def test_importance_is_saved_exactly(tmp_path):
    _, net, sampler, _ = sampled()
    shake(net)
    for step in range(1, 6):
        sampler.probe(step)
    _, _, other, _ = sampled()
    sampler.save(tmp_path)
    other.load(tmp_path)
    assert other.importance == sampler.importance
    assert [other.learning(step) for step in range(20)] == [sampler.learning(step) for step in range(20)]
    other.importance = {}
    assert [other.learning(step) for step in range(20)] != [sampler.learning(step) for step in range(20)]


HASHED = """
import hashlib, torch
from torch import nn
from networks import effilora
torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(n, 6 + n % 2) for n in (6, 6, 7, 6, 7)))
net = effilora.create_network(1.0, 2, 2.0, None, [], model, target=".")
net.apply_to([], model)
groups, _ = net.prepare_optimizer_params(1.0, 1.0)
order = [*(layer.name for layer in net.layers()), *groups[0]["params"], *net.native_state().items()]
print(hashlib.sha256(repr(order).encode()).hexdigest())
"""


@pytest.mark.slow
def test_order_is_independent_of_hash_seed():
    """Layers, parameters and tensors of a file, with the start values that follow from the order."""
    more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", HASHED],
            cwd=ROOT,
            env={**os.environ, **more, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    told = [run.communicate()[0] for run in runs]
    assert told[0] == told[1] and len(told[0].strip()) == 64


# ------------------------------------------------------------------ one ΔW


def test_least_squares_static_up():
    torch.manual_seed(0)
    ups, u = torch.randn(3, 7, 4, dtype=torch.float64), torch.randn(500, 4, dtype=torch.float64)
    w = experts.softmax_router(u, 2 * torch.randn(3, 4, dtype=torch.float64))
    wide = experts.mixed_hidden(u, w)
    live = wide @ experts.stacked_ups(ups).T
    static, error = least_squares(ups, wide.T @ wide)
    torch.testing.assert_close(static.T, torch.linalg.lstsq(u, live).solution)
    assert error == pytest.approx((float((live - u @ static.T).norm()), float(live.norm())), rel=1e-9)
    mean = float((live - u @ ups.mean(0).T).norm() / live.norm())
    assert error.share < mean
    same_ups = ups[:1].expand(3, 7, 4)
    static, error = least_squares(same_ups, wide.T @ wide)
    torch.testing.assert_close(static, ups[0])
    assert error.share < 1e-6
    unseen = torch.zeros(12, 12)  # where there were no data, the experts' mean
    static, error = least_squares(ups, unseen)
    torch.testing.assert_close(static, ups.mean(0))
    assert error.share == 0


@pytest.mark.parametrize("kind", HOSTS)
def test_unrouted_error(kind, tmp_path):
    model, x = base(kind), HOSTS[kind].example(8)
    net = shake(network(model, num_experts=2), 0.2)
    layer = net.layers()[1]
    reads = []
    handle = layer.host.register_forward_pre_hook(lambda _, inputs: reads.append(inputs[0]))
    state, errors = unrouted(net, lambda: model(x))
    handle.remove()
    live = layer.delta(reads[0]).detach()
    net.restore()
    plain, _ = lora.create_network_from_weights(1.0, None, None, [], model, weights_sd=state, target=".")
    plain.apply_to([], model, False, True)
    assert plain.load_state_dict(state, False) == ([], [])
    deltas = plain.layers()[1].delta(reads[0]).detach()
    assert 0 < errors[layer.name].share < 0.5
    lost = float((deltas - live).norm()), float(live.norm())
    assert errors[layer.name] == pytest.approx(lost, rel=1e-4)


def test_unrouted_keeps_dora_gain():
    model, x = base("linear"), Linears.example(8)
    method = effilora.method(effilora.Options(num_experts=2)) | dora.LENGTHS
    net = shake(joined(method, model), 0.2)
    gains = [layer._row_scale(*layer.factors()) for layer in net.layers()]
    state, errors = unrouted(net, lambda: model(x))
    live = model(x)
    net.restore()
    plain, _ = dora.create_network_from_weights(1.0, None, None, [], model, weights_sd=state, target=".")
    plain.apply_to([], model, False, True)
    assert plain.load_state_dict(state, False) == ([], [])
    for layer, gain in zip(plain.layers(), gains, strict=True):
        torch.testing.assert_close(layer._row_scale(*layer.factors()), gain)
    assert (model(x) - live).norm() < 0.2 * live.norm() and max(one.share for one in errors.values()) < 0.5


def test_several_experts_are_refused_as_lora(tmp_path):
    net = shake(network(base("linear")))
    net.save_weights(str(tmp_path / "a.safetensors"), None, {})
    with pytest.raises(Refused, match="4 experts and a router"):
        layers = [LayerPath("unet", name) for name in ("first", "second")]
        read_adapter(tmp_path / "a.safetensors", base=layers)
    assert not net.is_mergeable()
    with pytest.raises(Refused, match="no one ΔW"):
        net.merge_to(None, None)


def test_unrouted_refuses_without_static_up():
    model = base("linear")
    net = network(model, num_experts=1)
    with pytest.raises(Refused, match="has one ΔW"):
        unrouted(net, lambda: None)
    net.restore()
    net = network(model)
    with pytest.raises(Refused, match="never reached"):
        unrouted(net, lambda: model.first(Linears.example()))
    net.restore()
    gated = effilora.method(effilora.Options()) | Method("gate", gate=Gate(lambda t, rank: t))
    with pytest.raises(Refused, match="depends on the timestep"):
        unrouted(joined(gated, model), lambda: None)


# ------------------------------------------------------------------ whole runs


@pytest.mark.slow
def test_save_load_resume(arguments, tmp_path, tiny_sd):
    more = (
        *("--network_module", "effilora", "--max_train_steps", "3", "--save_every_n_steps", "2"),
        *("--save_state", "--network_args", "num_experts=2", "effi_update_ratio=0.5"),
        *("effi_probe_every=1", "effi_probe_layers=20"),
    )
    assert main(arguments("whole", *more)) == 0
    whole, second = tmp_path / "whole", tmp_path / "second"
    assert main(arguments("second", *more, "--resume", str(whole / "cat-step00000002-state"))) == 0
    assert same(whole / "cat.safetensors", second / "cat.safetensors")
    told = [(folder / "cat-state" / "importance.json").read_text() for folder in (whole, second)]
    assert told[0] == told[1] and len(told[0]) > 100
    state = load_file(whole / "cat.safetensors")
    ups = [value for key, value in state.items() if key.endswith("lora_up.weight")]
    assert all(up.shape[0] == 2 for up in ups) and any(up.any() for up in ups)
    assert read_tensors(whole / "cat.safetensors")[1]["lowrank.method"] == "effilora"


@pytest.mark.slow
def test_effilora_two_processes_equal_doubled_accumulation(arguments, tmp_path):
    """As one process with twice the accumulation, bit for bit."""
    more = (
        *(
            "--network_module",
            "effilora",
            "--network_train_unet_only",
            "--save_state",
            "--max_train_steps",
            "3",
        ),
        *("--network_args", "num_experts=2", "effi_update_ratio=0.5", "effi_probe_every=1"),
    )
    launch_several("train_network_ABM.py", arguments("two", *more), tmp_path)
    with one_thread():
        assert main(arguments("one", *more, "--gradient_accumulation_steps", "2")) == 0
    assert same(tmp_path / "two" / "cat.safetensors", tmp_path / "one" / "cat.safetensors")
    told = [(tmp_path / run / "cat-state" / "importance.json").read_text() for run in ("two", "one")]
    assert told[0] == told[1] and len(told[0]) > 100
