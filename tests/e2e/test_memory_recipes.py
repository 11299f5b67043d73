"""The recipes for FLUX.1-dev by memory: `--dry_run` predicts the figure in their headers, and it fits."""

from __future__ import annotations

import re

import pytest
from repository import ROOT

from lowrank.cli.flux_train import main
from lowrank.models.family import Source
from lowrank.models.flux import FLUX

RECIPES = {24: 22.5, 16: 15.0, 12: 11.0, 8: 7.5}  # GB of the card: most GiB that the recipe may take


@pytest.mark.slow
@pytest.mark.parametrize("card", RECIPES)
def test_dry_run_of_a_recipe_predicts_its_header(card, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    recipe = ROOT / "configs" / f"flux_dev_{card}gb.toml"
    assert main(["--config_file", str(recipe), "--dry_run", "--output_dir", str(tmp_path / "run")]) == 0
    predicted = re.search(r"^  together ([\d.]+) in the phase", capsys.readouterr().out, re.M)
    header = re.search(r"^# Memory: ([\d.]+) GiB predicted", recipe.read_text(encoding="utf-8"), re.M)
    assert predicted and header
    # other versions of torch and diffusers keep other tensors for a moment
    assert float(predicted[1]) == pytest.approx(float(header[1]), rel=0.02)
    assert float(predicted[1]) <= RECIPES[card]
    assert not (tmp_path / "run").exists()


def test_hub_model_without_weights_needs_no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    models = FLUX.load(Source("black-forest-labs/FLUX.1-dev", weights=False), ())
    encoders = [encoder for encoder, _ in FLUX.empty_text(models)]
    sizes = [sum(p.numel() for p in part.parameters()) for part in (FLUX.empty(models), *encoders)]
    assert sizes == [11_901_408_320, 123_060_480, 4_762_310_656]  # transformer, CLIP-L, T5-XXL
