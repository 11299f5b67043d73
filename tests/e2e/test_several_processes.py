"""Runs of several processes: equal to one process, sharded, resumed with another number, ended by a death."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from flux_run import same
from processes import finished, launch_several, start_several
from repository import ROOT
from safetensors.torch import load_file
from sd_run import arguments, folders, one_thread  # noqa: F401 (fixtures)

from lowrank.cli.sd_train import main as sd

pytestmark = pytest.mark.slow  # whole runs
SCRIPT = "train_network_ABM.py"


def launched(config: str, monkeypatch) -> dict[str, str]:
    """The variables that `accelerate launch --config_file CONFIG` sets, from accelerate itself."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = ["--config_file", str(ROOT / "configs" / "accelerate" / config), SCRIPT]
    given, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert given.num_processes == 2
    changed = {
        key: value for key, value in prepare_multi_gpu_env(given).items() if os.environ.get(key) != value
    }
    return changed | {"OMP_NUM_THREADS": "1"}


def losses(folder: Path) -> list[float]:
    with open(folder / "loss.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_two_processes_equal_doubled_accumulation(arguments, tmp_path, monkeypatch):
    """Bit for bit, with AdamW, which makes whole steps of a gradient that is rounding noise.

    One process also continues what two began, with the same bits.
    """
    more = ("--lr_scheduler", "linear", "--lr_warmup_steps", "2", "--save_state", "--save_every_n_steps", "1")
    line = arguments("two", *more, "--gradient_accumulation_steps", "1")
    launch_several(SCRIPT, line, tmp_path, launched("ddp.yaml", monkeypatch))
    more = (*more, "--gradient_accumulation_steps", "2")
    with one_thread():
        assert sd(arguments("one", *more)) == 0
        state = tmp_path / "two" / "cat-step00000003-state"
        assert sd(arguments("continued", *more, "--resume", str(state))) == 0
    for folder in ("two", "continued"):
        assert same(tmp_path / folder / "cat.safetensors", tmp_path / "one" / "cat.safetensors")
    ups = [
        v
        for key, v in load_file(tmp_path / "two" / "cat.safetensors").items()
        if "unet" in key and "up" in key
    ]
    assert max(up.abs().max().item() for up in ups) > 1e-5


def test_four_processes_equal_fourfold_accumulation(arguments, tmp_path):
    """One step, because an epoch here is no multiple of four batches; gloo adds gradients in any order."""
    more = ("--optimizer_type", "SGD", "--learning_rate", "1", "--max_train_steps", "1")
    launch_several(SCRIPT, arguments("four", *more), tmp_path, count=4)
    with one_thread():
        assert sd(arguments("one", *more, "--gradient_accumulation_steps", "4")) == 0
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    compare_ups(tmp_path / "four", tmp_path / "one", least=0)


def compare_ups(several: Path, alone: Path, least: float) -> None:
    many, one = (load_file(folder / "cat.safetensors") for folder in (several, alone))
    ups = [key for key in one if "lora_up" in key]
    difference = torch.stack([(many[key] - one[key]).square().sum() for key in ups]).sum().sqrt()
    assert least <= difference < 1e-3 * torch.stack([one[key].square().sum() for key in ups]).sum().sqrt()


def test_fsdp2_equals_one_process(arguments, tmp_path, monkeypatch):
    """With checkpointing, a preview and a validation, in which every process has to take part.

    The gathered weights are at other addresses than the whole model's, and oneDNN chooses its kernel by
    alignment, so that sums differ in their last bits: 1e-5 of a loss, measured 3e-5 of the ups after SGD.
    """
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 1 --l 1")
    more = ("--optimizer_type", "SGD", "--learning_rate", "1", "--max_train_steps", "2", "--sample_prompts")
    more += (
        str(prompts),
        "--sample_every_n_steps",
        "2",
        "--validation_split",
        "0.4",
        "--gradient_checkpointing",
    )
    more += ("--validate_every_n_steps", "2")
    environment = launched("fsdp2.yaml", monkeypatch)
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    launch_several(SCRIPT, arguments("two", *more), tmp_path, environment)
    assert "validation loss after step 2" in (tmp_path / "process-0.log").read_text()
    assert len(list((tmp_path / "two" / "sample").glob("*.png"))) == 1
    with one_thread():
        assert sd(arguments("one", *more, "--gradient_accumulation_steps", "2")) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    compare_ups(tmp_path / "two", tmp_path / "one", least=1e-12)


def test_other_process_ends_when_one_dies(arguments, tmp_path):
    line = arguments("run", "--max_train_steps", "100000", "--network_train_unet_only")
    pair = start_several(SCRIPT, line, tmp_path)
    rows, deadline = tmp_path / "run" / "loss.csv", time.monotonic() + 120
    while not (rows.is_file() and len(rows.read_text().splitlines()) > 2):
        assert all(process.is_alive() for process in pair) and time.monotonic() < deadline
        time.sleep(0.05)
    pair[1].kill()
    killed = time.monotonic()
    assert finished(pair[0], 60) == 1
    assert time.monotonic() - killed < 30
    log = (tmp_path / "process-0.log").read_text()
    assert log.count("error: process 1 of this run has ended") == 1 and "Traceback" not in log


def test_accelerate_launch_on_cpu_starts_two(arguments, tmp_path):
    """accelerate itself starts one process on the CPU, whatever --num_processes is."""
    line = arguments("run", "--dry_run")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / SCRIPT), *line], capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stdout
