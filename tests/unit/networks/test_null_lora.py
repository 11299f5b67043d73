"""Null-LoRA and the user's networks made of it: exact null spaces, live starts, what stays untouched."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toys import HOSTS, base, shake

from lowrank.adapters.targets import find
from lowrank.bases import null_space
from lowrank.bases.null_space import least_used, nullity
from lowrank.cli import importing
from lowrank.errors import Refused
from lowrank.laplace.context_file import write_context
from lowrank.laplace.fisher import Fisher
from lowrank.tensors import read_metadata
from tools import legacy_files

USER = ("network_null_lalora", "network_null_lalora_plus", "network_null_lalora_plus_Effi_ABM")


def made(name: str, model: nn.Module, rank: int = 6, **arguments):
    module = importlib.import_module(f"networks.{name}")
    found = module.create_network(1.0, rank, 3.0, None, [], model, target=".", **arguments)
    found.apply_to([], model, False, True)
    found.prepare_grad_etc([], model)
    return found


def train(model: nn.Module, found, steps: int = 100, kind: str = "linear") -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(found.parameters(), lr=1e-2)
    x = HOSTS[kind].example(8)
    aim = torch.randn_like(model(x))
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - aim).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24), (20, 24)])
def test_null_space_is_exact(shape):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    O, I = shape
    null = least_used(W, 8)
    torch.testing.assert_close(null.up.mT @ null.up, torch.eye(8), atol=1e-5, rtol=0)  # fp32
    torch.testing.assert_close(null.down @ null.down.mT, torch.eye(8), atol=1e-5, rtol=0)
    u, s, vh = torch.linalg.svd(W.double())
    for side, directions, n, m in (
        ((W.double() @ null.down.double().mT), vh, I, O),
        ((null.up.double().mT @ W.double()), u, O, I),
    ):
        if n - m >= 8:  # room enough: nothing is read, or written, at all
            assert side.norm() <= 1e-5 * W.norm()
        else:  # no stretch is smaller than that of the last singular directions
            want = torch.cat([s, torch.zeros(max(0, n - m))])[:n].sort().values[:8].norm()
            torch.testing.assert_close(side.norm(), want, rtol=1e-4, atol=1e-5)
        assert directions.shape == (n, n)
    assert torch.equal(least_used(W, 8).up, null.up)


def test_null_space_needs_full_svd():
    W = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    tail = torch.linalg.svd(W, full_matrices=False)[2][-8:]
    assert (W @ tail.mT).norm() > 0.1 * W.norm() > 1e4 * (W @ least_used(W, 8).down.mT).norm()


def test_nullity_counts_both_sides():
    W = torch.randn(12, 5) @ torch.randn(5, 30)
    assert nullity(W) == 12 + 30 - 2 * 5


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("strict", [False, True])
def test_row_space_of_weight_is_unchanged(kind, strict):
    model = base(kind)
    found = made("null_lora", model, rank=4, null_strict=strict)
    assert all((p.grad is None) for p in found.parameters())
    train(model, found, kind=kind)
    for layer in found.layers():
        W, dW = layer.host.weight.flatten(1).double(), layer.delta_weight().flatten(1).double()
        h = layer.rank if strict else layer.rank // 2
        V_N, U_N = layer.null_down.flatten(1).double(), layer.null_up.flatten(1).double()
        top = (torch.eye(W.shape[0]) - U_N @ U_N.mT, torch.eye(W.shape[1]) - V_N.mT @ V_N)
        assert dW.norm() > 1e-3 and U_N.shape[1] == h
        assert (top[0] @ dW @ top[1]).norm() <= 1e-5 * dW.norm()
        sides = ((top[0] @ dW).norm(), (dW @ top[1]).norm())
        assert all(side <= 1e-5 * dW.norm() for side in sides) == strict
        assert torch.linalg.matrix_rank(dW.float(), rtol=1e-4) == layer.rank


def test_parameters_and_live_gradients():
    model = base("linear")
    found = made("null_lora", model)
    model(HOSTS["linear"].example()).square().sum().backward()
    for layer in found.layers():
        O, I = layer.host.weight.shape
        assert sum(p.numel() for p in layer.roles().values()) == 3 * (O + I) + 6
        assert (
            layer.roles()["free_up"].grad.abs().max() > 0 and layer.roles()["free_down"].grad.abs().max() > 0
        )


def test_null_spaces_are_cached(tmp_path, monkeypatch):
    """In the default folder or a named one: computed once for each weight and rank."""
    computed = []

    def counted(weight, width):
        computed.append(width)
        return least_used(weight, width)

    monkeypatch.setattr(null_space, "least_used", counted)
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path))
    first, again = made("null_lora", base("linear")), made("null_lora", base("linear"))
    assert computed == [3, 3] and len(list((tmp_path / "null").glob("*.safetensors"))) == 2
    for a, b in zip(first.layers(), again.layers(), strict=True):
        assert torch.equal(a.null_up, b.null_up) and torch.equal(a.null_down, b.null_down)
    other = base("linear")
    with torch.no_grad():
        other.first.weight.mul_(1.001)
    made("null_lora", other)
    made("null_lora", base("linear"), rank=8)
    made("null_lora", base("linear"), svd_cache_path=str(tmp_path / "named"))
    assert computed == [3, 3, 3, 4, 4, 3, 3]
    (tmp_path / "old.safetensors").touch()
    with pytest.raises(Refused, match=r"svd_cache_path .* is a file"):
        made("null_lora", base("linear"), svd_cache_path=str(tmp_path / "old.safetensors"))


@pytest.mark.parametrize("shape", [(580, 580), (590, 580), (580, 650)])
def test_least_used_of_large_weight_has_least_energy(shape):
    """Large enough for block Krylov; σ falls as i^-1, and a singular weight takes the full SVD."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator).double())[0]
    v = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator).double())[0]
    spectrum = torch.arange(1, min(shape) + 1).double() ** -1
    for s in (spectrum, torch.cat([spectrum[:-4], torch.zeros(4).double()])):
        W = (u * s) @ v.mT
        null = least_used(W, 12)
        for energy, n in ((null.up.double().mT @ W, shape[0]), (W @ null.down.double().mT, shape[1])):
            least = torch.cat([s, torch.zeros(n - len(s)).double()]).sort().values[:12].norm()
            # directions are fp32: an angle of 6e-8 to the largest direction, whose σ is 1, in 12 of them
            assert float(energy.norm()) == pytest.approx(float(least), rel=1e-4, abs=1e-6)


def test_least_active_directions_need_all_eigenpairs(tmp_path):
    """kfac gives the last eigenvectors of E[xxᵀ] and E[ggᵀ]; a file of the largest eigenpairs is refused."""
    model = base("linear")
    torch.manual_seed(0)
    x = torch.randn(64, 5, 24) * torch.arange(1, 25) ** -1.0
    files = {}
    for curvature in ("kfac", "kfac_lr", "diag"):
        fisher = Fisher(find("unet", model, target="."), curvature, 4, 0, "cpu")
        with fisher.watching():
            fisher.add(64, lambda: model(x).flatten(1).sum(1) + model(x).square().flatten(1).sum(1))
        files[curvature] = str(tmp_path / f"{curvature}.safetensors")
        write_context(files[curvature], fisher.context({}))
    options = {"null_source": "activation", "lalora_context_path": files["kfac"]}
    layer = made("null_lora", model, **options).layers()[0]
    rows = x.flatten(0, 1).double()
    least = torch.linalg.eigvalsh(rows.mT @ rows)[:3].sum()
    energy = (rows @ layer.null_down.double().mT).square().sum()
    assert float(energy) == pytest.approx(float(least), rel=1e-3)  # the moment is fp32
    for curvature, count in (("kfac_lr", 4), ("diag", 0)):
        with pytest.raises(Refused, match=rf"{count} of \d+ eigenpairs of .*--curvature kfac"):
            made("null_lora", base("linear"), **(options | {"lalora_context_path": files[curvature]}))


def test_adaptive_ranks_follow_the_nullity():
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.square, self.wide = nn.Linear(32, 32), nn.Linear(64, 32)

    torch.manual_seed(0)
    found = made("null_lora", Uneven().requires_grad_(False), rank=8, null_adaptive_rank=True)
    ranks = {layer.name.rpartition("_")[2]: layer.rank for layer in found.layers()}
    assert ranks["wide"] > 8 > ranks["square"] == 2
    assert all(layer.scale == 3 / 8 for layer in found.layers())


def test_option_limits():
    for wrong, said in (
        ({"null_source": "wieght"}, "did you mean|weight"),
        ({"null_source": "activation"}, "calc_lalora_context"),
        ({"null_threshold": "2"}, "between 0 and 1"),
    ):
        with pytest.raises(Refused, match=said):
            made("null_lora", base("linear"), **wrong)


@pytest.mark.parametrize("name", USER)
@pytest.mark.parametrize("basis", ["none", "auto:weight", "auto:grad"])
def test_user_networks_train_save_load(name, basis, tmp_path):
    model = base("linear")
    x = HOSTS["linear"].example()
    before = model(x)
    extra = {} if name == USER[0] else {"use_dora": "True"}
    if name == USER[2]:
        extra |= {"enable_effilora": "True", "num_experts": "3"}
    found = made(name, model, rank=6, basis_path=basis, **extra)
    assert torch.equal(model(x), before)
    shake(found)
    after = model(x)
    assert not torch.equal(after, before)
    path = tmp_path / "a.safetensors"
    found.save_weights(str(path), None, {})
    found.restore()
    module = importlib.import_module(f"networks.{name}")
    other, state = module.create_network_from_weights(1.0, str(path), None, [], model)
    other.apply_to([], model, False, True)
    assert not other.read_state(state, {}, "the file").missing_keys
    torch.testing.assert_close(model(x), after, rtol=0, atol=0)
    if basis == "auto:grad":
        with pytest.raises(Refused, match="save_basis=none"):
            made(name, base("linear"), basis_path=basis, save_basis="none", **extra)
    assert any(key.endswith("null_up") for key in load_file(path))


def test_loraplus_default_ratio():
    for basis, want in (("none", {1e-4, 16e-4}), ("auto:weight", {1e-4})):
        found = made(USER[1], base("linear"), basis_path=basis)
        groups, _ = found.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-4, 1e-4)
        assert {round(group["lr"], 9) for group in groups} == want
    given = made(USER[1], base("linear"), basis_path="auto:weight", loraplus_lr_ratio=16.0)
    groups, _ = given.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-4, 1e-4)
    fast = [group for group in groups if group["lr"] == 16e-4]
    assert len(fast) == 1 and {p.shape for p in fast[0]["params"]} == {(3, 3)}


def test_strict_with_basis_is_refused():
    with pytest.raises(Refused, match="basis_path=none"):
        made("network_null_lalora", base("linear"), null_strict=True, basis_path="auto:weight")
    assert made("network_null_lalora", base("linear"), null_strict=True, basis_path="none").layers()


@pytest.mark.parametrize(("length", "swapped"), [("s", False), ("m", False), ("s", True)])
def test_files_of_fork_are_plain_loras(length, swapped, tmp_path, capsys):
    O, I, h = 12, 9, 2
    draw = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    name, dotted = "unet_mid_block_attentions_0_proj_in", "unet.mid.block.attentions.0.proj.in"
    state = {f"{name}.{role}": rand(h, h) for role in ("alpha_up", "alpha_down")}
    state |= {f"{name}.null_up": rand(O, h), f"{name}.null_down": rand(h, I)}
    state[f"{name}.{length}"] = rand(2 * h if length == "s" else O)
    basis = {f"{dotted}.lora_up.weight.basis": rand(O, 4), f"{dotted}.lora_up.weight.mean": rand(O)}
    basis |= {f"{dotted}.lora_down.weight.basis": rand(I, 4), f"{dotted}.lora_down.weight.mean": rand(I)}
    x = rand(5, I)
    W_up = basis[f"{dotted}.lora_up.weight.basis"][:, :h] @ state[f"{name}.alpha_up"]
    W_up = W_up + basis[f"{dotted}.lora_up.weight.mean"][:, None] @ torch.ones(1, h)
    W_down = state[f"{name}.alpha_down"] @ basis[f"{dotted}.lora_down.weight.basis"][:, :h].T
    W_down = W_down + torch.ones(h, 1) @ basis[f"{dotted}.lora_down.weight.mean"][None]
    s = state.get(f"{name}.s", torch.ones(2 * h))
    want = (x @ state[f"{name}.null_down"].T * s[:h]) @ W_up.T
    want = want + (x @ W_down.T * s[h:]) @ state[f"{name}.null_up"].T
    want = want * state.get(f"{name}.m", torch.ones(O))
    if swapped:
        roles = [f"{name}.null_up", f"{name}.null_down"]
        state[roles[0]], state[roles[1]] = state[roles[1]], state[roles[0]]
    ((up, down),) = legacy_files.plain_lora(state, basis, "old.safetensors").values()
    torch.testing.assert_close(x @ down.T @ up.T, want, rtol=1e-4, atol=1e-4)  # fp32 beside float64
    save_file(state, tmp_path / "old.safetensors")
    save_file(basis, tmp_path / "basis.safetensors")
    line = [str(tmp_path / "old.safetensors"), str(tmp_path / "new.safetensors"), "--base", "sd15"]
    with pytest.raises(Refused, match=r"convert it with tools/legacy_files\.py and the basis file"):
        importing.main(line)
    assert legacy_files.main([*line, "--basis", str(tmp_path / "basis.safetensors")]) == 0
    save_file({**state, f"{name}.bias": torch.ones(2)}, tmp_path / "more.safetensors")
    line[:2] = str(tmp_path / "more.safetensors"), str(tmp_path / "new.safetensors")
    line += ["--basis", str(tmp_path / "basis.safetensors")]
    capsys.readouterr()
    assert legacy_files.main(line) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"{len(state)} of {len(state) + 1} tensors are used; left out: bias × 1, for example" in last
    with pytest.raises(Refused, match=r"--strict, and 1 of \d+ tensors of .*more\.safetensors"):
        legacy_files.main([*line, "--strict"])
    native = load_file(tmp_path / "new.safetensors")
    torch.testing.assert_close(native["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"], up)
    plain = ["new.safetensors", "newer.safetensors"]
    with pytest.raises(Refused, match=r"no file of the fork .* give it to tools/import_lora\.py"):
        legacy_files.main([*(str(tmp_path / name) for name in plain), "--basis", str(tmp_path / "b")])
    with pytest.raises(Refused, match="routed"):
        legacy_files.plain_lora({**state, f"{name}.gate.weight": rand(3, I)}, basis, "old.safetensors")
    with pytest.raises(Refused, match="basis file it was trained with"):
        legacy_files.plain_lora(state, {}, "old.safetensors")


def test_disabled_experts_are_logged(caplog, tmp_path):
    for given, said in (({"num_experts": "8"}, True), ({"num_experts": "4"}, False), ({}, False)):
        caplog.clear()
        found = made(USER[2], base("linear"), basis_path="none", **given)
        assert ("num_experts=8 has no effect without enable_effilora=True" in caplog.text) == said
        assert found.method.experts is None and found.method.options["num_experts"] == 1
    found.save_weights(str(tmp_path / "a.safetensors"), None, {})
    assert json.loads(read_metadata(tmp_path / "a.safetensors")["lowrank.options"])["num_experts"] == 1
