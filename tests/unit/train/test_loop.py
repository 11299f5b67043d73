"""The loop's own pieces: randomness without state, means over a step, which components a loss has."""

from __future__ import annotations

import itertools
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from toys import base, network, probes

from lowrank.train.log import BIN_NAMES, Meter
from lowrank.train.loop import batch_generator, loss_components
from lowrank.train.preview import Preview
from lowrank.train.prompts import Prompt


def test_a_stream_depends_on_seed_epoch_and_position_and_on_nothing_else():
    places = list(itertools.product((0, 1), repeat=3))
    drawn, dropped = {}, {}
    for place in places:
        drawn[place] = torch.randn(4, generator=batch_generator(*place))
        dropped[place] = torch.rand(4)  # what dropout would see
        torch.rand(7)  # somebody else draws in between
    for table in (drawn, dropped):
        for a, b in itertools.combinations(places, 2):
            assert not torch.equal(table[a], table[b])
    for place in reversed(places):
        assert torch.equal(drawn[place], torch.randn(4, generator=batch_generator(*place)))
        assert torch.equal(dropped[place], torch.rand(4))


def test_a_meter_gives_means_over_micro_batches_and_timestep_bins():
    meter = Meter(("mse", "prior"), torch.device("cpu"))
    for mse, prior, losses, times in (
        (1.0, 0.0, [1.0, 3.0], [0.0, 260.0]),
        (3.0, 1.0, [5.0, 7.0], [249.9, 1000.0]),
    ):
        parts = {"mse": torch.tensor(mse), "prior": torch.tensor(prior)}
        meter.add(parts, torch.tensor(losses), torch.tensor(times))
    told = meter.read(Accelerator(cpu=True))
    assert (told["loss"], told["mse"], told["prior"]) == (2.5, 2.0, 0.5)
    assert [told[name] for name in BIN_NAMES] == [3.0, 3.0, None, 7.0]
    meter.add(
        {"mse": torch.tensor(1.0), "prior": torch.tensor(0.0)}, torch.tensor([1.0]), torch.tensor([0.0])
    )
    assert meter.read(Accelerator(cpu=True))["loss"] == 1.0  # reading resets


def test_a_penalty_is_a_component_of_the_loss(bases):
    made = network("penalty+rates", base("linear"), bases)
    assert loss_components(made) == ("mse", "prior", "pull")
    assert made.penalties()["pull"].item() == pytest.approx(
        0.5 * sum(p.square().sum().item() for p in made.parameters()), rel=1e-5
    )
    assert probes()["penalty+rates"].rates == {"up": 4.0}


def test_trackers_get_the_pictures(tmp_path, monkeypatch):
    """wandb's under kohya's names with their prompts, TensorBoard's stacked where they are of one size."""
    told: dict[str, list] = {"wandb": [], "tensorboard": []}
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(Image=lambda image, caption: (image.size, caption))
    )

    def add_images(tag, batch, step, dataformats):
        told["tensorboard"].append((tag, batch.shape, step))

    accelerator = Accelerator(cpu=True)
    accelerator.trackers = [
        SimpleNamespace(name="wandb", log=lambda values, step: told["wandb"].append((values, step))),
        SimpleNamespace(name="tensorboard", writer=SimpleNamespace(add_images=add_images)),
    ]
    prompts = [Prompt("a cat", width=8, height=8, seed=1), Prompt("a dog", width=16, height=8, seed=1)]
    preview = Preview(
        prompts=prompts,
        draw=lambda prompt, _: Image.new("RGB", (prompt.width, prompt.height)),
        folder=tmp_path,
        name="cat",
    )
    paths = preview.run(accelerator, torch.nn.Linear(1, 1), "e000000", 7)
    assert told["wandb"] == [({"sample_0": ((8, 8), "a cat"), "sample_1": ((16, 8), "a dog")}, 7)]
    assert sorted(told["tensorboard"]) == [("validation", (1, 8, n, 3), 7) for n in (8, 16)]
    assert [path.name[:14] for path in paths] == ["cat_e000000_00", "cat_e000000_01"]


def test_generators_of_python_and_numpy_are_functions_of_the_batch():
    """kohya's and LyCORIS' DyLoRA draw a rank with `random`; a resumed run must draw the same."""
    drawn = []
    for place in ((1, 0, 3), (1, 0, 4), (1, 0, 3)):
        batch_generator(*place)
        drawn.append((random.random(), float(np.random.rand())))
        random.random()  # a run that drew more
    assert drawn[0] == drawn[2] and drawn[0][0] != drawn[1][0] and drawn[0][1] != drawn[1][1]
