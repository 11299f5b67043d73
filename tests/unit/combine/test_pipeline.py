"""T-LoRA in stock pipelines: who is told which timestep, and that nothing is left behind."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from toys import shake

from lowrank.adapters import gate
from lowrank.adapters.clock import CONVENTIONS, convention
from lowrank.adapters.network import AdapterNetwork
from lowrank.combine.mixture import Mixture, read_for_merge
from lowrank.combine.pipeline import TimestepRanks, timestep_ranks
from lowrank.errors import Refused
from lowrank.models.family import Source
from lowrank.models.flux import FLUX
from lowrank.models.sd import SD15
from lowrank.models.sdxl import SDXL
from lowrank.train.network_module import find_module
from lowrank.train.text_conditions import stack_text
from networks import tlora

STEPS, R = 5, 8


def denoiser(kind: str = "FluxTransformer2DModel", **config) -> nn.Module:
    """Two layers under the name of a class of diffusers; frozen, always the same."""

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, hidden_states, encoder=None, timestep=None):
            if encoder is not None:
                raise RuntimeError("an error inside the model")
            return self.second(torch.tanh(self.first(hidden_states)))

    Toy.__name__ = kind
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Toy().requires_grad_(False)
    if config:
        made.config = type("Config", (), config)()
    return made


def adapted(model: nn.Module, on: nn.Module | None = None, **arguments) -> AdapterNetwork:
    arguments = {"tlora_min_rank": "1", "target": "."} | arguments
    made = tlora.create_network(1.0, R, float(R), None, [], model, **arguments)
    made.apply_to([], model if on is None else on, False, True)
    return shake(made)


def saved(path, model=None, **arguments):
    """A file of a T-LoRA on `denoiser()`, or on a model."""
    made = adapted(denoiser() if model is None else model, **arguments)
    made.save_weights(str(path), None, {})
    made.restore()
    return path


def heard(made: AdapterNetwork) -> list[list[float]]:
    """What the network's clock is told from now on."""
    told: list[list[float]] = []
    original = made.clock.set

    def tell(timestep):
        if timestep is not None:
            told.append(timestep.tolist())
        original(timestep)

    made.clock.set = tell
    return told


# ------------------------------------------------------------------ conventions


TOLD = {  # what each class is told for t = 250
    **dict.fromkeys(("UNet2DConditionModel", "SD3Transformer2DModel", "WanTransformer3DModel"), 250.0),
    **dict.fromkeys(
        ("FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel"), 0.25
    ),
    **dict.fromkeys(("ZImageTransformer2DModel", "Lumina2Transformer2DModel"), 0.75),
    "MochiTransformer3DModel": 750.0,
}


@pytest.mark.parametrize("kind", TOLD)
def test_each_class_is_told_in_its_own_way(kind):
    model = denoiser(kind)
    made = adapted(model)
    told = heard(made)
    rule = CONVENTIONS[kind]
    clean, noise = ((t - rule.offset) / rule.scale for t in (0.0, 1000.0))
    for value in (TOLD[kind], clean, noise):
        with torch.no_grad():
            model(torch.randn(2, 3, 16), timestep=torch.tensor([value, value]))
    assert told == [[250.0, 250.0], [0.0, 0.0], [1000.0, 1000.0]]
    assert [int(gate.open_ranks(torch.tensor(t[:1]), R, 1)) for t in told[1:]] == [R, 1]


def test_an_unknown_class_is_refused_by_name(tmp_path):
    path = saved(tmp_path / "a.safetensors")
    with pytest.raises(Refused, match="timestep convention of MyTransformer is unknown"):
        TimestepRanks(denoiser("MyTransformer"), path)
    assert convention(denoiser("SanaTransformer2DModel", timestep_scale=0.001)).scale == pytest.approx(1000)


def test_rounding_of_the_pipeline_is_undone():
    rule, steps = CONVENTIONS["FluxTransformer2DModel"], torch.tensor([1000.0, 868.3174, 712.1, 292.0])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        told = steps.to(dtype) / 1000
        assert rule.timestep(told, steps).tolist() == [round(t, 3) for t in steps.double().tolist()]
    whole = torch.arange(0, 1001)
    assert torch.equal(rule.timestep(whole.float() / 1000), whole.double())  # fp32 alone needs no scheduler


def test_a_timestep_for_each_token_and_a_continuous_scheduler_are_refused(tmp_path):
    model = denoiser("WanTransformer3DModel")
    adapted(model)
    with pytest.raises(Refused, match="each token"):
        model(torch.randn(1, 3, 16), timestep=torch.zeros(1, 3))
    path = saved(tmp_path / "a.safetensors")

    class EDMEulerScheduler:
        config = {"num_train_timesteps": 1000}  # noqa: RUF012 - as diffusers has it

    pipe = type("Pipe", (), {"transformer": denoiser(), "scheduler": EDMEulerScheduler()})()
    with pytest.raises(Refused, match="does not count timesteps"):
        TimestepRanks(pipe, path)


# ------------------------------------------------------------------ what stays, and what does not


def test_a_positional_timestep_a_number_and_grad(tmp_path):
    model = denoiser()
    made, x = adapted(model), torch.randn(1, 3, 16)
    told = heard(made)
    model(x, None, torch.tensor(0.5)).sum().backward()  # the mask stays until a backward could recompute
    assert made.clock.timestep is not None
    with torch.no_grad():
        model(x, None, 0.5)
    assert told == [[500.0]] * 3 and made.clock.timestep is not None  # the third: back to what was before it
    with made.denoise_at(torch.tensor([0.0])):  # what a caller says goes before what the hook hears
        told_by_caller = model(x, None, 0.999)
    assert torch.equal(told_by_caller, model(x, None, 0.0))


def test_an_exception_leaves_no_mask_and_removal_no_trace(tmp_path):
    model, x, t = denoiser(), torch.randn(2, 3, 16), torch.tensor([0.9, 0.1])
    with torch.no_grad():
        before = model(x, timestep=t)
        with timestep_ranks(model, saved(tmp_path / "a.safetensors")) as ranks:
            clock = ranks.attached.networks[0].clock
            assert not torch.allclose(model(x, timestep=t), before, atol=1e-3)
            with pytest.raises(RuntimeError, match="inside the model"):
                model(x, encoder=1, timestep=t)
            assert clock.timestep is None and not clock.masks
            with torch.enable_grad():
                with pytest.raises(RuntimeError, match="inside the model"):
                    model(x, encoder=1, timestep=t)
                assert clock.timestep is None and not clock.masks
        assert torch.equal(model(x, timestep=t), before)
    assert not model._forward_pre_hooks and not model._forward_hooks and "forward" not in model.first.__dict__


def test_masked_is_not_unmasked(tmp_path):
    path, model, x = saved(tmp_path / "a.safetensors"), denoiser(), torch.randn(1, 3, 16)
    outputs = {}
    for least in (1, R):
        with timestep_ranks(model, path, {"max_rank": R, "min_rank": least, "alpha": 1.0}), torch.no_grad():
            outputs[least] = [model(x, timestep=torch.tensor([t])) for t in (0.0, 0.999)]
    assert torch.equal(outputs[1][0], outputs[R][0])
    assert (outputs[1][1] - outputs[R][1]).abs().max() > 1e-3


def test_simpletuners_configuration(tmp_path, caplog):
    path, model, x = saved(tmp_path / "a.safetensors"), denoiser(), torch.randn(1, 3, 16)
    t = torch.tensor([0.5])
    config = {"max_rank": R, "min_rank": 4, "alpha": 2.0}
    pipe = type("Pipe", (), {"transformer": model, "_tlora_config": config})()
    with torch.no_grad():
        with timestep_ranks(pipe, path):
            attribute = model(x, timestep=t)
        with timestep_ranks(model, path, config):
            assert torch.equal(model(x, timestep=t), attribute)
    assert "was trained with min_rank 1, alpha 1" in caplog.text
    with pytest.raises(Refused, match="max_rank 64 is not that of"):
        TimestepRanks(model, path, {"max_rank": 64})
    with pytest.raises(Refused, match="did you mean 'min_rank'"):
        TimestepRanks(model, path, {"minrank": 1})


def test_two_pipelines_in_two_threads(tmp_path):
    paths = [saved(tmp_path / f"{least}.safetensors", tlora_min_rank=str(least)) for least in (1, 6)]
    models, x = [denoiser(), denoiser()], torch.randn(1, 3, 16)
    times = [torch.tensor([t]) for t in (0.999, 0.7, 0.4, 0.1)] * 5
    alone = []
    for model, path in zip(models, paths, strict=True):
        with timestep_ranks(model, path), torch.no_grad():
            alone.append([model(x, timestep=t) for t in times])
    ranks = [TimestepRanks(model, path) for model, path in zip(models, paths, strict=True)]
    found: dict[int, list] = {}

    def work(index: int) -> None:
        with torch.no_grad():
            found[index] = [models[index](x, timestep=t) for t in times]

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(found[index], alone[index], strict=True))
        ranks[index].remove()


@pytest.mark.parametrize("order", ["compiled before", "compiled after", "in place"])
def test_compiled_without_a_graph_break(order, tmp_path):
    """On the wrapper one graph serves every step; in a model compiled in place the hook is part of it."""
    path, x = saved(tmp_path / "a.safetensors"), torch.randn(2, 3, 16)
    times = [torch.tensor([t, t]) for t in (0.999, 0.8, 0.5, 0.25, 0.001)]
    graphs = []

    def count(graph, _inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model = denoiser()
    with torch.no_grad():
        with timestep_ranks(model, path):
            want = [model(x, timestep=t) for t in times]
        wrapped = torch.compile(model, backend=count, fullgraph=True)
        ranks = TimestepRanks(wrapped if order == "compiled before" else model, path)
        if order == "in place":
            model.compile(backend=count, fullgraph=True)
            wrapped = model
        got = [wrapped(x, timestep=t) for _ in range(2) for t in times]
    assert all(torch.equal(a, b) for a, b in zip(got, want * 2, strict=True))
    assert len(graphs) <= (1 if order == "compiled before" else 2)
    ranks.remove()


def test_t_loras_mix_with_others(tmp_path):
    """Two T-LoRAs and a LoRA at once are the sum of what each adds to one layer; strength 0 is the base."""
    model = denoiser()
    paths = [saved(tmp_path / "a.safetensors"), saved(tmp_path / "b.safetensors", orthogonal="False")]
    from networks import lora

    plain = lora.create_network(1.0, 4, 4.0, None, [], model, target=".")
    plain.apply_to([], model, False, True)
    shake(plain).save_weights(str(tmp_path / "c.safetensors"), None, {})
    plain.restore()
    x, t = torch.randn(1, 3, 16), torch.tensor([0.6])
    adapters = [read_for_merge(path) for path in (*paths, tmp_path / "c.safetensors")]
    with torch.no_grad():
        before, host = model(x, timestep=t), model.first(x)

        def change(pick: list[int], weights: list[float]) -> torch.Tensor:
            attached = Mixture([adapters[i] for i in pick]).attach(model)
            attached.set(weights)
            for network in attached.networks:
                network.clock._set(torch.tensor([600.0]))
            found = model.first(x) - host
            attached.restore()
            return found

        parts = [change([i], [w]) for i, w in enumerate((0.5, -1.0, 2.0))]
        torch.testing.assert_close(change([0, 1, 2], [0.5, -1.0, 2.0]), sum(parts), rtol=1e-5, atol=1e-5)
        attached = Mixture(adapters).attach(model)
        attached.set([0.0, 0.0, 0.0])
        assert torch.equal(model(x, timestep=t), before)
        attached.restore()


# ------------------------------------------------------------------ stock pipelines

RANKS = {"sd": [2, 3, 5, 6, 7], "sdxl": [2, 3, 5, 6, 7], "flux": [1, 1, 3, 4, 6]}  # of R = 8, R_min = 1


@pytest.fixture
def stock(request, tiny_flux, tiny_sd, tiny_sdxl):
    """(family, its models) of a tiny model."""
    family, folder = {"sd": (SD15, tiny_sd), "sdxl": (SDXL, tiny_sdxl), "flux": (FLUX, tiny_flux)}[
        request.param
    ]
    return family, family.load(Source(str(folder), dtype=torch.float32))


@pytest.mark.parametrize("stock", ["sd", "sdxl", "flux"], indirect=True)
@pytest.mark.slow
def test_stock_pipelines_open_the_ranks_of_each_step(stock, tmp_path):
    """As by hand, bit for bit; with guidance and two images for each prompt."""
    family, models = stock
    path = saved(tmp_path / "a.safetensors", models.denoiser, target=None)
    said = family.encode_text(models, ["a cat", ""], family.options())
    text, negative = (stack_text([one]) for one in said)
    side = 8 * family.bucket_step(models)

    def draw() -> torch.Tensor:
        images = family.sample(
            models, text, family.options(), height=side, width=side, steps=STEPS,
            generator=torch.Generator().manual_seed(0), negative=negative, scale=3.0,
        )  # fmt: skip
        return torch.stack([torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8) for one in images])

    before = draw()
    ranks = TimestepRanks(models.denoiser, path)
    network = ranks.attached.networks[0]
    told = heard(network)
    with_hook = draw()
    steps = [t[0] for t in told]
    opened = [int(gate.open_ranks(torch.tensor([t]), R, 1)) for t in dict.fromkeys(steps)]
    assert len(opened) == STEPS and opened == RANKS[family.name]
    network.clock.detach()  # the same by hand: each call of the denoiser inside `denoise_at`
    original, index = models.denoiser.forward, iter(steps)

    def by_hand(*args, **kwargs):
        with network.denoise_at(torch.tensor([next(index)])):
            return original(*args, **kwargs)

    models.denoiser.forward = by_hand
    try:
        assert torch.equal(draw(), with_hook) and not torch.equal(with_hook, before)
    finally:
        del models.denoiser.forward
    ranks.remove()
    assert torch.equal(draw(), before)
    # as pictures while training have it: the network itself on its denoiser, on the same steps
    live = find_module("tlora").create_network_from_weights(1.0, str(path), None, [], models.denoiser)[0]
    live.apply_to([], models.denoiser, False, True)
    live.load_weights(str(path))
    told = heard(live)
    close = (draw().int() - with_hook.int()).abs().max() <= 1  # one adds Q and Q − Q₀, one their pairs
    assert close and [t[0] for t in told] == steps
    live.restore()
