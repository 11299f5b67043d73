"""Warm-up stages: ABM's hinge and guard, bases from gradients, and what a run is after them."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from flux_run import arguments as flux_arguments  # noqa: F401
from flux_run import pictures, same  # noqa: F401
from safetensors.torch import load_file
from sd_run import arguments, folders, scalars  # noqa: F401
from torch import nn

from lowrank.adapters.method import Chain, Factor, Method, Warmup, WarmupBatches
from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.targets import find
from lowrank.bases import gradients
from lowrank.cli.flux_train import main as flux
from lowrank.cli.sd_train import main as sd
from lowrank.cli.sd_train import main_sdxl as sdxl
from lowrank.config.flags_training import Abm
from lowrank.data.loader import Batch
from lowrank.errors import Refused
from lowrank.models.family import Source
from lowrank.models.flux import FLUX
from lowrank.models.memory import checkpointed
from lowrank.models.sd import SD15
from lowrank.models.sdxl import SDXL
from lowrank.train import abm, warmup
from lowrank.train.abm_hooks import activations, depth_weights, hinge
from lowrank.train.loop import Forward, Run
from networks import delta_r, dora, lora

C, B = 12, 4


class GELU(nn.Module):
    """As diffusers' class of this name: the table knows it by its name."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(ins, outs)

    def forward(self, x):
        return F.gelu(self.proj(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ff, self.out = GELU(C, 2 * C), nn.Linear(2 * C, C)

    def forward(self, x):
        return x + self.out(self.ff(x))


class Toy(nn.Module):
    """Three residual blocks on (B, C); each may be checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.around = None
        self.requires_grad_(False)

    def forward(self, x):
        for block in self.blocks:
            x = self.around(block, x) if self.around and torch.is_grad_enabled() else block(x)
        return x


class Data:
    """Two batches an epoch, which a seed draws."""

    def epoch(self, epoch, start=0, **_):
        for position in range(start, 2):
            drawn = torch.Generator().manual_seed(10 * epoch + position)
            x, pair = torch.randn(B, C, generator=drawn), torch.zeros(B, 2)
            yield Batch(
                epoch, position, (None,) * B, ("",) * B, None, x, torch.ones(B), pair, pair, pair, None
            )

    def shard(self, rank, world):
        return self


class Task:
    """Predict what another model makes of x; noise is added to x."""

    def __init__(self, target: nn.Module) -> None:
        self.target = target

    def draw(self, latents, generator, at):
        noisy = latents + 0.1 * torch.randn(latents.shape, generator=generator)
        return SimpleNamespace(noisy=noisy, timesteps=torch.zeros(len(latents)))

    def losses(self, prediction, drawn, mask=None):
        return (prediction - self.target(drawn.noisy)).square().mean(dim=1)


def on(model: nn.Module, module=lora, rank: int = 4, **more) -> AdapterNetwork:
    torch.manual_seed(1)
    made = module.create_network(1.0, rank, float(rank), None, [], model, target=".", **more)
    made.apply_to([], model, False, True)
    return made


def run_of(model: nn.Module, network: AdapterNetwork, target: nn.Module | None = None) -> Run:
    accelerator, messages = Accelerator(cpu=True), []
    forward = Forward(
        accelerator=accelerator,
        network=network,
        objective=Task(target or Toy()),
        latents=lambda batch, generator: batch.encoded,
        conditions=lambda batch: {},
        denoise=lambda noisy, t, conditions: model(noisy),
    )
    log = SimpleNamespace(message=messages.append, messages=messages)
    optimizer = torch.optim.AdamW(network.parameters())
    return Run(
        forward=forward,
        denoiser=model,
        text_encoders=[],
        loader=Data(),
        optimizer=optimizer,
        scheduler=None,
        group_names=[],
        steps=10,
        epochs=5,
        seed=0,
        max_grad_norm=0.0,
        scale_weight_norms=None,
        log=log,
        after_step=None,
        after_epoch=None,
        last_checkpoint=None,
        mask_gradients=None,
    )


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(adapter file, the toy with that adapter): another task, of low rank."""
    model = Toy()
    network = on(model)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in network.layers():
            layer.up.copy_(0.5 * torch.randn(layer.up.shape, generator=draw))
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    network.save_weights(str(path), None, {"ss_network_module": "networks.lora"})
    return path, model


def options(**given) -> Abm:
    return Abm(**{"abm_enabled": True, "abm_steps": 3, "abm_lr": 1e-2, **given})


def values(network: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def equal(one: list, two: list) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def staged(given: Abm, run: Run):
    """The stage with its teacher in place, ready to give a loss."""
    made = abm._Stage(given, run, None, run.network)
    stack = contextlib.ExitStack()
    made.teacher_forward, made.as_teacher = stack.enter_context(abm._teaching(run, given.abm_teacher))
    made.boundaries = made._survey()
    stack.enter_context(made.boundaries.watched())
    return made, stack


# ---------- ABM


def test_the_hinge_is_its_formula():
    z, t = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5)
    by_hand = sum(
        max(0.0, 0.3 - (1 if b > 0 else -1) * a) ** 2
        for a, b in zip(z.flatten().tolist(), t.flatten().tolist(), strict=True)
    )
    assert hinge(z, t > 0, 0.3).item() == pytest.approx(by_hand / 15, rel=1e-6)
    assert hinge(t, t > 0, 0.0).item() == 0 and hinge(torch.zeros(2), torch.zeros(2) > 0, 0.0) == 0
    assert depth_weights(4, "uniform") == [1, 1, 1, 1]
    assert depth_weights(4, "linear") == [0.25, 0.5, 0.75, 1]
    assert depth_weights(2, "quadratic") == [0.25, 1]


def test_the_loss_is_that_of_the_teachers_signs(planted):
    path, teacher = planted
    for mode in ("relative", "absolute"):
        run = run_of(model := Toy(), on(model), teacher)
        given = options(abm_teacher=str(path), abm_margin=0.2, abm_margin_mode=mode, abm_layers=0.6,
                        abm_weight_strategy="quadratic")  # fmt: skip
        made, stack = staged(given, run)
        with stack:
            batch = next(Data().epoch(3))
            loss = made.loss(batch)
        noisy = run.forward.objective.draw(batch.encoded, warmup.noise(run, batch), None).noisy
        seen = {}
        for name, net in (("student", Toy()), ("teacher", teacher)):
            x, seen[name] = noisy, []
            for block in net.blocks:
                seen[name].append(block.ff.proj(x))
                x = block(x)
        by_hand = 0.0
        for weight, z, t in zip((0.25, 1.0), seen["student"][1:], seen["teacher"][1:], strict=True):
            margin = 0.2 * (t.abs().median() if mode == "relative" else 1.0)
            by_hand += weight * (margin - torch.where(t > 0, z, -z)).clamp_min(0).square().mean() / 2
        assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize("module", [lora, dora, delta_r])
def test_the_base_teaches_a_fresh_adapter_nothing(module, bases):
    more = {"basis_cache": str(bases)} if module is delta_r else {}
    run = run_of(model := Toy(), on(model, module, **more))
    made, stack = staged(options(abm_margin=0.0), run)
    with stack:
        loss = made.loss(next(Data().epoch(0)))
        assert loss.item() == 0
        loss.backward()
        assert all(p.grad is None or not p.grad.any() for p in run.network.parameters())
    before = values(run.network)
    for given in (options(abm_margin=0.0, abm_guard=False), options()):
        warmup.warm_up(run, abm.stage(given, run, None))
        assert "ABM is skipped" in run.log.messages[-1] and equal(before, values(run.network))
    warmup.warm_up(run, abm.stage(options(abm_guard=False), run, None))  # asked for by name, it runs
    assert not equal(before, values(run.network))


def test_the_loss_scale_changes_no_gradient(planted):
    """Without a scaler, and with one, which begins at 65536: a power of two rounds nothing."""
    ended = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=8.0)):
        run = run_of(model := Toy(), on(model), planted[1])
        run.accelerator.scaler = scaler
        warmup.warm_up(run, abm.stage(options(abm_teacher=str(planted[0]), abm_guard=False), run, None))
        ended.append(values(run.network))
    assert equal(*ended)
    assert scaler is not None and scaler.get_scale() == 8.0  # the run's own is as it was


def test_abm_batch_size_takes_part_of_a_batch(planted):
    found = []
    for size, cut in ((2, B), (None, 2)):
        run = run_of(model := Toy(), on(model), planted[1])
        made, stack = staged(options(abm_teacher=str(planted[0]), abm_batch_size=size), run)
        with stack:
            made.loss(abm._first(next(Data().epoch(0)), cut)).backward()
        found.append([p.grad for p in run.network.parameters() if p.grad is not None])
    assert found[0] and equal(*found)


def test_the_network_argument_is_the_batch_size_where_no_flag_says_it():
    model = Toy()
    network = on(model)
    network.method = replace(network.method, options={"abm_batch_size": 3})
    run = run_of(model, network)
    assert abm._Stage(options(), run, None, network).batch_size == 3
    assert abm._Stage(options(abm_batch_size=2), run, None, network).batch_size == 2


def test_checkpointing_changes_no_gradient(planted):
    """The last pre-activation is inside the last block, so the forward ends in the middle of a checkpoint."""
    found = []
    for around in (None, checkpointed()):
        model = Toy()
        model.around = around
        run = run_of(model, on(model), planted[1])
        made, stack = staged(options(abm_teacher=str(planted[0])), run)
        with stack:
            for batch in Data().epoch(0):
                made.loss(batch).backward()
        found.append([p.grad for p in run.network.parameters() if p.grad is not None])
    assert found[0] and equal(*found)
    last = run.network.layers()[-1]  # behind the last pre-activation: never reached
    assert last.up.grad is None


def test_a_teacher_of_the_task_helps_and_leaves_nothing_else_behind(planted):
    path, teacher = planted
    scores = {}
    for steps in (0, 60):
        run = run_of(model := Toy(), on(model), teacher)
        run.optimizer = torch.optim.AdamW(run.network.parameters(), 1e-2)
        start = torch.get_rng_state()
        if steps:
            given = options(abm_teacher=str(path), abm_steps=steps, abm_weight_strategy="linear")
            logged = []
            run.accelerator.log = lambda told, step, logged=logged: logged.append((step, told))
            warmup.warm_up(run, abm.stage(given, run, None))
            signs = [told["warm-up/abm/equal_signs"] for _, told in logged if len(told) == 2]
            losses = [told["warm-up/abm/loss"] for _, told in logged if len(told) == 1]
            assert len(signs) == 2 and signs[1] > signs[0] + 0.05
            assert len(losses) == steps and losses[-1] < 0.7 * losses[0]
            assert "ABM: loss" in run.log.messages[-1]
        assert torch.equal(torch.get_rng_state(), start) and not run.optimizer.state
        assert all(p.grad is None and p.requires_grad for p in run.network.parameters())
        assert {layer.multiplier for layer in run.network.layers()} == {1.0}
        for layer in run.network.layers():
            assert layer.host.forward == layer.forward and not layer.host._forward_hooks
        for step in range(10):
            for batch in Data().epoch(step):
                run.forward.losses(batch, warmup.noise(run, batch))[0].mean().backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        batch = next(Data().epoch(99))
        scores[steps] = run.forward.losses(batch, warmup.noise(run, batch))[0].mean().item()
    assert scores[60] < 0.97 * scores[0]


def test_abm_warmup_with_the_tasks_teacher_lowers_the_loss(tmp_path):
    """A LoRA of the same task as teacher, and a task that no LoRA of that rank solves: far ahead at step 10,
    not behind at 300. That many steps of the task itself in place of the stage are the better start."""
    target, draw = Toy(), torch.Generator().manual_seed(50)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=draw))

    def measured(run: Run) -> float:
        batches = [batch for epoch in range(1000, 1015) for batch in Data().epoch(epoch)]
        with torch.no_grad():
            losses = [run.forward.losses(batch, warmup.noise(run, batch))[0].mean() for batch in batches]
        return float(torch.stack(losses).mean())

    def fit(run: Run, steps: int, first: int = 0) -> dict[int, float]:
        optimizer, seen = torch.optim.AdamW(run.network.parameters(), 1e-2), {}
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
        for step in range(1, steps + 1):
            for batch in Data().epoch(first + step):
                run.forward.losses(batch, warmup.noise(run, batch))[0].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step in (10, 300):
                seen[step] = measured(run)
        return seen

    plain = run_of(model := Toy(), on(model), target)
    alone = fit(plain, 300)
    path = tmp_path / "teacher.safetensors"
    plain.network.save_weights(str(path), None, {"ss_network_module": "networks.lora"})
    staged = run_of(model := Toy(), on(model), target)
    given = options(abm_teacher=str(path), abm_steps=60, abm_weight_strategy="linear")
    warmup.warm_up(staged, abm.stage(given, staged, None))
    ahead = fit(staged, 300)
    control = run_of(model := Toy(), on(model), target)
    fit(control, 60, 5000)
    assert ahead[10] < 0.8 * alone[10] and ahead[300] < 1.01 * alone[300]
    assert fit(control, 10)[10] < ahead[10]


@pytest.mark.parametrize("module", ["evil", "networks.evil", "evil.deeper", "../evil"])
def test_abm_teacher_cannot_choose_what_is_imported(module, tmp_path, monkeypatch):
    """A teacher from a stranger names a module beside it on the path."""
    (tmp_path / "evil.py").write_text("raise SystemExit('code from a file ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    on(Toy()).save_weights(str(tmp_path / "teacher.safetensors"), None, {"ss_network_module": module})
    with pytest.raises(Refused, match="reads only adapters of the modules in networks/"):
        abm.load_teacher(str(tmp_path / "teacher.safetensors"), Toy(), [])


def test_abm_guard_reverts_a_harmful_warmup(planted):
    run = run_of(model := Toy(), on(model), Toy())  # the task is the base's own, the teacher's another
    before = values(run.network)
    given = options(abm_teacher=str(planted[0]), abm_steps=10)
    warmup.warm_up(run, abm.stage(given, run, None))
    assert "ABM is undone" in run.log.messages[-1] and equal(before, values(run.network))
    warmup.warm_up(run, abm.stage(replace(given, abm_guard=False), run, None))
    assert not equal(before, values(run.network))


def test_what_a_stage_reads_of_real_models(tiny_sd, tiny_sdxl, tiny_flux):
    counted = {}
    for name, family, folder in (("sd", SD15, tiny_sd), ("sdxl", SDXL, tiny_sdxl), ("flux", FLUX, tiny_flux)):
        shapes = family.empty(family.load(Source(str(folder), dtype=torch.float32), ()))
        found = activations("denoiser", shapes)
        counted[name] = {one.name.rpartition(".")[2] for one in found}
        assert all(one.half == (type(one.module).__name__ == "Linear" and name != "flux")
                   for one in found if one.name.endswith("proj"))  # fmt: skip
    unet = {"proj", "norm1", "norm2", "linear_1", "conv_norm_out"}
    assert counted == {"sd": unet, "sdxl": unet, "flux": {"proj", "proj_mlp", "linear_1"}}


# ---------- a basis from gradients


def planted_samples(model: nn.Module, U: torch.Tensor, V: torch.Tensor, overflows: int = 0) -> WarmupBatches:
    """Inputs in span(V) and output gradients in span(U) of every layer; the first `overflows` calls fail."""
    left = [overflows]

    def losses(index: int):
        def call():
            draw = torch.Generator().manual_seed(index)
            x = torch.randn(B, 5, V.shape[1], generator=draw) @ V.T
            g = torch.randn(B, 5, U.shape[1], generator=draw) @ U.T
            left[0] -= 1
            return (model(x) * g).sum(dim=(1, 2)) * (math.inf if left[0] >= 0 else 1.0)

        return call

    return WarmupBatches(
        lambda: (losses(index) for index in range(10**6)), lambda t: t, 1, lambda *_: None, overflows > 0
    )


def core_network(model: nn.Module, rank: int, stages: tuple[Warmup, ...] = ()) -> AdapterNetwork:
    """Frozen random factors around a trained core that starts at 0."""

    def start(weights, ranks, scales):
        draw = torch.Generator().manual_seed(3)
        return {
            name: {
                "basis_up": torch.randn(len(W), ranks[name], generator=draw),
                "basis_down": torch.randn(ranks[name], W.shape[1], generator=draw),
                "core": torch.zeros(ranks[name], ranks[name]),
            }
            for name, W in weights.items()
        }, {}

    factor = Factor(start, ("core",), (Chain(("basis_up", "core"), ("basis_down",)),))
    made = AdapterNetwork(
        Method("core", factor, warmup=stages), find("unet", model, target="."), lambda _: (rank, rank)
    )
    made.start()
    made.apply_to([], model, False, True)
    return made


def angle(one: torch.Tensor, two: torch.Tensor) -> float:
    """Largest principal angle between the columns of two matrices of equal rank."""
    a, b = (torch.linalg.qr(m.double())[0] for m in (one, two))
    return math.asin(min(1.0, torch.linalg.matrix_norm(b - a @ (a.T @ b), 2).item()))


@pytest.mark.parametrize("kind", gradients.KINDS)
@pytest.mark.parametrize("overflows", [0, 2])
def test_gradient_basis_finds_a_planted_subspace(kind, overflows):
    draw = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(40, 3, generator=draw))[0]
    V = torch.linalg.qr(torch.randn(60, 3, generator=draw))[0]
    model = nn.Sequential(nn.Linear(60, 40)).requires_grad_(False)
    network = core_network(model, 3)
    found = gradients.gradient_basis(network, planted_samples(model, U, V, overflows), 8 * B, kind)
    (sides,) = found.values()
    assert sides.left.shape == (40, 3) and sides.right.shape == (3, 60)
    assert angle(sides.left, U) < 1e-3 and angle(sides.right.T, V) < 1e-3
    eye = torch.eye(3)
    torch.testing.assert_close(sides.left.T @ sides.left, eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(sides.right @ sides.right.T, eye, atol=1e-5, rtol=0)
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_basis_is_that_of_the_dense_gradients(checkpoint):
    """Linear layers and convolutions, in their order of importance, against torch's own weight gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 10, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(10, 6, 1), nn.Flatten()),
        nn.Linear(24, 7),
    )
    forward = model.forward
    if checkpoint:
        around = checkpointed()
        model.forward = lambda x: around(forward, x)
    x, goal = torch.randn(B, 3, 4, 4), torch.randn(B, 7)

    def losses():
        return (model(x) - goal).square().mean(dim=1)

    layers = [model[0], model[2], model[4]]
    losses().sum().backward()
    dense = [layer.weight.grad.flatten(1) for layer in layers]
    model.requires_grad_(False)
    network = core_network(model, 3)
    given = WarmupBatches(lambda: iter([losses] * 3), lambda t: t, 1, lambda *_: None)
    found = gradients.gradient_basis(network, given, 2 * B)
    for layer, G in zip(network.layers(), dense, strict=True):
        s = torch.linalg.svdvals(G)
        L, R = found[layer.name]
        core = L.T @ G @ R.T
        kept = (core.norm() / s[:3].norm()).item()
        assert kept > 0.9
        if len(s) <= 7:  # the sketch is as wide as the matrix: exact, and in order
            torch.testing.assert_close(core.abs(), torch.diag(s[:3]), rtol=1e-3, atol=1e-3 * s[0].item())


def test_a_stage_hands_each_layer_its_basis_and_one_without_gradient_a_random_one(caplog):
    model = nn.ModuleDict({"used": nn.Linear(8, 6), "idle": nn.Linear(5, 9)}).requires_grad_(False)
    U, V = torch.eye(6)[:, :2], torch.eye(8)[:, :2]

    def assign(layer, L, R):
        layer.load({"basis_up": L, "basis_down": R}, "the warm-up")

    network = core_network(model, 2, (gradients.basis_stage("grad", B, assign),))
    (stage,) = network.method.warmup
    assert stage.name == f"basis grad from {B} samples"
    before = {layer.name: layer.basis_up.clone() for layer in network.layers()}
    stage.run(network, planted_samples(model["used"], U, V))
    used, idle = network.layers()
    assert angle(used.basis_up, U) < 1e-3 and angle(used.basis_down.T, V) < 1e-3
    assert "no gradient reached 1 of 2 layers" in caplog.text
    assert not torch.equal(idle.basis_up, before[idle.name])
    torch.testing.assert_close(idle.basis_up.T @ idle.basis_up, torch.eye(2), atol=1e-5, rtol=0)
    assert not any(layer.delta_weight().any() for layer in network.layers())


def test_the_trainer_gives_a_stage_its_own_losses():
    def assign(layer, L, R):
        layer.load({"basis_up": L, "basis_down": R}, "the warm-up")

    # the gradient of a task that differs by a low-rank step from the base lies where that step lies
    target = Toy()
    U, V = (
        torch.linalg.qr(torch.randn(n, 1, generator=torch.Generator().manual_seed(n)))[0] for n in (C, 24)
    )
    with torch.no_grad():
        target.blocks[2].out.weight.add_(0.5 * U @ V.T)
    network = core_network(model := Toy(), 1, (gradients.basis_stage("grad", 40, assign),))
    run = run_of(model, network, target)
    logged = []
    run.accelerator.log = lambda told, step: logged.append(told)
    start = torch.get_rng_state()
    warmup.warm_up(run, None)
    assert run.log.messages == ["warm-up: basis grad from 40 samples"] and len(logged) == 10
    assert all(told["warm-up/basis/loss"] > 0 for told in logged)
    last = network.layers()[-1]
    assert angle(last.basis_up, U) < 1e-3  # its error is U times a number, whatever the sample
    assert torch.equal(torch.get_rng_state(), start) and not last.delta_weight().any()


def test_a_basis_that_cannot_be_is_refused():
    model = nn.Sequential(nn.Linear(4, 3)).requires_grad_(False)
    with pytest.raises(Refused, match="'gard' is not one of grad, actgrad \\(did you mean 'grad'"):
        gradients.basis_stage("gard", 8, print)
    with pytest.raises(Refused, match="basis_samples=0"):
        gradients.basis_stage("grad", 0, print)
    network = core_network(model, 2)
    never = planted_samples(model, torch.eye(3), torch.eye(4), overflows=100)
    with pytest.raises(Refused, match="gradient of batch 1 of the warm-up is not finite"):
        gradients.gradient_basis(network, never, B)
    with pytest.raises(Refused, match="rank 5 exceeds min"):
        gradients.gradient_basis(network, never, B, rank=lambda layer: 5)


def test_stages_of_joined_methods_run_in_order():
    a, b = (Method(name, warmup=(Warmup(name, print),)) for name in "ab")
    assert [stage.name for stage in (a | b | Method("c")).warmup] == ["a", "b"]


# ---------- whole runs


@pytest.fixture(scope="session")
def teachers(tiny_sd, tiny_sdxl, tiny_flux, tmp_path_factory):
    """An adapter file for each tiny model, as if it had been trained."""

    def make(name: str):
        family, folder = {"sd": (SD15, tiny_sd), "sdxl": (SDXL, tiny_sdxl), "flux": (FLUX, tiny_flux)}[name]
        models = family.load(Source(str(folder), dtype=torch.float32), ("denoiser",))
        network = lora.create_network(1.0, 4, 4.0, None, [], models.denoiser)
        network.apply_to([], models.denoiser, False, True)
        with torch.no_grad():
            for layer in network.layers():
                layer.up.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
        path = tmp_path_factory.mktemp("teacher") / f"{name}.safetensors"
        network.save_weights(str(path), None, {})
        return path

    made = {}
    return lambda name: made.setdefault(name, make(name))


ABM = ("--abm_enabled", "--abm_steps", "2", "--abm_lr", "1e-3", "--no-abm_guard", "--abm_layers", "0.5")


def test_resume_after_warmup_equals_uninterrupted_run(arguments, teachers, tmp_path, capsys):
    """SD 1.5 with its text encoder, checkpointed; the stage runs once."""
    more = (*ABM, "--abm_teacher", str(teachers("sd")), "--gradient_checkpointing", "--max_train_steps", "2")
    more += ("--checkpointing_steps", "1", "--ema_decay", "0.5")
    logs = tmp_path / "logs"
    assert sd(arguments("whole", *more, "--logging_dir", str(logs))) == 0
    assert "warm-up: ABM, 2 steps, teacher" in capsys.readouterr().out
    assert sd(arguments("parts", *more, "--resume", str(tmp_path / "whole" / "checkpoint-1"))) == 0
    assert "warm-up" not in capsys.readouterr().out
    assert same(tmp_path / "whole" / "cat.safetensors", tmp_path / "parts" / "cat.safetensors")
    told = scalars(logs)
    assert len(told["warm-up/abm/loss"]) == 2 and len(told["warm-up/abm/equal_signs"]) == 2
    assert len(told["loss/current"]) == 2
    ema = load_file(tmp_path / "whole" / "checkpoint-1" / "ema.safetensors")  # began after the stage
    assert any(mean.any() for mean in ema.values())


def test_sdxl_and_flux(arguments, flux_arguments, teachers, tiny_sdxl, tmp_path, capsys):
    more = ("--network_train_unet_only", "--max_train_steps", "1", *ABM)
    assert sdxl(arguments("xl", *more, "--abm_teacher", str(teachers("sdxl")), model=tiny_sdxl)) == 0
    more = ("--network_module", "networks.dora", "--max_train_steps", "1", "--gradient_checkpointing", *ABM)
    assert flux(flux_arguments("flux", *more, "--abm_teacher", str(teachers("flux")))) == 0
    output = capsys.readouterr().out
    assert output.count("ABM: loss") == 2 and "equal signs" in output
    assert load_file(tmp_path / "xl" / "cat.safetensors")


def test_bad_flags_and_teachers(arguments, flux_arguments, teachers, tmp_path, capsys, caplog):
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    for teacher, said in (
        (tmp_path / "nowhere.safetensors", "does not exist or is not a file; give --abm_teacher an adapter"),
        (tmp_path / "broken.safetensors", "is not a whole safetensors file"),
        (teachers("flux"), "it was made by another method or for another base"),
    ):
        with pytest.raises(Refused, match=said):
            sd(arguments("no", "--abm_enabled", "--abm_teacher", str(teacher)))
    pytest.importorskip("lycoris")
    more = ("--network_module", "lycoris.kohya", "--network_args", "algo=lora", "preset=attn-mlp")
    with pytest.raises(Refused, match="--abm_enabled needs a network module of this program"):
        flux(flux_arguments("no", *more, "--abm_enabled"))
    with pytest.raises(SystemExit):
        sd(arguments("no", "--abm_enabled", "--abm_weight_strategy", "cubic"))
    assert "'cubic' is not one of uniform, linear, quadratic" in capsys.readouterr().err
    assert sd(arguments("no", "--dry_run", "--abm_enabled", "--abm_steps", "7")) == 0
    assert "before step 1: ABM, 7 steps, teacher base" in capsys.readouterr().out
    assert sd(arguments("no", "--dry_run", "--abm_steps", "7")) == 0
    assert "before step 1" not in capsys.readouterr().out
