"""tools/same_numbers.py on fabricated results: which differences it reports, which results it reuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tools import run_recipes, same_numbers
from tools.compare_runs import compare
from tools.recipes import SCRIPTS, Recipe, every, select

NAME = "sd15/lora"
RECIPES = {NAME: Recipe(NAME, "train_network_ABM.py", ("--seed", "7"))}
TENSORS = {"a.down": torch.arange(4.0).reshape(2, 2), "a.up": torch.ones(2, 2), "a.alpha": torch.tensor(1.0)}
METADATA = {"ss_network_dim": "2", "ss_session_id": "1", "modelspec.date": "2026-01-01"}
LOSSES = "step,loss,t0-250\n1,0.2070179879665374,\n2,0.2748683989048004,0.5\n"


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    save_file(tensors, folder / "adapter.safetensors", METADATA | metadata)


@pytest.fixture
def results(tmp_path):
    """Two equal result folders, which differ only in times, a random name and the printed text."""
    for index, tree in enumerate(("old", "new")):
        folder = tmp_path / tree / NAME
        folder.mkdir(parents=True)
        (folder / "loss.csv").write_text(LOSSES)
        (folder / "run.json").write_text(json.dumps({"code": 0, "seconds": 1.0 + index, "key": "k"}))
        (folder / "output.txt").write_text(f"{index} seconds")
        (folder / "config.toml").write_text('[network]\nrank = 2\n[train]\nname = "a"\n')
        (folder / "bits.bin").write_bytes(bytes([index]))
        (folder / "report.json").write_text('{"rank": {"a": [1, NaN]}}')
        Image.fromarray(numpy.full((2, 2, 3), 9, numpy.uint8)).save(folder / "0.png")
        write_tensors(folder, TENSORS, ss_session_id=str(index))
    return tmp_path / "old", tmp_path / "new"


def differences(results: tuple[Path, Path]) -> list[tuple[str, str, float | None]]:
    return [(row.file, row.where, row.largest) for row in compare(results[0] / NAME, results[1] / NAME)]


def test_equal_results(results, capsys):
    assert differences(results) == []
    assert same_numbers.report(RECIPES, *results, allow=[]) == 0
    assert "1 recipes: 1 equal, 0 differ, 0 differ as allowed" in capsys.readouterr().out


def test_loss_difference_of_a_millionth(results, capsys):
    changed = LOSSES.replace("0.2748683989048004", "0.2748693989048004")
    (results[1] / NAME / "loss.csv").write_text(changed)
    ((file, where, largest),) = differences(results)
    assert (file, where) == ("loss.csv", "step 2, loss")
    assert largest == pytest.approx(1e-6)
    assert same_numbers.report(RECIPES, *results, allow=[]) == 1
    assert "0 equal, 1 differ, 0 differ as allowed" in capsys.readouterr().out


def test_allowed_recipe(results, capsys):
    (results[1] / NAME / "loss.csv").write_text(LOSSES.replace("0.5", "0.6"))
    assert same_numbers.report(RECIPES, *results, allow=["flux/*"]) == 1
    assert same_numbers.report(RECIPES, *results, allow=["sd15/*"]) == 0
    assert "step 2, t0-250" in capsys.readouterr().out


def test_missing_step(results):
    (results[1] / NAME / "loss.csv").write_text(LOSSES.rsplit("2,", 1)[0])
    assert differences(results) == [("loss.csv", "2 steps, then 1", None)]


def test_missing_tensor(results):
    write_tensors(results[1] / NAME, {name: TENSORS[name] for name in ("a.down", "a.alpha")})
    assert differences(results) == [("adapter.safetensors", "1 tensors in one file only: a.up", None)]


def test_tensor_difference_of_last_bit(results):
    up = TENSORS["a.up"].clone()
    up[1, 1] = torch.nextafter(up[1, 1], torch.tensor(2.0))
    write_tensors(results[1] / NAME, TENSORS | {"a.up": up})
    ((file, where, largest),) = differences(results)
    assert (file, where, largest) == ("adapter.safetensors", "a.up", 2.0**-23)


def test_tensor_of_another_type(results):
    write_tensors(results[1] / NAME, TENSORS | {"a.alpha": torch.tensor(1.0, dtype=torch.float16)})
    ((_, where, largest),) = differences(results)
    assert where == "a.alpha: torch.float32 [], then torch.float16 []"
    assert largest is None


def test_metadata_option_json_and_pixel(results):
    folder = results[1] / NAME
    write_tensors(folder, TENSORS, ss_network_dim="4")
    (folder / "config.toml").write_text('[other]\nrank = 3\n[train]\nname = "a"\n')
    (folder / "report.json").write_text('{"rank": {"a": [2, NaN]}}')
    Image.fromarray(numpy.full((2, 2, 3), 7, numpy.uint8)).save(folder / "0.png")
    assert differences(results) == [
        ("0.png", "pixels", 2.0),
        ("adapter.safetensors", "metadata ss_network_dim", None),
        ("config.toml", "rank", 1.0),
        ("report.json", "rank a [0]", 1.0),
    ]


def test_differences_of_one_file_are_one_row(results):
    for index, tree in enumerate(results):
        (tree / NAME / "report.json").write_text(json.dumps({str(key): index * key for key in range(9)}))
    assert differences(results) == [("report.json", "1, and 7 more", 8.0)]


def test_rounding_of_reports(results):
    for tree, share in zip(results, (0.5, 0.5 + 1e-12), strict=True):
        (tree / NAME / "report.json").write_text(json.dumps({"shared": share}))
        write_tensors(tree / NAME, TENSORS, **{"lowrank.means": json.dumps({"shared": share})})
    assert differences(results) == []
    (results[1] / NAME / "report.json").write_text(json.dumps({"shared": 0.5 + 1e-9}))
    write_tensors(results[1] / NAME, TENSORS, **{"lowrank.means": json.dumps({"shared": 0.5 + 1e-9})})
    ((first, _, _), (second, where, size)) = differences(results)
    assert (first, second, where) == ("adapter.safetensors", "report.json", "shared")
    assert size == pytest.approx(1e-9, rel=1e-3)


def test_text_that_begins_like_json(results):
    for tree, text in zip(results, ("[a", "[b"), strict=True):
        (tree / NAME / "report.json").write_text(json.dumps({"text": text, "prompt": "[c"}))
    assert differences(results) == [("report.json", "text", None)]


def test_option_in_another_table_is_equal(results):
    (results[1] / NAME / "config.toml").write_text('[train]\nrank = 2\nname = "a"\n')
    assert differences(results) == []


def test_file_of_one_tree_only(results):
    (results[0] / NAME / "report.json").unlink()
    assert differences(results) == [("report.json", "only in the new tree", None)]


@pytest.mark.parametrize("code, refused", [(1, False), (0, True), (run_recipes.FAILED, True)])
def test_unexpected_exit_code_of_both_trees(results, capsys, code, refused):
    for tree in results:
        (tree / NAME / "run.json").write_text(json.dumps({"code": code, "key": "k"}))
    recipes = {NAME: replace(RECIPES[NAME], refused=refused)}
    assert same_numbers.report(recipes, *results, allow=[]) == 1
    assert f"exit code {code}, see output.txt" in capsys.readouterr().out


def test_recipe_that_was_not_run(results):
    shutil.rmtree(results[1] / NAME)
    assert same_numbers.report(RECIPES, *results, allow=[]) == 1


def test_cache_key_depends_on_command_line(tmp_path):
    first = Recipe("a", "x.py", ("--seed", "1"))
    second = Recipe("b", "x.py", ("a/adapter.safetensors",), needs=("a",))
    third = Recipe("c", "x.py", ())
    recipes = {recipe.name: recipe for recipe in (first, second, third)}
    keys = run_recipes.recipe_keys(recipes, "inputs")
    for name, key in keys.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"code": 0, "key": key}))
    assert run_recipes.missing(recipes, tmp_path, keys) == {}
    changed = recipes | {"a": replace(first, words=("--seed", "2"))}
    keys = run_recipes.recipe_keys(changed, "inputs")
    assert list(run_recipes.missing(changed, tmp_path, keys)) == ["a", "b"]
    keys = run_recipes.recipe_keys(recipes, "other inputs")
    assert list(run_recipes.missing(recipes, tmp_path, keys)) == ["a", "b", "c"]


def test_inputs_key_depends_on_assets(tmp_path):
    (tmp_path / "assets/sty").mkdir(parents=True)
    (tmp_path / "assets/sty/a.png").write_bytes(b"1")
    before = run_recipes.inputs_key(tmp_path)
    (tmp_path / "assets/figure.png").write_bytes(b"1")  # no recipe reads it
    assert run_recipes.inputs_key(tmp_path) == before
    (tmp_path / "assets/sty/a.png").write_bytes(b"2")
    assert run_recipes.inputs_key(tmp_path) != before


def test_recipe_order():
    recipes = every()
    order = list(recipes)
    assert all(order.index(needed) < order.index(name) for name in order for needed in recipes[name].needs)
    assert list(select(["flux/lora-imported"])) == ["flux/lora", "flux/lora-kohya", "flux/lora-imported"]


@pytest.mark.parametrize("family", SCRIPTS)
def test_every_network_has_a_recipe(family):
    methods = [path.stem for path in (same_numbers.ROOT / "networks").glob("[!_]*.py")]
    assert len(methods) >= 14
    methods = [method for method in methods if family == "flux" or method != "lora_flux"]
    assert {f"{family}/{method}" for method in methods} <= set(every())
