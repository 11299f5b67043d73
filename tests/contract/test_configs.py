"""Every file in configs/ is what its first lines say: it parses, its data sets exist, its method is built."""

from __future__ import annotations

import json

import pytest
import torch
from repository import ROOT

from lowrank.cli.resolve import with_network
from lowrank.config.flag import pairs
from lowrank.config.flux import FLUX_TRAIN
from lowrank.config.sd import SD_TRAIN, SDXL_TRAIN
from lowrank.data.dataset_config import from_config
from lowrank.data.scan import scan
from lowrank.objective.diffusion import Diffusion
from lowrank.train.network_module import facade_of, find_module
from lowrank.train.optim import chosen

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_header_comment(path):
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"configs/{path.name}" in head and "Result:" in head


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.name.startswith("flux_")], ids=lambda p: p.stem)
def test_flux_config_parses(path, monkeypatch):
    monkeypatch.chdir(path.parent.parent)
    more = ["--train_data_dir", "assets"] if "kohya" in path.name else []
    parsed = with_network(FLUX_TRAIN.parse(["--config_file", str(path), *more]), "networks.delta_r_triu")
    assert parsed.notes == ()
    assert facade_of(find_module(parsed.value("network_module"))) is not None
    chosen(parsed.options.optimizer)


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.name.startswith("sd")], ids=lambda p: p.stem)
def test_sd_config_parses(path):
    surface = SDXL_TRAIN if path.name.startswith("sdxl") else SD_TRAIN
    argv = ["--config_file", str(path), "--train_data_dir", "assets"]
    parsed = with_network(surface.parse(argv), "networks.lora")
    assert parsed.notes == ()
    assert facade_of(find_module(parsed.value("network_module"))) is not None
    Diffusion(**vars(parsed.options.objective))


def test_sdxl_tlora_trains_the_layers_of_the_paper():
    """560 linear layers, as the paper counts them, of the real U-Net's sizes, with weight decay 1e-4."""
    from diffusers import UNet2DConditionModel  # pyright: ignore

    parsed = SDXL_TRAIN.parse(
        ["--config_file", str(ROOT / "configs" / "sdxl_tlora.toml"), "--train_data_dir", "x"]
    )
    arguments = pairs("--network_args", parsed.options.network.network_args)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(
            json.loads((ROOT / "configs/models/sdxl.json").read_text(encoding="utf-8"))["unet"]
        )
    network = find_module("networks.tlora").create_network(1.0, 64, None, None, [], unet, **arguments)
    assert len(network.layers()) == 560 and all(not layer.conv for layer in network.layers())
    assert chosen(parsed.options.optimizer).arguments == {"weight_decay": 1e-4}


def test_dataset_config_is_scanned(monkeypatch):
    monkeypatch.chdir(ROOT)
    (dataset,) = from_config("configs/dataset.toml")
    assert [example.repeats for example in scan(dataset)] == [3, 1]
