"""The shipped models load by diffusers and transformers alone, draw what is asked, and can be taught."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from repository import ROOT

from lowrank.cli import flux_train
from lowrank.combine.mixture import read_mixture
from lowrank.formats.base_checkpoint import BaseCheckpoint
from lowrank.models.family import Source
from lowrank.models.sd import SD15
from lowrank.models.sdxl import SDXL
from tools import single_file
from tools.glyph_world import report, scorer
from tools.glyph_world.world import Scene, caption, seen_scenes

DEMO = ROOT / "assets/demo"
FAMILIES = sorted(path.parent.name for path in DEMO.glob("*/model_index.json"))


@pytest.fixture(scope="module")
def judge():
    return scorer.load(DEMO / "scorer")


@pytest.fixture(scope="module")
def pipes():
    from diffusers import DiffusionPipeline

    return {name: DiffusionPipeline.from_pretrained(DEMO / name, dtype=torch.float32) for name in FAMILIES}


def test_shipped_files():
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert "flux" in FAMILIES and (DEMO / "scorer/model.safetensors").is_file()
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}, weights
    configs = [json.loads(path.read_text()) for path in files if path.name == "config.json"]
    assert not [config for config in configs if config.get("_name_or_path")], "a path of the maker's machine"


@pytest.mark.parametrize("family", FAMILIES)
def test_model_card_figures_equal_measurement(family):
    card = (DEMO / family / "README.md").read_text(encoding="utf-8")
    shares = json.loads((DEMO / "metrics.json").read_text())[family]["shares"]
    for row in shares.values():
        for kind in ("content", "style", "background"):
            assert f"{row[kind]['share']:.3f}" in card
    assert "Noto Color Emoji" in card and "Open Font License" in card and "## Limits" in card
    for name, value in report.CALL[family].items():
        assert f"{name}={value!r}" in card


# diffusers' Euler scheduler hands numpy a torch tensor in a way that numpy 2 deprecates
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_shipped_model_draws_prompts(family, pipes, judge):
    scenes = [seen_scenes()[i] for i in range(0, len(seen_scenes()), 140)]
    drawn = report.pictures(pipes[family], [caption(s) for s in scenes], 0, report.CALL[family])
    right = scorer.score(judge, drawn, scenes)
    assert right["content"].mean() >= 0.6 and right["style"].mean() >= 0.8, right


def test_scorer_on_training_pictures(judge):
    files = [ROOT / "assets/sty/cat/sty_cat.png", ROOT / "assets/cnt/dog/cnt_dog.png"]
    pictures = np.stack([np.asarray(Image.open(file)) for file in files])
    scenes = [Scene("cat", "stained glass", "beach"), Scene("poodle", "photo", "meadow")]
    assert all(values.all() for values in scorer.score(judge, pictures, scenes).values())


@pytest.mark.slow
def test_content_is_learned_from_one_picture(tmp_path, pipes, judge):
    """The demo in small: before, the words draw a dog; after a few seconds they draw the poodle."""
    prompts = [f"a photo of a <c> dog on a {place} background" for place in ("red", "blue", "yellow", "gray")]
    scenes = [Scene("poodle", "photo", place) for place in ("red", "blue", "yellow", "gray")]
    flux_train.main(
        [
            *("--pretrained_model_name_or_path", str(DEMO / "flux"), "--output_dir", str(tmp_path)),
            *("--instance_data_dir", str(ROOT / "assets/cnt/dog"), "--resolution", "64"),
            *("--instance_prompt", "a photo of a <c> dog", "--network_module", "networks.lora"),
            *("--network_dim", "16", "--network_alpha", "16", "--learning_rate", "3e-3", "--seed", "0"),
            *("--max_train_steps", "60", "--train_batch_size", "4", "--network_train_unet_only"),
            *("--mixed_precision", "no", "--guidance_scale", "1", "--discrete_flow_shift", "1.0"),
            *("--log_with", "none"),
        ]
    )
    pipe = pipes["flux"]
    before = report.pictures(pipe, prompts, 0, report.CALL["flux"])
    attached = read_mixture([tmp_path / "pytorch_lora_weights.safetensors"]).attach(pipe.transformer)
    attached.set([1.0])
    after = report.pictures(pipe, prompts, 0, report.CALL["flux"])
    attached.restore()
    assert not scorer.score(judge, before, scenes)["content"].any()
    assert scorer.score(judge, after, scenes)["content"].mean() >= 0.75


def test_single_file_of_damaged_model(tmp_path):
    source, full, target = tmp_path / "model", tmp_path / "full", tmp_path / "new"
    shutil.copytree(DEMO / "sd15", source)
    full.mkdir()
    (full / "work.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for place, said in ((source, "would be replaced"), (full, "would be replaced"), (source / "x", "inside")):
        with pytest.raises(SystemExit, match=said):
            single_file.main([str(source), str(place)])
    assert sorted(tmp_path.rglob("*")) == before
    (weights,) = (source / "unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(SystemExit, match=r"error: the model in .* cannot be read"):
        single_file.main([str(source), str(target)])
    assert not target.exists()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name.startswith("sd")])
def test_shipped_folder_equals_single_file(family, tmp_path):
    single_file.main([str(DEMO / family), str(tmp_path / "one")])
    load = {"sd15": SD15, "sdxl": SDXL}[family].load
    folder = load(Source(str(DEMO / family), dtype=torch.float32))
    file = load(
        Source(
            str(tmp_path / "one" / "model.safetensors"),
            dtype=torch.float32,
            tokenizer_cache_dir=str(tmp_path / "one" / "tokenizers"),
        )
    )
    for one, other in zip(
        (folder.denoiser, folder.vae, *folder.text_encoders),
        (file.denoiser, file.vae, *file.text_encoders),
        strict=True,
    ):
        ours, theirs = one.state_dict(), other.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (
        BaseCheckpoint(DEMO / family),
        BaseCheckpoint(tmp_path / "one" / "model.safetensors"),
    )  # as merging finds them
    layers = [place for place in ours.places() if place.part == "unet" and len(ours.shape(place)) > 1]
    assert layers and all(torch.equal(ours.weight(one), theirs.weight(one)) for one in layers)
    for part in ("denoiser", "vae"):
        ours, theirs = (dict(getattr(models, part).config) for models in (folder, file))
        for key in ("attention_head_dim", "norm_num_groups", "scaling_factor"):
            assert ours.get(key) == theirs.get(key), (part, key)
