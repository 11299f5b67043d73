"""What runs on the tiny FLUX share: pictures, a command line, equality of two files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Three pictures of two shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, size in enumerate([(64, 64), (96, 64), (64, 64)]):
        Image.new("RGB", size, (80 * index, 120, 255 - 80 * index)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def arguments(tiny_flux, bases, pictures, tmp_path):
    """The command line of a run of 4 steps, as a function of its folder and further flags."""

    def line(out: str = "run", *more: str) -> list[str]:
        given = {
            "pretrained_model_name_or_path": tiny_flux,
            "instance_data_dir": pictures,
            "instance_prompt": "a cat in <s> style",
            "rank": 4,
            "resolution": 64,
            "max_train_steps": 4,
            "seed": 0,
            "learning_rate": 1e-2,
            "output_dir": tmp_path / out,
            "basis_cache_dir": bases,
            "max_data_loader_n_workers": 0,
        }
        if any(flag in more for flag in ("--network_module",)):
            del given["basis_cache_dir"]
        for flag in list(given):
            if f"--{flag}" in more:
                del given[flag]
        return [word for flag, value in given.items() for word in (f"--{flag}", str(value))] + list(more)

    return line


def same(a: Path, b: Path) -> bool:
    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
