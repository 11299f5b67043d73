"""T-LoRA: its schedule, its start, its gradients, and its files beside LyCORIS' own modules."""

from __future__ import annotations

import json
import re

import lycoris
import pytest
import torch
from flux_adapters import base_of, digest, flux, made
from lycoris.modules.tlora import compute_timestep_mask
from lycoris.wrapper import LycorisNetwork
from repository import ROOT
from safetensors.torch import save_file
from tlora_reference import AUTHORS, LIKE_LYCORIS, TIMES, at_each, export, out, own_presets  # noqa: F401
from toys import HOSTS, base, network, shake

from lowrank.adapter_file import read_adapter_file
from lowrank.adapters import gate
from lowrank.adapters.gate import Schedule
from lowrank.adapters.layer import AdaptedLayer
from lowrank.combine.mixture import read_mixture
from lowrank.combine.pipeline import timestep_ranks
from lowrank.errors import Refused
from lowrank.formats.delta import delta_of
from lowrank.tensors import read_tensors
from lowrank.train.network_module import create, find_module
from networks import tlora

__all__ = ["flux"]  # the fixture


# ------------------------------------------------------------------ the schedule


ROWS = {  # (R, R_min, α): open ranks at t = 0, 250, 500, 750, 999
    (64, 1, 1.0): (64, 48, 32, 16, 1),
    (64, 1, 2.0): (64, 36, 16, 4, 1),
    (64, 1, 0.5): (64, 55, 45, 32, 2),
    (64, 32, 1.0): (64, 56, 48, 40, 32),
    (64, 32, 2.0): (64, 50, 40, 34, 32),
    (64, 32, 0.5): (64, 59, 54, 48, 33),
    (64, 16, 1.0): (64, 52, 40, 28, 16),
    (32, 16, 1.0): (32, 28, 24, 20, 16),
    (16, 8, 1.0): (16, 14, 12, 10, 8),
    (8, 4, 1.0): (8, 7, 6, 5, 4),
    (4, 2, 1.0): (4, 3, 3, 2, 2),
}
# what the SimpleTuner guide prints for R = 64, R_min = 1, by (α, t)
WRONG = {(2.0, 250): 60, (2.0, 500): 48, (2.0, 750): 20, (0.5, 500): 46, (0.5, 750): 33, (0.5, 999): 1}


@pytest.mark.parametrize(("row", "ranks"), ROWS.items(), ids=str)
def test_schedule_values(row, ranks):
    R, least, alpha = row
    opened = Schedule(least, alpha).open(torch.tensor([float(t) for t in TIMES]), R)
    assert tuple(opened.tolist()) == ranks
    paired = Schedule(least, alpha, group=2).open(torch.tensor(TIMES), 2 * R)
    assert torch.equal(paired, 2 * opened)


def test_wrong_numbers_of_guide():
    page = (ROOT / "docs" / "tlora.md").read_text(encoding="utf-8")
    for (alpha, t), wrong in WRONG.items():
        right = int(gate.open_ranks(torch.tensor([float(t)]), 64, 1, alpha))
        assert right != wrong
        assert re.search(rf"\| {alpha:g} \| {t} \| {wrong} \| \*\*{right}\*\* \|", page)


def test_linear_schedule_in_integers():
    t = torch.arange(0, 1001)
    for R in (*range(1, 20), 51, 64, 101, 128):
        for least in {1, max(1, R // 4), max(1, R // 2), R}:
            want = [(1000 - int(x)) * (R - least) // 1000 + least for x in t]
            assert gate.open_ranks(t.float(), R, least).tolist() == want
    for R in (4, 8, 16, 32, 64, 128):  # where LyCORIS' floats are exact too
        theirs = [int(compute_timestep_mask(int(x), 1000, R, 1, 1.0).sum()) for x in t]
        assert gate.open_ranks(t, R, 1).tolist() == theirs


def test_schedule_monotonicity_and_rounding():
    for alpha in (0.5, 1.0, 2.0):
        opened = gate.open_ranks(torch.arange(0, 1001), 64, 5, alpha)
        assert opened[0] == 64 and opened[-1] == 5 and bool((opened.diff() <= 0).all())
    assert gate.open_ranks(torch.tensor([-3.0, 1500.0]), 64, 5).tolist() == [64, 5]
    assert gate.open_ranks(torch.tensor([500.0, 499.9, 500.1]), 64, 2).tolist() == [33, 33, 32]
    assert Schedule().least(7) == 3 and Schedule().least(1) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tlora_min_rank": "5"}, "tlora_min_rank 5 is not between 1 and rank 4"),
        ({"tlora_min_rank": "0"}, "tlora_min_rank 0 is below 1"),
        ({"tlora_alpha": "0"}, "tlora_alpha 0 is not above 0"),
        ({"sig_type": "lst"}, "did you mean 'last'"),
        ({"save_basis": "none"}, "at random"),
    ],
)
def test_bad_arguments_are_named(arguments, words, flux):
    with pytest.raises(Refused, match=words):
        made("tlora", flux, None, **arguments)


# ------------------------------------------------------------------ start, gradients


@pytest.mark.parametrize("data", ["True", "False"])
@pytest.mark.parametrize("sig_type", ["last", "middle", "principal"])
def test_fresh_adapter_equals_base(sig_type, data):
    for kind in HOSTS:
        torch.manual_seed(0)
        model, x = base(kind), HOSTS[kind].example()
        before = model(x)
        net = find_module("tlora").create_network(
            1.0, 4, 4.0, None, [], model, target=".", sig_type=sig_type, use_data_init=data
        )
        net.apply_to([], model, False, True)
        for t in (*TIMES, None):
            with net.denoise_at(torch.tensor([0.0 if t is None else float(t)])):
                assert torch.equal(model(x), before)
        for layer in net.layers():
            P, Q, S = layer.p_layer.flatten(1), layer.q_layer.flatten(1), layer.lambda_layer
            for frame in (P.T @ P, Q @ Q.T):
                torch.testing.assert_close(frame, torch.eye(4), rtol=0, atol=1e-5)
            assert bool((S.diff() <= 0).all())
            if data == "True":
                values = torch.linalg.svdvals(layer.host.weight.flatten(1))
                torch.testing.assert_close(S.data, values[tlora.component_slice(sig_type, len(values), 4)])


@pytest.mark.parametrize("rank", [4, 16])
def test_plain_start_has_standard_deviation_of_one_over_rank(rank):
    torch.manual_seed(0)
    values, _ = tlora.plain_start({"a": torch.zeros(20, 4096)}, {"a": rank}, {"a": 1.0})
    down, up = values["a"]["down"], values["a"]["up"]
    assert down.shape == (rank, 4096) and up.shape == (20, rank) and not up.any()
    # the deviation of n normal numbers errs by 1/√(2n), 0.6 % for 16384 of them: 4 of these
    assert float(down.std()) == pytest.approx(1 / rank, rel=0.022)
    assert abs(float(down.mean())) < 4 / rank / down.numel() ** 0.5
    model = base("linear")
    torch.manual_seed(0)
    layer = tlora.create_network(1.0, rank, None, None, [], model, target=".", orthogonal="False").layers()[0]
    assert float(layer.down.detach().std()) == pytest.approx(
        1 / rank, rel=0.35
    )  # 96 and 384 numbers: 5 of 1/√(2n)


def test_singular_values_of_gaussian_matrix():
    """By the mean of each over 200 draws; a singular value of 20×32 varies by about 0.3/√200 = 0.02."""
    torch.manual_seed(0)
    drawn = torch.stack([tlora.singular_values(20, 32, 0.25) for _ in range(200)]).mean(0)
    matrices = 0.25 * torch.randn(200, 20, 32, dtype=torch.float64)
    torch.testing.assert_close(drawn, torch.linalg.svdvals(matrices).mean(0), rtol=0.03, atol=0.03)
    assert tlora.singular_values(1, 3, 1.0).shape == (1,)
    assert tlora.component_slice("middle", 10, 3) == slice(4, 7)  # ceil, as the authors; LyCORIS floors


@pytest.mark.parametrize("orthogonal", ["True", "False"])
def test_masked_ranks_get_no_gradient(orthogonal, flux):
    net = shake(made("tlora", flux, None, 8, tlora_min_rank="1", orthogonal=orthogonal))
    for t in (0.0, 400.0, 999.0):
        net.zero_grad()
        out(flux, [t, t]).square().sum().backward()
        opened = int(gate.open_ranks(torch.tensor([t]), 8, 1))
        for layer in net.layers():
            for role, parameter in layer.roles().items():
                by_rank = parameter.grad if role in ("q_layer", "down", "lambda_layer") else parameter.grad.T
                moved = by_rank.flatten(1).abs().sum(1) if by_rank.dim() > 1 else by_rank.abs()
                assert bool((moved[:opened] > 0).all()) and not moved[opened:].any()


def test_tlora_batch_equals_single_samples(flux):
    """In float64: a CPU may choose another fp32 kernel for another batch size."""
    net = shake(made("tlora", flux, None, 8, tlora_min_rank="1"), 0.1).double()
    flux.double()
    times = [0.0, 500.0, 999.0]
    together = out(flux, times)
    together.square().sum().backward()
    whole = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    inputs = iter(range(3))
    for index, t in zip(inputs, times, strict=True):
        alone = only(flux, index, t)
        assert alone.dtype == torch.float64
        # float64 rounds at 1e-16, and the network has four blocks
        torch.testing.assert_close(alone, together[index : index + 1], rtol=0, atol=1e-12)
        alone.square().sum().backward()
    for one, p in zip(whole, net.parameters(), strict=True):
        torch.testing.assert_close(p.grad, one, rtol=0, atol=1e-11 * one.abs().max().item())


def only(model, index, t):
    """The sample `index` of `out` by itself."""
    hooked = []

    def pick(_module, args, kwargs):
        own = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")
        hooked.append(1)
        return args, {k: v[index : index + 1] if k in own else v for k, v in kwargs.items()}

    handle = model.register_forward_pre_hook(pick, with_kwargs=True, prepend=True)
    try:
        return out(model, [t] * (index + 1))
    finally:
        handle.remove()
        assert hooked


# ------------------------------------------------------------------ files


def trained(model, path, rank=8, **arguments):
    """A T-LoRA file of the model and the outputs with it at TIMES."""
    net = shake(made("tlora", model, None, rank, **arguments), 0.1, seed=3)
    net.save_weights(str(path), None, {"lowrank.base_hash": "b" * 64})
    outputs = [out(model, [t, t], False) for t in TIMES]
    net.restore()
    return outputs


def test_file_metadata_is_complete(flux, tmp_path):
    want = trained(flux, tmp_path / "a.safetensors", tlora_min_rank="3", tlora_alpha="2", sig_type="middle")
    _, metadata = read_tensors(tmp_path / "a.safetensors")
    told = {"tlora_max_rank": "8", "tlora_min_rank": "3", "tlora_alpha": "2", "tlora_T": "1000"}
    assert told.items() <= metadata.items()
    assert json.loads(metadata["lowrank.options"])["sig_type"] == "middle"
    again, held = find_module("tlora").create_network_from_weights(
        1.0, str(tmp_path / "a.safetensors"), None, [], flux
    )
    again.apply_to([], flux, False, True)
    again.load_state_dict(held, False)
    assert all(torch.equal(out(flux, [t, t], False), one) for t, one in zip(TIMES, want, strict=True))
    again.restore()
    with pytest.raises(Refused, match="use --network_module tlora"):
        made("lora", flux, None, 8).load_weights(str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("orthogonal", ["True", "False"])
def test_plain_export_at_every_prefix(orthogonal, flux, tmp_path, capsys):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    want = trained(flux, source, orthogonal=orthogonal, tlora_min_rank="1")
    assert export([str(source), str(target), "--to", "diffusers"]) == 0
    _, metadata = read_tensors(target)
    assert metadata["tlora_group"] == ("2" if orthogonal == "True" else "1")
    assert metadata["tlora_max_rank"] == "8" and metadata["lowrank.base_hash"] == "b" * 64
    with timestep_ranks(flux, target):
        for t, one in zip(TIMES, want, strict=True):
            torch.testing.assert_close(out(flux, [t, t], False), one, rtol=1e-5, atol=1e-5)
    if orthogonal == "True":
        layers = read_adapter_file(target).layers
        for module, roles in read_adapter_file(source).layers.items():
            up, down = delta_of(module, layers[module])[:2]
            for r in range(1, 9):
                P, S, Q = (roles[role].double() for role in ("p_layer", "lambda_layer", "q_layer"))
                P0, S0, Q0 = (roles[role].double() for role in ("base_p", "base_lambda", "base_q"))
                dW = P[:, :r] * S[:r] @ Q[:r] - P0[:, :r] * S0[:r] @ Q0[:r]
                mine = up.double()[:, : 2 * r] @ down.double()[: 2 * r]
                assert (mine - dW).norm() <= 1e-6 * dW.norm()
    with pytest.raises(Refused, match="tlora"):
        made("lora", flux, None, 16).load_weights(str(target))
    for one in (source, target):  # baked: no longer masked, and a plain LoRA for everybody
        assert (
            export([str(one), str(tmp_path / "c.safetensors"), "--at-timestep", "500", "--to", "diffusers"])
            == 0
        )
        assert "tlora_T" not in read_tensors(tmp_path / "c.safetensors")[1]
        flux.load_lora_adapter(read_tensors(tmp_path / "c.safetensors")[0], prefix="transformer")
        torch.testing.assert_close(out(flux, [500, 500], False), want[2], rtol=1e-5, atol=1e-5)
        flux.unload_lora()
    assert export([str(tmp_path / "c.safetensors"), str(target), "--at-timestep", "5"]) == 1
    assert "is no T-LoRA" in capsys.readouterr().err


def test_merge_without_timestep_is_refused(flux, tmp_path):
    """The guide's own example merges, and its masks then do nothing; here that is an error."""
    source = tmp_path / "a.safetensors"
    want = trained(flux, source, tlora_min_rank="1")
    hashed = digest(flux)
    net = made("tlora", flux, None, 8)
    net.load_weights(str(source))
    assert not net.is_mergeable()
    with pytest.raises(Refused, match=r"--at-timestep"):
        net.merge_to(None, flux)
    net.restore()
    mixture = read_mixture([source])
    with pytest.raises(Refused, match="--at_timestep"):
        mixture.save(tmp_path / "m.safetensors", [1.0], {})
    assert digest(flux) == hashed
    read_mixture([source], at=500).save(tmp_path / "m.safetensors", [1.0], {})
    attached = read_mixture([tmp_path / "m.safetensors"]).attach(flux)
    attached.set([1.0])
    for t, same in ((500, True), (999, False)):
        close = torch.allclose(out(flux, [t, t], False), want[TIMES.index(t)], rtol=1e-5, atol=1e-5)
        assert close is same
    attached.restore()


def test_lycoris_reads_file(flux, tmp_path, own_presets):
    want = trained(flux, tmp_path / "a.safetensors", alpha=4.0, **LIKE_LYCORIS, tlora_alpha="2")
    target = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    target.parent.mkdir()
    assert export([str(tmp_path / "a.safetensors"), str(target), "--to", "lycoris-tlora"]) == 0
    state, metadata = read_tensors(target)
    config = json.loads((target.parent / "lycoris_config.json").read_text())
    assert json.loads(metadata["lycoris_config"]) == config
    assert (config["linear_dim"], config["linear_alpha"], config["tlora_alpha"]) == (8, 4, 2.0)
    assert config["apply_preset"] == {"target_module": ["FluxAttention", "FeedForward"]}
    assert state["lycoris_transformer_blocks_0_attn_to_q.lambda_layer"].shape == (1, 8)
    # into a network that is there, as SimpleTuner resumes: nothing is missing
    LycorisNetwork.apply_preset(config["apply_preset"])
    theirs = lycoris.create_lycoris(flux, 1.0, 8, 4, algo="tlora", train_norm=False)
    theirs.apply_to()
    assert not theirs.load_weights(str(target))
    for one, other in zip(at_each(flux, 8, 1, 2.0), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    theirs.restore()
    # and into a new one, which takes the start from W again
    new, _ = lycoris.create_lycoris_from_weights(1.0, str(target), flux)
    new.apply_to()
    for one, other in zip(at_each(flux, 8, 1, 2.0), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    new.restore()


def test_nothing_stays_of_a_lycoris_export_that_fails(flux, tmp_path, monkeypatch, capsys):
    trained(flux, tmp_path / "a.safetensors", **LIKE_LYCORIS)
    target = tmp_path / "out" / "b.safetensors"
    monkeypatch.setattr("lowrank.cli.export.difference", lambda *_: 0.5)
    assert export([str(tmp_path / "a.safetensors"), str(target), "--to", "lycoris-tlora"]) == 1
    assert "differs by 5.0e-01 of a layer's change" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("sidecar", [True, False])
def test_lycoris_file_is_read(sidecar, flux, tmp_path, own_presets, caplog):
    LycorisNetwork.apply_preset({"target_module": ["FluxAttention", "FeedForward"]})
    theirs = lycoris.create_lycoris(flux, 1.0, 8, 4, algo="tlora", train_norm=False)
    theirs.apply_to()
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn(p.shape, generator=noise) * 0.1)
    alpha = 0.5 if sidecar else 1.0
    want = at_each(flux, 8, 1, alpha)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    theirs.save_weights(str(path), torch.float32, {})
    theirs.restore()
    if sidecar:
        config = {"algo": "tlora", "linear_dim": 8, "linear_alpha": 4, "tlora_alpha": 0.5}
        (tmp_path / "lycoris_config.json").write_text(json.dumps(config))
    with timestep_ranks(flux, path):
        for t, one in zip(TIMES, want, strict=True):
            torch.testing.assert_close(out(flux, [t, t], False), one, rtol=1e-5, atol=1e-5)
    assert ("has no schedule" in caplog.text) is not sidecar
    arguments = {**LIKE_LYCORIS, "tlora_alpha": str(alpha)}
    net = create(
        find_module("tlora"), flux, (), rank=None, alpha=None, dropout=None, arguments=arguments,
        weights=str(path), dim_from_weights=True,
    )  # fmt: skip
    for t, one in zip(TIMES, want, strict=True):
        torch.testing.assert_close(out(flux, [t, t], False), one, rtol=1e-5, atol=1e-5)
    net.restore()
    with pytest.raises(Refused, match="at random"):  # which the file leaves out
        made("tlora", flux, None, 8).load_weights(str(path))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"orthogonal": "False"}, "no orthogonal T-LoRA"),
        ({}, "other components"),
        ({"sig_type": "last", "use_data_init": "True"}, "other components"),
        ({**LIKE_LYCORIS, "module_rules": "ff -> rank=4"}, "several ranks"),
    ],
)
def test_export_that_lycoris_misreads_is_refused(arguments, words, flux, tmp_path, capsys):
    trained(flux, tmp_path / "a.safetensors", **arguments)
    target = tmp_path / "b.safetensors"
    assert export([str(tmp_path / "a.safetensors"), str(target), "--to", "lycoris-tlora"]) == 1
    assert words in capsys.readouterr().err and not target.exists()


def test_sidecar_of_another_file_is_kept(flux, tmp_path, capsys):
    trained(flux, tmp_path / "a.safetensors", **LIKE_LYCORIS)
    (tmp_path / "lycoris_config.json").write_text("{}")
    target = str(tmp_path / "b.safetensors")
    assert export([str(tmp_path / "a.safetensors"), target, "--to", "lycoris-tlora"]) == 1
    assert "exists with other content" in capsys.readouterr().err


@pytest.mark.parametrize("orthogonal", ["True", "False"])
def test_official_files_are_read(orthogonal, flux, tmp_path):
    target = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj)$"
    path, official = tmp_path / "a.safetensors", {}
    want = trained(flux, path, orthogonal=orthogonal, target=target, tlora_min_rank="4")
    for key, value in read_tensors(path)[0].items():
        found = re.match(r"transformer\.(.*attn)\.(to_\w+(?:\.0)?|add_\w+)\.(?:lora_)?(.*)$", key)
        suffix = {"A.weight": "down.weight", "B.weight": "up.weight"}.get(found[3], found[3])
        if suffix != "alpha":
            value = value.reshape(1, -1) if suffix.endswith("lambda_layer") else value
            suffix += ".weight" if suffix in ("base_q", "base_p") else ""
            official[f"{found[1]}.processor.{AUTHORS[found[2]]}_lora.{suffix}"] = value
    dead = "single_transformer_blocks.0.attn.processor.to_k_proj_lora"
    names = (
        "q_layer.weight",
        "p_layer.weight",
        "lambda_layer",
        "base_q.weight",
        "base_p.weight",
        "base_lambda",
    )
    for name in names if orthogonal == "True" else ("down.weight", "up.weight"):
        wide = {"q": (8, 32), "d": (8, 32), "p": (32, 8), "u": (32, 8), "l": (1, 8)}
        official[f"{dead}.{name}"] = torch.ones(wide[name.removeprefix("base_")[0]])
    if orthogonal == "True":
        save_file(official, tmp_path / "b.safetensors")
        file = tmp_path / "b.safetensors"
    else:
        torch.save(official, tmp_path / "lora.pt")
        file = tmp_path / "lora.pt"
    config = {"max_rank": 8, "min_rank": 4, "alpha": 1.0}
    with timestep_ranks(flux, file, config):
        for t, one in zip(TIMES, want, strict=True):
            torch.testing.assert_close(out(flux, [t, t], False), one, rtol=1e-5, atol=1e-5)
    with pytest.raises(Refused, match="schedule"):
        timestep_ranks(flux, file).__enter__()


def test_weight_start_can_be_omitted_from_file(flux, tmp_path):
    want = trained(flux, tmp_path / "a.safetensors", save_basis="none", use_data_init="True")
    assert not any("base_" in key for key in read_tensors(tmp_path / "a.safetensors")[0])
    net = made("tlora", flux, None, 8, use_data_init="True")
    net.load_weights(str(tmp_path / "a.safetensors"))
    assert all(torch.equal(out(flux, [t, t], False), one) for t, one in zip(TIMES, want, strict=True))
    net.restore()
    other = base_of(flux)
    with torch.no_grad():
        other.transformer_blocks[0].attn.to_q.weight.mul_(1.01)
    with pytest.raises(Refused, match="the model it was trained on"):
        made("tlora", other, None, 8, use_data_init="True").load_weights(str(tmp_path / "a.safetensors"))


def test_text_encoders_are_not_masked(tiny_sd):
    from lowrank.models.family import Source
    from lowrank.models.sd import SD15

    models = SD15.load(Source(str(tiny_sd), dtype=torch.float32))
    net = create(
        find_module("tlora"), models.denoiser, list(models.text_encoders), rank=4, alpha=None, dropout=None,
        arguments={}, weights=None, dim_from_weights=False,
    )  # fmt: skip
    text = shake(net).layers("te")
    assert text and all(isinstance(layer, AdaptedLayer) and layer.method.gate is None for layer in text)
    with torch.no_grad():  # no denoiser runs, and no timestep is needed
        models.text_encoders[0](torch.ones(1, 5, dtype=torch.long))
    net.restore()


def test_unknown_denoiser_needs_schedule_argument():
    model = base("linear")
    network("tlora", model)
    with pytest.raises(Refused, match="timestep, which is not set"):
        model(HOSTS["linear"].example())
