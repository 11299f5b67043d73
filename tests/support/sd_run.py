"""What runs on the tiny SD 1.5, SD 2 and SDXL share: folders, a command line, what a run leaves."""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """kohya's layout: 2_cat with three pictures of two shapes and captions, reg/1_animal with two."""
    root = tmp_path_factory.mktemp("folders")
    (root / "train" / "2_cat").mkdir(parents=True)
    (root / "reg" / "1_animal").mkdir(parents=True)
    (root / "masks").mkdir()
    for index, size in enumerate([(64, 64), (96, 64), (64, 64)]):
        place = root / "train" / "2_cat" / f"{index}.png"
        Image.new("RGB", size, (80 * index, 120, 255 - 80 * index)).save(place)
        place.with_suffix(".caption").write_text(f"a cat, number {index}, sitting")
        mask = Image.new("RGB", size, (255, 255, 255))
        mask.paste((0, 0, 0), (0, 0, size[0] // 2, size[1]))
        mask.save(root / "masks" / f"{index}.png")
    for index in range(2):
        Image.new("RGB", (64, 64), (10, 200 * index, 90)).save(root / "reg" / "1_animal" / f"{index}.png")
    return root


@pytest.fixture
def arguments(tiny_sd, folders, tmp_path):
    """The command line of a run of 4 steps, as a function of its folder and further flags."""

    def line(out: str = "run", *more: str, model: Path = tiny_sd) -> list[str]:
        given = {
            "pretrained_model_name_or_path": model,
            "train_data_dir": folders / "train",
            "output_dir": tmp_path / out,
            "output_name": "cat",
            "resolution": 64,
            "network_module": "networks.lora",
            "network_dim": 4,
            "max_train_steps": 4,
            "learning_rate": 1e-2,
            "seed": 0,
            "max_data_loader_n_workers": 0,
        }
        words = [w for k, v in given.items() if f"--{k}" not in more for w in (f"--{k}", str(v))]
        return words + list(more)

    return line


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "loss.csv", newline="") as file:
        return list(csv.DictReader(file))


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def scalars(folder: Path) -> dict[str, list[float]]:
    (place,) = {file.parent for file in folder.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(place))
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@contextlib.contextmanager
def one_thread():
    """As many threads as the processes of a launch have: each number adds in its own order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
