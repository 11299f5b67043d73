"""The planned peak of a run against the live bytes of the same run, counted while it trains on the CPU."""

from __future__ import annotations

import pytest
import torch
from measured_run import measured, planned
from PIL import Image
from torch import nn

from lowrank.cli.flux_train import main as flux
from lowrank.cli.sd_train import main as sd
from lowrank.cli.sd_train import main_sdxl as sdxl
from lowrank.errors import Refused
from lowrank.plan.fake import without_values
from lowrank.plan.live import GIB, LiveMemory
from lowrank.tensors import has_values

# A plan leaves out what is no tensor of the model or of its step: logged losses, and the pictures in host
# memory. At this size they are up to 1 % of the peak, at full size nothing.
TOLERANCE = 0.03

HALF = ("--mixed_precision", "bf16", "--gradient_checkpointing")
SETTINGS = [
    (flux, "networks.lora", HALF),
    (flux, "networks.tlora", ("--gradient_accumulation_steps", "2")),
    (flux, "networks.lora", (*HALF, "--cpu_offload_checkpointing", "--text_encoder_storage", "nf4")),
    (flux, "networks.dora", ("--gradient_checkpointing", "--train_batch_size", "2")),
    (sd, "networks.lora", (*HALF, "--train_text_encoder")),
    (sdxl, "networks.lora", ()),
]


@pytest.fixture
def arguments(tiny_flux, tiny_sd, tiny_sdxl, tmp_path):
    """The command line of a run of two steps, as a function of the script and the network module."""
    pictures = tmp_path / "pictures" / "2_cat"
    pictures.mkdir(parents=True)
    for index in range(2):
        Image.new("RGB", (64, 64), (80 * index, 120, 9)).save(pictures / f"{index}.png")

    def line(main, module: str, *more: str) -> list[str]:
        model = {flux: tiny_flux, sd: tiny_sd, sdxl: tiny_sdxl}[main]
        given = {
            "pretrained_model_name_or_path": model,
            "train_data_dir": pictures.parent,
            "network_module": module,
            "network_dim": 4,
            "resolution": 64,
            "max_train_steps": 2,
            "seed": 0,
            "output_dir": tmp_path / "run",
            "max_data_loader_n_workers": 0,
        }
        return [word for flag, value in given.items() for word in (f"--{flag}", str(value))] + list(more)

    return line


# a run's noise schedule, 1000 numbers of three kinds and their int64 steps, which a tiny text encoder shows
SCHEDULE = 24_000


def compare(main, line, monkeypatch, phases) -> dict:
    plan, run = planned(main, line, monkeypatch), measured(main, line, monkeypatch)
    for phase in phases:
        margin = max(SCHEDULE, TOLERANCE * run[phase].peak)
        assert plan[phase].peak == pytest.approx(run[phase].peak, rel=0, abs=margin), phase
    return {"planned": plan["loading"].peak, "measured": run["loading"].peak}


@pytest.mark.slow
@pytest.mark.parametrize(("main", "module", "more"), SETTINGS)
def test_planned_peak_is_the_measured_peak(main, module, more, arguments, monkeypatch):
    line = arguments(main, module, *more)
    loading = compare(main, line, monkeypatch, ("text encoding", "training step"))
    reads = module == "networks.tlora"  # the plan has an upper bound of what computing singular vectors takes
    assert loading["planned"] >= (1 - TOLERANCE) * loading["measured"]
    assert reads or loading["planned"] <= (1 + TOLERANCE) * loading["measured"]


@pytest.mark.slow
def test_planned_peak_of_previews(arguments, monkeypatch):
    more = ("--validation_prompt", "a cat", "--sample_every_n_steps", "2")
    line = arguments(flux, "networks.lora", *more)
    compare(flux, line, monkeypatch, ("sampling preview", "training step"))


def test_out_of_memory_names_the_predicted_peak(arguments, monkeypatch):
    """In training and in previews: the peak that a plan for the CPU has."""

    def no_memory(*_args, **_more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    line = arguments(flux, "networks.lora", "--validation_prompt", "a cat", "--sample_at_first")
    peaks = {name: f"{phase.peak / GIB:.2f}" for name, phase in planned(flux, line, monkeypatch).items()}
    for place, doing, phase in (
        ("lowrank.train.run.train", "training", "training step"),
        ("lowrank.train.preview.Preview.run", "drawing pictures", "sampling preview"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, no_memory)
            words = f"out of memory while {doing}.*; the {phase} was predicted to need {peaks[phase]} GiB; "
            with pytest.raises(Refused, match=words):
                flux(line)


def test_dry_run_shows_the_peak_of_each_phase(arguments, capsys):
    assert flux([*arguments(flux, "networks.lora"), "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.strip() for line in lines if line.startswith("  ")]
    assert any(line.startswith("training step 0.01: weights of the denoiser 0.01, ") for line in shown)
    assert any(line.startswith("allowance: CUDA context 0.50, ") for line in shown)
    assert any(line.startswith("together 0.6") and "training step" in line for line in shown)


# ---------- counting


def test_storages_are_counted_while_they_live():
    live = LiveMemory()
    with live, live.phase("all"):
        with live.part("weights"):
            weight = torch.zeros(256, 4)
        view = weight.T
        with live.part("products"):
            product = weight @ view  # (256, 256)
        del product
        assert live.bytes == 4096
    (phase,) = live.phases
    assert phase.peak == 4096 + 262144 and phase.parts == (("products", 262144), ("weights", 4096))


def test_what_autograd_keeps_is_counted():
    layer, x = nn.Linear(64, 64), torch.zeros(1024, 64)
    live = LiveMemory()
    with live:
        y = layer(x).exp().exp()
        kept = live.bytes
        del y
    # the results of both exp and the transposed weight; the result of the layer is not needed
    assert kept == 2 * 1024 * 64 * 4 + 64 * 64 * 4


def test_tensors_in_host_memory_are_not_counted():
    live = LiveMemory()
    with live:
        weight = torch.zeros(1024)
        live.leave([weight])
        assert live.bytes == 0
        live.enter([weight], "weights")
        assert live.bytes == 4096
        live.leave([weight])
        del weight
    assert live.bytes == 0


# ---------- tensors without values


def test_unknown_values_are_read_as_one():
    with without_values(cuda_autocast=False):
        x = torch.rand(8)
        assert x.sum().item() == 1 and bool(torch.isfinite(x).all()) and not has_values(x)


def test_norms_are_wide_in_autocast_of_cuda():
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    for cuda, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        with without_values(cuda_autocast=cuda), torch.autocast("cpu", torch.bfloat16):
            assert nn.functional.layer_norm(x, (8,)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.functional.layer_norm(x, (8,)).dtype == torch.bfloat16


def test_modules_move_without_values():
    with without_values(cuda_autocast=False):
        layer = nn.Linear(2, 2).to(torch.bfloat16)
        assert layer.weight.dtype == torch.bfloat16 and isinstance(layer.weight, nn.Parameter)
