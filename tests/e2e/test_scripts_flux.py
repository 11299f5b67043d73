"""The scripts after training, on the tiny FLUX: residual, merge, and two processes in place of one."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy
import pytest
import torch
from flux_run import WEIGHTS, arguments, pictures  # noqa: F401 (fixtures)
from PIL import Image, ImageFont
from repository import ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from sd_run import one_thread

from lowrank.cli.flux_train import main as train
from lowrank.cli.merge import _check_sides, _names
from lowrank.cli.merge import main as merge
from lowrank.cli.residual import main as residual
from lowrank.errors import Refused
from lowrank.models.contact_sheet import _shortened, sheet
from lowrank.tensors import write_tensors

pytestmark = pytest.mark.slow  # whole runs


@pytest.fixture
def adapters(arguments, tmp_path):
    """A style and a content adapter of one base."""
    for seed, name in enumerate(("style", "content")):
        assert train(arguments(name, "--seed", str(seed), "--learning_rate", "0.05")) == 0
    return tmp_path / "style" / WEIGHTS, tmp_path / "content" / WEIGHTS


@pytest.fixture
def line(adapters, tiny_flux, tmp_path):
    """The command line of a 2×2 grid."""
    given = {
        "model_path": tiny_flux,
        "style_lora_path": adapters[0],
        "content_lora_path": adapters[1],
        "prompt": "a <c> dog in <s> style",
        "num_inference_steps": 2,
        "style_weights": "0.0,1.0",
        "content_weights": "0.0,1.0",
        "height": 64,
        "width": 64,
        "output_dir": tmp_path / "out",
    }
    return lambda *more: (
        [w for k, v in given.items() if f"--{k}" not in more for w in (f"--{k}", str(v))] + list(more)
    )


def pixels(path: Path):
    return numpy.asarray(Image.open(path))


def test_grid_sheet_and_merged_files(line, tiny_flux, tmp_path, capsys):
    assert merge(line("--save_merged", "--seed", "3")) == 0
    out = tmp_path / "out"
    names = {f"inference_s{a}_c{b}.png" for a in ("0.00", "1.00") for b in ("0.00", "1.00")}
    assert names | {"sheet.png"} <= {p.name for p in out.iterdir()}
    told = Image.open(out / "inference_s1.00_c0.00.png").text["parameters"]
    assert "a <c> dog in <s> style" in told and "Seed: 3" in told and "× 1," in told and "Size: 64x64" in told
    assert "share one basis" in capsys.readouterr().out
    cells = {name: pixels(out / name) for name in names}
    assert len({cell.tobytes() for cell in cells.values()}) == 4
    assert pixels(out / "sheet.png").shape[0] > 128

    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(tiny_flux, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    base = pipe(
        "a <c> dog in <s> style",
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=3.5,
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(3),
    ).images[0]
    assert numpy.array_equal(cells["inference_s0.00_c0.00.png"], numpy.asarray(base))  # α = β = 0 is the base

    merged = out / "merged_s1.00_c1.00.safetensors"
    keys = set(load_file(merged))
    saved = {key.rpartition(".lora.")[2] for key in keys if ".lora." in key}
    assert saved == {"q.weight", "base_r.weight", "delta_r.weight"}
    again = [
        "--style_lora_path",
        str(merged),
        "--content_lora_path",
        str(merged),
        "--style_weights",
        "1.0",
        "--content_weights",
        "0.0",
        "--output_dir",
        str(tmp_path / "again"),
        "--seed",
        "3",
    ]
    assert merge(line(*again)) == 0
    live = cells["inference_s1.00_c1.00.png"].astype(int)
    saved = pixels(tmp_path / "again" / "inference_s1.00_c0.00.png")
    assert numpy.abs(live - saved).max() <= 1


def test_reference_image_must_be_an_image(tmp_path):
    (tmp_path / "style.png").write_text("no picture")
    given = {"model_path": "m", "style_lora_path": "s", "content_lora_path": "c", "prompt": "p"}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    with pytest.raises(Refused, match=r"style\.png cannot be read .*give another --style_reference") as told:
        merge([*words, "--style_reference", str(tmp_path / "style.png"), "--output_dir", str(tmp_path / "o")])
    assert "--skip_bad_images" not in str(told.value)


def test_file_names_of_strengths_with_three_decimals(line, tmp_path):
    assert merge(line("--style_weights", "0.5,0.501", "--content_weights", "1.0")) == 0
    drawn = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"inference_s0.500_c1.000.png", "inference_s0.501_c1.000.png"} <= drawn
    with pytest.raises(Refused, match="listed twice"):
        merge(line("--style_weights", "0.5,0.50"))


def test_residual_belongs_to_its_adapters(line, tiny_flux, tmp_path, capsys):
    made = ["--model_path", str(tiny_flux), "--dtype", "fp32", "--output_dir"]
    assert residual([*made, str(tmp_path / "r4"), "--rank", "4"]) == 0
    assert residual([*made, str(tmp_path / "r8"), "--rank", "8"]) == 0
    path = tmp_path / "r4" / "flux_residual_weights.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata()["lowrank.rank"] == "4" and len(file.keys()) == 30
    assert merge(line("--residual_path", str(path), "--style_weights", "1.0")) == 0
    assert "fits: 30 layers present" in capsys.readouterr().out
    with pytest.raises(Refused, match="was made with"):
        merge(line("--residual_path", str(tmp_path / "r8" / "flux_residual_weights.safetensors")))


def test_merge_refuses_adapter_of_another_base(line, tmp_path):
    from tools.make_tiny_flux import make

    other = make(tmp_path / "other", seed=1)
    with pytest.raises(Refused, match="was made on tiny-flux"):
        merge(line("--model_path", str(other)))
    with pytest.raises(Refused, match="was made on tiny-flux"):
        merge(line("--model_path", str(other), "--save_merged", "--skip_images"))
    assert not list((tmp_path / "out").iterdir())


def test_merge_scales_the_text_encoder_adapter(arguments, line, tmp_path):
    more = ("--network_train_text_encoder_only", "--text_encoder_lr", "0.5")
    assert train(arguments("text", *more, "--learning_rate", "0.5")) == 0
    adapter = str(tmp_path / "text" / WEIGHTS)
    assert merge(line("--style_weights", "0.0", "--content_weights", "0.0")) == 0
    base = pixels(tmp_path / "out" / "inference_s0.00_c0.00.png")
    both = ("--style_lora_path", adapter, "--content_lora_path", adapter, "--content_weights", "0.0")
    assert merge(line(*both, "--style_weights", "1.0,0.0", "--output_dir", str(tmp_path / "spoken"))) == 0
    zero, one = (pixels(tmp_path / "spoken" / f"inference_s{s}_c0.00.png") for s in ("0.00", "1.00"))
    assert numpy.array_equal(zero, base)  # drawn after strength 1: nothing stays
    assert not numpy.array_equal(one, base)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--device", "foo"), "--device foo is not on this machine; give one of cpu"),
        (("--device", "meta"), "--device meta is not"),
        (("--device", "cuda:99"), "--device cuda:99 is not"),
        (("--model_path", "flux.safetensors"), "--model_path 'flux.safetensors' does not exist"),
        (("--residual_path", "absent"), "absent does not exist or is not a file; .*leave it out"),
        (("--residual_path", "."), "is not a file"),
        (("--output_dir", "/dev/null"), "--output_dir /dev/null cannot be written to"),
        (("--output_dir", "/dev/null/below"), "--output_dir"),
        (("--seed", str(2**63)), "--seed"),
        (("--num_images", "10001"), "--num_images 10001 is above 10000"),
        (("--style_weights", "0.5,1e308"), "--style_weights 1e[+]308 is above 1e[+]06"),
        (("--style_weights", "0.5,0.50"), "listed twice"),
        (("--style_weights", "-0.0,0"), "listed twice"),
        ((), "here/style does not exist"),
    ],
)
def test_merge_refuses_before_loading(flags, words, tmp_path):
    given = {
        "--model_path": "here/model",
        "--style_lora_path": "here/style",
        "--content_lora_path": "here/content",
        "--prompt": "a dog",
        "--output_dir": str(tmp_path / "out"),
    }
    given |= dict(zip(flags[::2], flags[1::2], strict=True))
    with pytest.raises(Refused, match=words) as told:
        merge([word for pair in given.items() for word in pair])
    assert "\n" not in str(told.value)


def test_long_path_is_refused(capsys):
    with pytest.raises(SystemExit):
        merge(["--style_lora_path", "x" * 5000])
    assert "has a name of over 255 bytes" in capsys.readouterr().err


def test_image_size_limits_of_model():
    _check_sides(Namespace(height=80, width=None), 16)
    with pytest.raises(Refused, match="--height 77 is not a multiple of 16"):
        _check_sides(Namespace(height=77, width=64), 16)


@pytest.mark.parametrize("value", ["nan", "0.5,inf", "-inf", "0.5,,1"])
def test_strengths_are_finite(value, capsys):
    with pytest.raises(SystemExit):
        merge([f"--content_weights={value}"])
    assert "give finite ones" in capsys.readouterr().err


def test_file_names_of_adjacent_float_strengths():
    names = _names(Namespace(style_weights=(0.0, 1e-17, 1.0, 1.0000000000000002), content_weights=(1e6,)))
    assert len(set(names.values())) == 4 and max(map(len, names.values())) < 60


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--device", "foo"), "--device foo is not on this machine"),
        (("--output_dir", "/dev/null"), "--output_dir /dev/null cannot be written to"),
        (("--model_path", "no/such/model"), "'no/such/model' is neither a folder nor a hub id"),
        (("--rank", "65000"), r"--rank 65000 exceeds the \d+ of transformer\..*; give \d+ or less"),
    ],
)
def test_residual_errors_name_their_flags(flags, words, tiny_flux, tmp_path):
    given = {"--model_path": str(tiny_flux), "--output_dir": str(tmp_path / "r"), "--rank": "4"}
    given |= dict(zip(flags[::2], flags[1::2], strict=True))
    with pytest.raises(Refused, match=words) as told:
        residual([word for pair in given.items() for word in pair])
    assert "--pretrained" not in str(told.value) and "--network" not in str(told.value)


def test_long_prompt_is_truncated_on_sheet():
    cells = {(0.0, 1.0): Image.new("RGB", (64, 64)), (1.0, 1.0): Image.new("RGB", (64, 64))}
    font = ImageFont.load_default(13)
    for text in ("a dog", "a dog\n" * 200_000, "W" * 2_000_000):
        cut = _shortened(text, font, 200)
        assert font.getlength(cut) <= 200 and "\n" not in cut
        assert cut == text or (cut.endswith("…") and font.getlength(cut[:-1] + "WW…") > 200)
    sheet(cells, "W" * 2_000_000)


def test_flux_two_processes_equal_doubled_accumulation(arguments, tmp_path):
    """Bit for bit, on two CPU processes under accelerate launch, as on N GPUs; also saving there.

    The mean of two processes' gradients and the sum of two halves are the same number, and with one thread
    each process adds in the same order.
    """
    # 6 batches: an epoch that two can share evenly
    twice = ("--dataset_repeats", "2", "--checkpointing_steps", "2")
    with one_thread():
        assert train(arguments("one", "--gradient_accumulation_steps", "2", *twice)) == 0
    # what `accelerate launch` runs for several GPUs
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch = [*run, str(ROOT / "flux_train_qrlora.py")]
    done = subprocess.run(
        [*launch, *arguments("two", *twice)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = load_file(tmp_path / "one" / WEIGHTS), load_file(tmp_path / "two" / WEIGHTS)
    assert two.keys() == one.keys() and all(torch.equal(two[key], one[key]) for key in one)
    saved = {p.name for p in (tmp_path / "two" / "checkpoint-2").iterdir()}
    assert saved >= {"random_states_0.pkl", "random_states_1.pkl"}


def test_written_files_have_default_permissions(tmp_path):
    """safetensors 0.8 makes its files for their owner alone; a program of another user draws with ours."""
    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {})
    (tmp_path / "b").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode
