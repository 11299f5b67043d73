"""LaLoRA: curvature against loops over samples, penalty against its formula, runs, files, the script."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from statistics import median

import pytest
import torch
from safetensors.torch import load_file, save_file
from sd_run import arguments, folders, rows  # noqa: F401 (fixtures)
from torch import Tensor
from toys import HOSTS, base, probes, shake

from lowrank.adapters import penalty
from lowrank.adapters.method import Method
from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.penalty import Spectrum
from lowrank.adapters.targets import find
from lowrank.cli import source_pictures as pictures
from lowrank.cli.context import main
from lowrank.cli.sd_train import main as sd
from lowrank.cli.sd_train import main_sdxl as sdxl
from lowrank.config.context import CALC_CONTEXT
from lowrank.errors import Refused
from lowrank.laplace import penalty as laplace_penalty
from lowrank.laplace.context_file import read_context, weight_fingerprint, write_context
from lowrank.laplace.fisher import Fisher, Moment, gauss_newton_draw, inputs_of
from lowrank.models.family import Source
from lowrank.models.sd import SD15, SdOptions
from lowrank.train.prompts import Prompt
from networks import dora, lalora, lora


def dense(spectrum: Spectrum) -> Tensor:
    """The whole matrix."""
    return spectrum.form(torch.eye(spectrum.main.shape[-1], dtype=spectrum.main.dtype))


def problem(kind: str, samples: int = 6, dtype: torch.dtype = torch.float32):
    """A base, inputs and targets, and the loss of each sample."""
    torch.manual_seed(3)
    model, x = base(kind, dtype), HOSTS[kind].example(samples).to(dtype)
    target = torch.randn_like(model(x))

    def losses(rows: slice = slice(None)) -> Tensor:
        return (model(x[rows]) - target[rows]).square().flatten(1).mean(1)

    return model, x, losses


def measured(
    kind: str,
    curvature: str = "kfac",
    batch: int = 6,
    scale: float = 1.0,
    rank: int = 4,
    samples: int = 6,
    dtype: torch.dtype = torch.float32,
):
    model, x, losses = problem(kind, samples, dtype)
    fisher = Fisher(find("unet", model, target="."), curvature, rank, 0, "cpu")
    with fisher.watching():
        for start in range(0, len(x), batch):
            part = slice(start, start + batch)
            fisher.add(len(x[part]), lambda part=part: losses(part), scale)
    return model, fisher.context({})


def looped(kind: str) -> dict[str, tuple[Tensor, Tensor]]:
    """S and G of each layer, one sample at a time, with autograd asked for each output's gradient."""
    model, x, losses = problem(kind)
    found = {}
    for name, layer in (("first", model.first), ("second", model.second)):
        O, I = layer.weight.flatten(1).shape
        S, G = torch.zeros(I, I).double(), torch.zeros(O, O).double()
        for n in range(len(x)):
            seen = []

            def watch(_module, inputs, output, seen=seen):
                seen += [inputs[0], output.requires_grad_()]

            handle = layer.register_forward_hook(watch)
            loss = losses(slice(n, n + 1)).sum()
            handle.remove()
            (g,) = torch.autograd.grad(loss, seen[-1])
            X = inputs_of(layer, seen[-2].detach()).double()
            if kind == "conv":  # the rows are those whose product with W is the output
                W, own = layer.weight.flatten(1).double(), seen[-1].movedim(1, -1).reshape(-1, O)
                bias = 0 if layer.bias is None else layer.bias
                torch.testing.assert_close((X @ W.T).float() + bias, own)
                g = g.movedim(1, -1)
            g = g.reshape(-1, O).double()
            for x_t, g_t in zip(X, g, strict=True):
                S += torch.outer(x_t, x_t) / len(X) / len(x)
                G += torch.outer(g_t, g_t) / len(x)
        found[f"lora_unet_{name}"] = (S, G)
    return found


# ---------- the curvature


@pytest.mark.parametrize("kind", HOSTS)
def test_curvature_equals_loop_over_samples(kind):
    _, context = measured(kind)
    for name, (S, G) in looped(kind).items():
        for mine, his in ((context.layers[name].S, S), (context.layers[name].G, G)):
            assert torch.linalg.norm(dense(mine).double() - his) <= 1e-5 * torch.linalg.norm(his)
    _, context = measured(kind, "diag")
    for name, (S, G) in looped(kind).items():
        assert context.layers[name].S.vectors is None
        torch.testing.assert_close(context.layers[name].S.main.double(), S.diagonal(), rtol=1e-5, atol=0)
        torch.testing.assert_close(context.layers[name].G.main.double(), G.diagonal(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("curvature", ["kfac", "kfac_lr", "diag", "lora_diag"])
@pytest.mark.parametrize("change", [{"batch": 1}, {"batch": 4}, {"scale": 65536.0}])
def test_curvature_does_not_depend_on_batch_size_or_loss_scale(curvature, change):
    """Gradients in float64, because a CPU may choose another fp32 kernel for another batch size."""
    exact = {"dtype": torch.float64}
    one, other = measured("conv", curvature, **exact)[1], measured("conv", curvature, **exact, **change)[1]
    for name in one.layers:
        for mine, his in zip(one.layers[name], other.layers[name], strict=True):
            # the sums are fp32: 3e-7 measured with kernels for SSE4.1, AVX2 and AVX-512
            assert torch.linalg.norm(dense(mine) - dense(his)) <= 3e-6 * torch.linalg.norm(dense(his))


def test_autocast_changes_only_rounding():
    _, plain = measured("linear")
    model, x, losses = problem("linear")
    fisher = Fisher(find("unet", model, target="."), "kfac", 4, 0, "cpu")

    def half() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses().float()

    with fisher.watching():
        fisher.add(len(x), half)
    for name, layer in fisher.context({}).layers.items():
        for mine, his in zip(layer, plain.layers[name], strict=True):
            assert torch.linalg.norm(dense(mine) - dense(his)) <= 0.05 * torch.linalg.norm(dense(his))


def test_checkpointing_keeps_curvature():
    from torch.utils.checkpoint import checkpoint

    _, plain = measured("linear")
    model, x, losses = problem("linear")
    target = find("unet", model, target=".")
    own = model.forward
    model.forward = lambda x: checkpoint(own, x, use_reentrant=False)
    fisher = Fisher(target, "kfac", 4, 0, "cpu")
    with fisher.watching():
        fisher.add(len(x), losses)
    for name, layer in fisher.context({}).layers.items():
        for mine, his in zip(layer, plain.layers[name], strict=True):
            torch.testing.assert_close(dense(mine), dense(his))
    assert not model.first._forward_hooks and model.first.weight.grad is None


def test_dead_input_and_layer_without_curvature():
    model, x, _ = problem("linear")
    x[..., 5] = 0
    fisher = Fisher(find("unet", model, target="."), "kfac_lr", 4, 0, "cpu")
    with fisher.watching():
        fisher.add(len(x), lambda: torch.tanh(model.first(x)).square().flatten(1).mean(1))
        with torch.no_grad():
            model.second(torch.randn(1, 40))  # no part of the loss, and not counted
    context = fisher.context({})
    S = dense(context.layers["lora_unet_first"].S)
    assert S[5].abs().max() <= 1e-7 * S.abs().max() and S[4, 4] > 0
    assert not context.layers["lora_unet_second"].G.main.any()


def test_grouped_convolution_is_not_measured():
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=2))
    with pytest.raises(Refused, match=r"lora_unet_0 is a grouped convolution \(groups=2\).*--exclude"):
        Fisher(find("unet", model, target="."), "kfac", 4, 0, "cpu")


def test_sketch_accuracy():
    torch.manual_seed(0)
    thin = torch.randn(300, 20) @ torch.randn(20, 200)
    turned = torch.linalg.qr(torch.randn(200, 200))[0]
    decaying = torch.randn(2000, 200) * torch.arange(1, 201) ** -1.0 @ turned
    for rows_, limit in ((thin, 1e-4), (decaying, 0.02)):
        moment = Moment(200, "low", 16, 0, "cpu")
        for part in rows_.split(77):
            moment.add(part, 1.0)
        got, M = moment.spectrum(len(rows_)), (rows_.double().T @ rows_.double()) / len(rows_)
        assert moment._whole is None and got.vectors.shape == (200, 16)
        torch.testing.assert_close(got.main.double(), M.diagonal(), rtol=1e-4, atol=1e-6)
        best = torch.linalg.eigvalsh(M).flip(0)[:16]
        torch.testing.assert_close(got.values.double(), best, rtol=limit, atol=limit * float(best[0]))
        V = got.vectors.double()
        torch.testing.assert_close(V.T @ V, torch.eye(16).double(), atol=1e-5, rtol=0)
    zero = Moment(200, "low", 16, 0, "cpu")
    zero.add(torch.zeros(3, 200), 1.0)
    assert not zero.spectrum(1).main.any() and torch.isfinite(zero.spectrum(1).vectors).all()


def hadamard(size: int) -> Tensor:
    """Signs (N, N) whose rows are orthogonal: the mean over the rows is the mean over all signs."""
    made = torch.ones(1, 1).double()
    while len(made) < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made


def squared_error_draw(prediction: Tensor, target: Tensor, signs: Tensor) -> Tensor:
    """A draw for the mean of squares."""
    return gauss_newton_draw(lambda f: (f - target).square().flatten(1).mean(1), prediction, signs)


def test_gauss_newton_draws_equal_hessian_of_squared_error():
    """For a model that is linear in θ the Gauss–Newton matrix is the Hessian, whatever the residual is."""
    torch.manual_seed(0)
    x, target = torch.randn(4, 3).double(), 5 * torch.randn(1, 4, 2).double()
    theta = torch.randn(6).double().requires_grad_()

    def predict(theta: Tensor) -> Tensor:
        return (x @ theta.reshape(3, 2))[None]

    def losses(f: Tensor) -> Tensor:
        return 0.7 * (f - target).square().flatten(1).mean(1)

    mean = torch.zeros(6, 6).double()
    for signs in hadamard(8):
        draw = gauss_newton_draw(losses, predict(theta), signs.reshape(1, 4, 2))
        (g,) = torch.autograd.grad(draw.sum(), theta)
        mean += torch.outer(g, g) / 8
    whole = torch.autograd.functional.hessian(lambda theta: losses(predict(theta)).sum(), theta)
    torch.testing.assert_close(mean, whole, rtol=1e-6, atol=1e-9)  # the second derivative is taken in fp32


def test_curvature_predicts_rise_of_loss():
    """½ vec(ΔW)ᵀ(S ⊗ G)vec(ΔW) is what the mean loss rises by, at the base and far from its target."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(12, 16)).requires_grad_(False), torch.randn(1024, 12)
    x = x * torch.arange(1, 13) / 6
    step, signs = 0.1 * torch.randn(16, 12), torch.randint(0, 2, (1024, 16)).float() * 2 - 1
    found = []
    for far in (0.0, 3.0):
        target = model(x) + far * torch.randn(1024, 16)
        fisher = Fisher(find("unet", model, target="."), "kfac", 4, 0, "cpu")
        with fisher.watching():
            fisher.add(1024, lambda target=target: squared_error_draw(model(x), target, signs))
        found.append(fisher.context({}).layers["lora_unet_0"])
    torch.testing.assert_close(dense(found[0].G), dense(found[1].G), rtol=1e-5, atol=1e-7)
    rise = float((x @ step.T).square().mean())
    told = 0.5 * float((dense(found[0].G) @ step @ dense(found[0].S) * step).sum())
    # 1024 samples of 16 signs: off-diagonal entries of G err by 1/√1024 of its diagonal
    assert told == pytest.approx(rise, rel=0.1)


# ---------- the penalty


def spectra(n: int, size: int, rank: int, seed: int) -> Spectrum:
    made = torch.Generator().manual_seed(seed)
    V = torch.linalg.qr(torch.randn(n, size, rank, generator=made, dtype=torch.float64))[0]
    return Spectrum(
        V, torch.rand(n, rank, generator=made).double(), torch.rand(n, size, generator=made).double()
    )


def test_penalty_in_float64():
    S, G = spectra(2, 9, 3, 0), spectra(2, 7, 2, 1)
    U, D = (torch.randn(2, *shape).double().requires_grad_() for shape in ((7, 4), (4, 9)))
    value = penalty.kronecker(U, D, S, G)
    W = U @ D
    whole = (dense(G) @ W @ dense(S) * W).sum((1, 2))
    torch.testing.assert_close(value, whole)
    assert (value > 0).all() and not penalty.kronecker(0 * U, D, S, G).any()
    M = torch.randn(4, 4).double()
    torch.testing.assert_close(penalty.kronecker(U @ M, torch.linalg.inv(M) @ D, S, G), value)
    assert torch.autograd.gradcheck(lambda U, D: penalty.kronecker(U, D, S, G), (U, D))
    flat = Spectrum(None, None, torch.ones(2, 9).double()), Spectrum(None, None, torch.ones(2, 7).double())
    torch.testing.assert_close(penalty.kronecker(U, D, *flat), W.square().sum((1, 2)))
    h = torch.stack([(D[:, r, None] @ dense(S) @ D[:, r, :, None]).flatten() for r in range(4)], dim=1)
    each = sum(penalty.kronecker(U[..., r : r + 1], D[..., r : r + 1, :], S, G) for r in range(4))
    torch.testing.assert_close(penalty.ranks_apart(U, h, G), each)


def joined(kind: str, method: Method, rank: int = 4, alpha: float = 3.0):
    model = base(kind)
    made = AdapterNetwork(method, find("unet", model, target="."), lambda _: (rank, alpha))
    made.start()
    made.apply_to([], model, False, True)
    made.prepare_grad_etc([], model)
    return model, made


def written(tmp_path: Path, kind: str = "linear", curvature: str = "kfac") -> str:
    _, context = measured(kind, curvature, samples=64)  # so many that S and G have full rank
    write_context(tmp_path / "context.safetensors", context)
    return str(tmp_path / "context.safetensors")


@pytest.mark.parametrize("kind", HOSTS)
@pytest.mark.parametrize("plain", [lora, dora], ids=["lora", "dora"])
def test_penalty_of_network(kind, plain, tmp_path):
    """λ/2 · Σ vec(ΔW)ᵀ(S ⊗ G)vec(ΔW)/c, with s and the multiplier in ΔW, joined to any method."""
    path = written(tmp_path, kind)
    pull = lalora.penalty(lalora.Options(path, 0.1))
    _, made = joined(kind, plain.method(plain.Options()) | pull)
    assert set(made.penalties()) == {"lalora"} and float(made.penalties()["lalora"].detach()) == 0
    shake(made)
    made.set_multiplier(0.5)
    context, total, mean, count = read_context(path), 0.0, 0.0, 0
    for layer in made.layers():
        S, G = (dense(side).double() for side in context.layers[layer.name])
        dW = (0.5 * layer.scale * layer.up.flatten(1) @ layer.down.flatten(1)).double()
        total, mean, count = total + (G @ dW @ S * dW).sum(), mean + G.trace() * S.trace(), count + dW.numel()
    torch.testing.assert_close(
        made.penalties()["lalora"].double(), 0.05 * total / (mean / count), rtol=1e-5, atol=0
    )


def test_full_curvature_equals_full_rank_sketch(tmp_path):
    values = []
    for curvature, rank in (("kfac", 1), ("kfac_lr", 40)):
        _, context = measured("linear", curvature, rank=rank)
        write_context(tmp_path / "c.safetensors", context)
        pull = lalora.penalty(lalora.Options(str(tmp_path / "c.safetensors"), 1.0))
        values.append(
            float(
                shake(joined("linear", lora.method(lora.Options()) | pull)[1]).penalties()["lalora"].detach()
            )
        )
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_lora_diag_penalises_up_alone_at_starting_down(tmp_path):
    """One U costs the same wherever D has moved since training started; D has no gradient."""
    _, context = measured("linear", "lora_diag", rank=24)
    write_context(tmp_path / "c.safetensors", context)
    pull = lalora.penalty(lalora.Options(str(tmp_path / "c.safetensors"), 1.0))
    _, made = joined("linear", lora.method(lora.Options()) | pull)
    started = {layer.name: layer.down.detach().clone() for layer in made.layers()}
    shake(made)
    total, mean, count = 0.0, 0.0, 0
    for layer in made.layers():
        S, G = (dense(side).double() for side in context.layers[layer.name])
        U, D_0 = layer.up.detach().double(), started[layer.name].double()
        assert not torch.equal(layer.down.detach(), started[layer.name])
        total += float(layer.scale**2 * ((U.T @ G @ U).diagonal() * (D_0 @ S @ D_0.T).diagonal()).sum())
        mean, count = mean + float(G.trace() * S.trace()), count + U.shape[0] * D_0.shape[1]
    value = made.penalties()["lalora"]
    assert float(value.detach()) == pytest.approx(0.5 * total / (mean / count), rel=1e-5)
    downs = [layer.roles()["down"] for layer in made.layers()]
    assert torch.autograd.grad(value, downs, allow_unused=True) == (None,) * len(downs)


def test_penalty_of_experts_uses_their_mean(tmp_path):
    pull = lalora.penalty(lalora.Options(written(tmp_path), 1.0))
    _, made = joined("linear", probes()["experts"] | pull)
    shake(made)
    U, _ = made.layers()[0].factors()
    assert laplace_penalty._thin(made.layers()[0])[0].shape == U.shape[1:]
    assert float(made.penalties()["lalora"].detach()) > 0
    with torch.no_grad():
        for layer in made.layers():
            layer.up.sub_(layer.up.mean(0))
    assert float(made.penalties()["lalora"].detach()) == pytest.approx(0, abs=1e-9)


def test_isotropic_penalty():
    _, made = joined("linear", lalora.method(lalora.Options(None, 2.0, True)))
    shake(made)
    squares = sum(layer.delta_weight().double().square().sum() for layer in made.layers())
    torch.testing.assert_close(made.penalties()["lalora"].double(), squares, rtol=1e-5, atol=0)


def trained(strength: float | None, path: str | None, steps: int = 30):
    """A LoRA on the toy, trained for a target that the base is far from."""
    method = (
        lora.method(lora.Options()) if strength is None else lalora.method(lalora.Options(path, strength))
    )
    torch.manual_seed(0)
    model, made = joined("linear", method)
    torch.manual_seed(1)
    x, y = HOSTS["linear"].example(8), torch.randn(8, 5, 16)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    seen = []
    for _ in range(steps):
        parts = [(model(x) - y).square().mean(), *made.penalties().values()]
        torch.stack(parts).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append([float(part.detach()) for part in parts])
    return made, seen


def test_lambda_zero_and_huge_lambda(tmp_path):
    path = written(tmp_path)
    (plain, _), (zero, seen), (huge, _) = trained(None, None), trained(0.0, path), trained(1e6, path)
    for mine, his in zip(zero.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, his)
    assert all(row[1] == 0 for row in seen)
    sizes = [
        max(float(layer.delta_weight().detach().norm()) for layer in one.layers()) for one in (plain, huge)
    ]
    assert sizes[1] < 0.03 * sizes[0]
    _, seen = trained(0.1, path)
    assert seen[0][1] == 0 and all(row[1] > 0 for row in seen[1:])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.slow
def test_penalty_halves_forgetting_at_little_cost(seed, tmp_path):
    """Source and target inputs fill 8 of a layer's 24 dimensions each, as low-dimensional data do; outputs
    and hidden values they share. Against a plain LoRA, against L2 of any strength about the same target loss,
    and against the curvature of the target's own data."""
    torch.manual_seed(seed)
    model = base("linear").requires_grad_(False)
    mix_s, mix_t = torch.randn(8, 24) / 3.5, torch.randn(8, 24) / 3.5
    source, target = torch.randn(64, 5, 8) @ mix_s, torch.randn(64, 5, 8) @ mix_t
    wanted_s = model(source) + 0.1 * torch.randn(64, 5, 16)
    wanted_t = model(target) + torch.tanh(target[..., :16])

    def context(name: str, x: Tensor, wanted: Tensor) -> str:
        fisher = Fisher(find("unet", model, target="."), "kfac_lr", 16, 0, "cpu")
        with fisher.watching():
            signs = torch.randint(0, 2, wanted.shape).float() * 2 - 1
            fisher.add(64, lambda: squared_error_draw(model(x), wanted, signs))
        write_context(tmp_path / name, fisher.context({}))
        return str(tmp_path / name)

    of_source = context("source.safetensors", source, wanted_s)
    of_target = context("target.safetensors", target, wanted_t)
    begun = float((model(source) - wanted_s).square().mean())

    def run(options: lalora.Options) -> tuple[float, float]:
        """The target's loss, and what the source's has risen by."""
        torch.manual_seed(0)
        own, made = joined("linear", lalora.method(options), rank=8, alpha=8.0)
        optimizer = torch.optim.AdamW(made.parameters(), lr=5e-3)
        for _ in range(200):
            loss = (own(target) - wanted_t).square().mean()
            torch.stack([loss, *made.penalties().values()]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            told = float((own(target) - wanted_t).square().mean())
            return told, float((own(source) - wanted_s).square().mean()) - begun

    plain, held = run(lalora.Options()), run(lalora.Options(of_source, 1e-3))
    assert held[0] < 1.02 * plain[0] and held[1] < 0.5 * plain[1]
    flat = [run(lalora.Options(None, strength, True)) for strength in (3e-4, 1e-3)]
    assert flat[-1][0] > held[0]  # the strengths reach past the held one's target loss
    assert all(held[1] < 0.5 * one[1] for one in flat)
    assert held[1] < 0.5 * run(lalora.Options(of_target, 1e-3))[1]


# ---------- files


def broken(what: str, path: Path) -> None:
    tensors = load_file(path)
    facts = {"lowrank.kind": "lalora_context", "lowrank.curvature": "kfac"}
    name = "lora_unet_first"
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-400])
        return
    if what == "nan":
        tensors[f"{name}.S_val"][0] = torch.nan
    if what == "negative":
        tensors[f"{name}.G_val"][0] = -1
    if what == "shapes":
        tensors[f"{name}.S_val"] = tensors[f"{name}.S_val"][:-1]
    if what == "absent":
        del tensors[f"{name}.G_vec"]
    if what == "unprobed":
        del tensors[f"{name}.W_probe"]
    if what == "adapter":
        facts = {}
    if what == "kind":
        facts["lowrank.curvature"] = "kfca"
    if what == "names":
        tensors = {"lora_unet_other" + key[key.index(".") :]: value for key, value in tensors.items()}
    if what == "other weights":
        tensors[f"{name}.W_probe"] = torch.randn(8, generator=torch.Generator().manual_seed(1))
        tensors["lora_unet_second.W_probe"] = torch.randn(8, generator=torch.Generator().manual_seed(2))
    if what == "other shapes":
        for part in ("vec", "val"):
            tensors[f"{name}.S_{part}"] = tensors[f"lora_unet_second.S_{part}"].clone()
    if what == "dead":
        tensors |= {key: torch.zeros_like(value) for key, value in tensors.items() if "G_val" in key}
    save_file(tensors, path, facts)


BROKEN = {
    "truncated": "not a whole safetensors file",
    "nan": "lora_unet_first.S_val in .* NaN",
    "negative": "lora_unet_first.G_val in .* below 0",
    "shapes": "shapes that do not fit together",
    "absent": "lacks lora_unet_first.G_vec",
    "unprobed": "no fingerprint of its base model's weights",
    "adapter": "no LaLoRA context",
    "kind": "no LaLoRA context",
    "names": "none of the 2 adapted layers",
    "other weights": "on another base model: the weights of 2 layers differ",
    "other shapes": "lora_unet_first is 40×24 and 40×40 in .* another base model",
    "dead": "no curvature in any",
}


@pytest.mark.parametrize("strength", [0.0, 0.1])
@pytest.mark.parametrize("what", BROKEN)
def test_bad_context_file_is_refused_at_lambda_zero(what, strength, tmp_path):
    path = written(tmp_path)
    broken(what, Path(path))
    with pytest.raises(Refused, match=BROKEN[what]) as told:
        joined("linear", lalora.method(lalora.Options(path, strength)))
    assert path in str(told.value)


def test_lambda_needs_context_or_isotropic(tmp_path):
    for options, said in (
        (lalora.Options(None, 0.1), "needs a context; give"),
        (lalora.Options(None, -1.0), "below 0"),
        (lalora.Options(str(tmp_path / "none.safetensors"), 0.0), "does not exist"),
        (lalora.Options(written(tmp_path), 0.1, True), "give only one of them"),
    ):
        with pytest.raises(Refused, match=said):
            lalora.method(options)
    assert lalora.method(lalora.Options()).penalty == ()


def test_base_hash_in_another_dtype():
    for kind in HOSTS:
        layer, half = base(kind).first, base(kind).bfloat16().first
        assert (weight_fingerprint(layer) - weight_fingerprint(half)).square().mean().sqrt() < 0.02
        with torch.no_grad():
            layer.weight.copy_(torch.randn_like(layer.weight))
        assert (weight_fingerprint(layer) - weight_fingerprint(half)).square().mean().sqrt() > 0.7


def test_layers_without_curvature_are_reported(tmp_path, caplog):
    _, context = measured("linear", samples=64)
    layers = {"lora_unet_first": context.layers["lora_unet_first"]}
    probes = {"lora_unet_first": context.probes["lora_unet_first"]}
    layers["lora_te_text_model_encoder"] = layers["lora_unet_first"]
    probes["lora_te_text_model_encoder"] = probes["lora_unet_first"]
    path = tmp_path / "c.safetensors"
    write_context(path, dataclasses.replace(context, layers=layers, probes=probes))
    caplog.set_level("INFO")
    joined("linear", lalora.method(lalora.Options(str(path), 0.1)))
    assert "applies to 1 of 2 adapted layers" in caplog.text
    assert "lacks 1 adapted layers, which have no penalty, for example lora_unet_second" in caplog.text
    assert "1 of its 2 layers are not adapted" in caplog.text


def test_context_file_of_fork(tmp_path):
    path, core = tmp_path / "old.safetensors", torch.rand(4, 4)
    tensors = {f"unet_{one}.alpha_{part}": value for one in ("first", "second")
               for part, value in (("mean", torch.eye(4)), ("precision", core))}  # fmt: skip
    save_file({key: value.clone() for key, value in tensors.items()}, path)
    pull = lalora.penalty(lalora.Options(str(path), 0.5))
    _, made = joined("linear", probes()["core"] | pull)
    assert float(made.penalties()["lalora"].detach()) == 0
    shake(made)
    told = sum((core * (layer.core.detach() - torch.eye(4)).square()).sum() for layer in made.layers())
    assert float(made.penalties()["lalora"].detach()) == pytest.approx(
        float(0.25 * told / core.mean()), rel=1e-5
    )
    with pytest.raises(Refused, match=r"no layer of lora\+lalora has; make"):
        joined("linear", lora.method(lora.Options()) | pull)
    with pytest.raises(Refused, match="with another basis"):
        joined("linear", probes()["core"] | pull, rank=3)
    save_file({"unet_first.alpha_precision": core}, path)
    with pytest.raises(Refused, match="no alpha_mean"):
        lalora.penalty(lalora.Options(str(path), 0.5))


# ---------- the script, and training with what it writes


@pytest.fixture
def line(folders, tmp_path):
    """A call of the script on two numbered pictures and one of another shape."""

    def words(model: Path, *more: str) -> list[str]:
        given = {
            "pretrained_model_name_or_path": model,
            "source_data_dir": folders / "train",
            "output_path": tmp_path / "context.safetensors",
            "resolution": 64,
            "bucket_reso_steps": 32,
            "mixed_precision": "no",
            "num_samples": 3,
            "batch_size": 2,
            "kfac_rank": 4,
        }
        return [w for k, v in given.items() if f"--{k}" not in more for w in (f"--{k}", str(v))] + list(more)

    return words


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
@pytest.mark.slow
def test_script_on_every_family(kind, line, tmp_path, capsys, request):
    assert main(line(request.getfixturevalue(f"tiny_{kind}"), "--gradient_checkpointing")) == 0
    context = read_context(tmp_path / "context.safetensors")
    text = [name for name in context.layers if name.startswith("lora_te")]
    assert context.metadata["lowrank.samples"] == "3" and context.metadata["lowrank.base_hash"]
    assert f"of {len(context.layers)} layers, {len(text)} of them" in capsys.readouterr().out and text
    held = [name for name, layer in context.layers.items() if layer.G.main.any() and layer.S.main.any()]
    assert len(held) > 0.8 * len(context.layers)
    assert all(torch.isfinite(layer.S.main).all() for layer in context.layers.values())


@pytest.mark.slow
def test_context_file_does_not_depend_on_the_batch_size(line, tiny_sd2, tmp_path):
    """To fp32's rounding: other kernels for other batch sizes, amplified by the way back through the U-Net.

    Measured with oneDNN's kernels for SSE4.1, AVX2 and AVX-512 and without oneDNN: at most 1.2e-3 in one of
    48 matrices, 1.5e-4 at the median. A miscounted sample would change them by a fifth.
    """
    own = ("--target", "up_blocks.3.*attn", "--network_train_unet_only", "--num_samples", "5")
    own = (*own, "--v_parameterization")
    files = []
    for size in ("1", "3"):
        out = tmp_path / f"{size}.safetensors"
        assert main(line(tiny_sd2, *own, "--batch_size", size, "--output_path", str(out))) == 0
        files.append(read_context(out))
    apart = []
    for name, layer in files[0].layers.items():
        for mine, his in zip(layer, files[1].layers[name], strict=True):
            apart.append(float(torch.linalg.norm(dense(mine) - dense(his)) / torch.linalg.norm(dense(his))))
    assert max(apart) <= 1e-2 and median(apart) <= 1e-3
    assert main(line(tiny_sd2, *own, "--mixed_precision", "bf16", "--fp8_base", "--xformers")) == 0


@pytest.mark.slow
def test_training_with_a_context(line, arguments, tiny_sd, tiny_sdxl, tmp_path):
    """λ = 0 trains what LoRA trains, bit for bit; λ > 0 logs its penalty; another base is refused."""
    measure = ("--target", "up_blocks.*attn", "--network_train_unet_only")  # what is trained below
    assert main(line(tiny_sd, *measure)) == 0
    path = f"lalora_context_path={tmp_path / 'context.safetensors'}"
    common = (
        "--max_train_steps",
        "2",
        "--network_train_unet_only",
        "--network_args",
        "target=up_blocks.*attn",
    )
    assert sd(arguments("plain", *common)) == 0
    for out, strength in (("zero", 0), ("held", 1)):
        own = (*common, path, f"lalora_lambda={strength}", "--network_module", "networks.lalora")
        assert sd(arguments(out, *own, "--save_state")) == 0
    plain, zero, held = (load_file(tmp_path / out / "cat.safetensors") for out in ("plain", "zero", "held"))
    assert all(torch.equal(plain[key], zero[key]) for key in plain) and plain.keys() == zero.keys()
    assert any(not torch.equal(plain[key], held[key]) for key in plain)
    told = [float(row["lalora"]) for row in rows(tmp_path / "held")]
    assert told[0] == 0 and told[1] > 0
    assert [float(row["lalora"]) for row in rows(tmp_path / "zero")] == [0, 0]
    assert main(line(tiny_sd, *measure, "--seed", "1", "--num_samples", "1", "--curvature", "diag")) == 0
    with pytest.raises(Refused, match="it had another file for its network argument lalora_context_path"):
        sd(arguments("on", *own, "--resume", str(tmp_path / "held" / "cat-state")))
    own = (*common[:-1], path, "--network_module", "networks.lalora")
    with pytest.raises(Refused, match="on another base model"):
        sdxl(arguments("other", *own, model=tiny_sdxl))
    with pytest.raises(Refused, match="needs a context; give"):
        sd(arguments("none", *common, "lalora_lambda=0.1", "--network_module", "networks.lalora"))


def test_training_folder_as_source_is_refused(line, folders, tiny_sd, tmp_path, caplog):
    with pytest.raises(Refused, match="is the training folder"):
        main(line(tiny_sd, "--train_data_dir", str(folders / "train")))
    copied = tmp_path / "copied"
    copied.mkdir()
    shutil.copy(folders / "train" / "2_cat" / "1.png", copied / "other_name.png")
    with pytest.raises(Refused, match="has 1 pictures of the training folder"):
        main(line(tiny_sd, "--train_data_dir", str(copied)))
    pictures.check_source(folders / "train", str(copied), force=True)
    assert "taken all the same" in caplog.text
    pictures.check_source(folders / "reg", str(copied), force=False)


@pytest.mark.slow
def test_source_images_drawn_by_base(line, tiny_sd, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --s 1\na dog --s 1 --d 7\n")
    words = line(
        tiny_sd, "--source_prompts", str(prompts), "--images_per_prompt", "2", "--target", "mid_block"
    )
    at = words.index("--source_data_dir")
    assert main(words[:at] + words[at + 2 :]) == 0
    folder = tmp_path / "context_source"
    drawn = sorted(folder.glob("*.png"))
    assert len(drawn) == 4 and drawn[0].with_suffix(".txt").read_text() == "a cat\n"
    models = SD15.load(Source(str(tiny_sd)), ())
    default = Prompt("", width=64, height=64, sample_steps=30, scale=7.5, guidance_scale=None)
    options = CALC_CONTEXT.parse(words).options.sources
    pictures.draw_source(SD15, models, SdOptions(), options, 0, folder, default)  # everything is there
    assert models.denoiser is None and sorted(folder.glob("*.png")) == drawn


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--target", "nothing_of_that_name"], "matches target"),
        (["--output_path", "context.pt"], "does not end in .safetensors"),
        (["--fp8_base"], "needs --mixed_precision"),
        (["--basis_path", "none.safetensors"], "does not exist"),
        (["--source_data_dir", "nowhere"], "does not exist"),
    ],
)
def test_script_errors(more, said, line, tiny_sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=said):
        main(line(tiny_sd, *more))


def test_flux_has_no_flags_of_sd(line, tiny_flux):
    with pytest.raises(Refused, match="--min_snr_gamma is not for flux"):
        main(line(tiny_flux, "--min_snr_gamma", "5"))
