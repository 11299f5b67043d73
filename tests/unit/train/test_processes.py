"""How a run of several processes is configured, and how it resumes from another number of processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from lowrank.cli import launching
from lowrank.config.sd import SD_TRAIN
from lowrank.errors import Refused
from lowrank.train import checkpoints
from lowrank.train.checkpoints import Checkpoint, as_resumed
from lowrank.train.processes import Sharding, launched_sharding

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2"}


def options(*words: str):
    line = ("--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--output_dir", "o")
    return SD_TRAIN.parse([*line, *words]).options


@pytest.mark.parametrize(
    ("environment", "words", "sentence"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, (), "DeepSpeed is not supported.*configs/accelerate/ddp.yaml"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, (), "Megatron-LM is not supported.*fsdp2.yaml"),
        (SHARDED | {"FSDP_VERSION": "1"}, (), "FSDP version 1 is not supported; set fsdp_version: 2"),
        (SHARDED, ("--fp8_base", "--mixed_precision", "bf16"), "--fp8_base does not work with FSDP"),
        (SHARDED, ("--abm_enabled",), "--abm_enabled does not work with FSDP.*ddp.yaml"),
    ],
)
def test_launcher_refused(environment, words, sentence):
    with pytest.raises(Refused, match=sentence):
        launched_sharding(options(*words), environment)


def test_launched_sharding():
    assert launched_sharding(options(), {}) is None
    assert launched_sharding(options(), SHARDED | {"WORLD_SIZE": "1"}) is None
    assert launched_sharding(options(), SHARDED) == Sharding(reshard=True, offload=False)
    kept = SHARDED | {"FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_OFFLOAD_PARAMS": "true"}
    assert launched_sharding(options(), kept) == Sharding(reshard=False, offload=True)


@pytest.mark.parametrize(
    ("command", "count"),
    [
        ("python /bin/accelerate launch --cpu --num_processes 3 train.py --seed 0", 3),
        ("python -m accelerate.commands.launch --num_processes=2 --cpu train.py", 2),
        ("/bin/accelerate-launch --cpu --num_processes 4 train.py", 4),
        ("bash run.sh", None),
    ],
)
def test_number_of_processes_in_a_command(command, count):
    assert launching._count(command.split()) == count


def test_missing_processes_are_started(monkeypatch):
    calls = []
    monkeypatch.setattr(launching.os, "execv", lambda *call: calls.append(call))
    monkeypatch.setattr(
        launching, "_command_of_parent", lambda: ["accelerate", "launch", "--num_processes", "2", "t.py"]
    )
    monkeypatch.setattr(launching.sys, "argv", ["t.py", "--seed", "0"])
    for name in ("MASTER_PORT", *launching._COUNTS):
        monkeypatch.delenv(name, raising=False)
    launching.start_missing_processes()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    launching.start_missing_processes()  # one process: no port is named
    assert calls == []
    monkeypatch.setenv("MASTER_PORT", "29500")
    launching.start_missing_processes()
    ((_, command),) = calls
    assert command[-4:] == ["--nproc_per_node=2", "t.py", "--seed", "0"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    launching.start_missing_processes()  # one of torchrun's
    assert len(calls) == 1
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(launching, "_command_of_parent", lambda: ["bash"])
    with pytest.raises(Refused, match="torchrun --nproc_per_node N"):
        launching.start_missing_processes()


def test_fingerprint_of_another_number_of_processes():
    run = {"processes": 1, "batches_per_epoch": 7, "gradient_accumulation_steps": 2, "seed": 3}
    loader = SimpleNamespace(shard=lambda rank, world: range(-(-7 // world)))
    old = {"processes": 2, "batches_per_epoch": 4, "gradient_accumulation_steps": 1, "seed": 3}
    checkpoint = Checkpoint(Path("c"), old, 1, 0, 1)
    assert as_resumed(run, checkpoint, loader) == old
    equal = Checkpoint(Path("c"), old | {"processes": 1}, 1, 0, 1)
    assert as_resumed(run, equal, loader) is run


def test_schedule_counts_the_new_processes():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    schedule.last_epoch = 6  # three steps of two processes
    checkpoints._count_again(SimpleNamespace(_schedulers=[SimpleNamespace(scheduler=schedule)]), 2, 3)
    assert schedule.last_epoch == 9
    recursive = SimpleNamespace(scheduler=CosineAnnealingLR(optimizer, 10))
    with pytest.raises(Refused, match="CosineAnnealingLR cannot continue with 3 processes after 2"):
        checkpoints._count_again(SimpleNamespace(_schedulers=[recursive]), 2, 3)
