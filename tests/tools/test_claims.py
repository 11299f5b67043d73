"""benchmarks/claims: intervals, verdicts, the table of docs/evidence.md, and a run on folders of pictures."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from repository import ROOT

from benchmarks.claims.forgetting import rise_at
from benchmarks.claims.run import CLAIMS, load_claim, main
from benchmarks.claims.stats import interval, verdict
from benchmarks.claims.table import PAGE, render, rewritten


def test_interval_of_five_values():
    """Mean 3, standard deviation √2.5, t = 2.776 for four degrees of freedom."""
    made = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert made["n"] == 5 and made["mean"] == 3
    assert made["half"] == pytest.approx(2.776 * 2.5**0.5 / 5**0.5, rel=1e-9)


@pytest.mark.parametrize(
    "mean, half, n, more_is_better, expected",
    [
        (-1.0, 0.5, 5, False, "supported here"),
        (1.0, 0.5, 5, False, "contradicted here"),
        (1.0, 0.5, 5, True, "supported here"),
        (0.4, 0.5, 5, True, "no difference measured"),
        (1.0, 0.5, 4, True, "not measured with enough seeds"),
        (1.0, None, 1, True, "not measured with enough seeds"),
    ],
)
def test_verdict(mean, half, n, more_is_better, expected):
    assert verdict({"mean": mean, "half": half, "n": n}, more_is_better) == expected


def test_rise_at_a_target_loss():
    path = [[1.0, 0.10], [0.8, 0.12], [0.4, 0.20]]
    assert rise_at(path, 0.6) == pytest.approx(0.12 + 0.5 * 0.08 - 0.10)
    assert rise_at(path, 0.9) == pytest.approx(0.01)
    assert rise_at(path, 0.3) is None


@pytest.mark.parametrize("name", CLAIMS)
def test_statements_name_arms_of_the_claim(name):
    claim = load_claim(name)
    arms = {f"{a.name} at {rate:g}" for a in claim.arms for rate in a.rates} if claim.every_rate else set()
    arms |= {arm.name for arm in claim.arms}
    assert claim.name == name
    for statement in claim.statements:
        assert {statement.arm, statement.against} <= arms


def test_table_of_the_page_is_current():
    page = PAGE.read_text(encoding="utf-8")
    assert page == rewritten(page, CLAIMS), "run python benchmarks/claims/run.py again"


def test_claims_without_results_are_not_measured(tmp_path):
    rows = render(CLAIMS, tmp_path).splitlines()[2:]
    assert rows and all("| not measured |" in row for row in rows)


def test_figures_and_commands_of_the_committed_results():
    for file in sorted((ROOT / "benchmarks/results/claims").glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if "statements" not in record:  # a run that is not finished
            continue
        assert record["command"].startswith("python benchmarks/claims/run.py") and record["model_hash"]
        assert (ROOT / "docs/images/claims" / f"{file.stem}.svg").is_file()
        for statement in record["statements"]:
            assert statement["difference"] is None or statement["difference"]["n"] >= 1


@pytest.mark.parametrize(
    "given, words",
    [
        (["mergin"], "did you mean 'merging'"),
        (["--scorer", "clip"], "photographs need --scorer clip or dino"),
        (["--subjects", "x"], "belong together"),
    ],
)
def test_refusals(given, words, capsys):
    assert main(given) == 1
    assert words in capsys.readouterr().err


def pictures(folder, names, rng):
    """Two pictures of one colour each in a folder for each name."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(2):
            colour = rng.integers(256, size=3)
            pixels = np.clip(colour + rng.normal(0, 9, (48, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def tiny_clip(tmp_path):
    """A CLIP with random weights, with the tokenizer of the shipped SDXL model."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    tokenizer = ROOT / "assets/demo/sdxl/tokenizer"
    size = len(json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**shape, "vocab_size": size + 8, "eos_token_id": 1, "bos_token_id": 0},
        vision_config={**shape, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    folder = tmp_path / "clip"
    CLIPModel(config).save_pretrained(folder)
    sides = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**sides).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.mark.slow
def test_run_on_folders_with_a_tiny_scorer(tiny_clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    subjects = pictures(tmp_path / "subjects", ("dog", "car"), rng)
    styles = pictures(tmp_path / "styles", ("mosaic", "neon"), rng)
    arguments = [
        *("--model", str(ROOT / "assets/demo/sdxl"), "--subjects", str(subjects), "--styles", str(styles)),
        *("--scorer", "clip", "--scorer_path", str(tiny_clip), "--resolution", "64", "--quick"),
        *("--steps", "1", "--seeds", "1", "--output_dir", str(tmp_path / "out")),
    ]
    assert main(["one_picture", "--arms", "^lora r4$", *arguments]) == 0, capsys.readouterr().err
    file = tmp_path / "out/claims/one_picture.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    assert set(record["arms"]) == {"lora r4"} and len(record["cells"]) == 4
    assert 0 <= record["arms"]["lora r4"]["content right"]["mean"] <= 1
    assert {s["verdict"] for s in record["statements"]} == {"not measured"}
    assert file.with_suffix(".svg").is_file()
    key = f"lora r4 | {record['rates']['lora r4']:g} | 0"
    record["cells"][key]["content right"] = 0.125  # finished cells are not measured again
    file.write_text(json.dumps(record), encoding="utf-8")
    assert main(["one_picture", "--arms", "^lora r4$", *arguments]) == 0
    again = json.loads(file.read_text(encoding="utf-8"))
    assert again["arms"]["lora r4"]["content right"]["mean"] == 0.125
    assert main(["merging", "--arms", "^qrlora r8$", *arguments]) == 0, capsys.readouterr().err
