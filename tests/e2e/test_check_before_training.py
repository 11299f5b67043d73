"""What is wrong with files, folders and states is said before anything is cached, and changes nothing."""

from __future__ import annotations

import importlib.machinery
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sd_run import arguments, folders  # noqa: F401 (fixtures)

from lowrank.cli.sd_train import main as sd
from lowrank.errors import Refused
from lowrank.train import run as training
from tools import extract_universal_basis

STATE = ("--save_every_n_steps", "2", "--save_state", "--save_state_on_train_end")


@pytest.fixture(scope="module")
def trained(tiny_sd, folders, tmp_path_factory):
    """A run of 4 steps: cat-step00000002-state, cat-state, and cat.safetensors to merge or to go on from."""
    out = tmp_path_factory.mktemp("trained")
    line = arguments.__wrapped__(tiny_sd, folders, out)  # pyright: ignore[reportAttributeAccessIssue]
    assert sd(line("run", *STATE, "--network_train_unet_only")) == 0
    return out / "run"


@pytest.fixture
def early(arguments, monkeypatch, tmp_path):
    """A function that runs and returns the sentence of a refusal; reaching the caches fails the test."""

    def cached(*_, **__):
        raise AssertionError("the caches were reached")

    def run(*more: str, out: str = "other", **model: Path) -> str:
        before = files(tmp_path)
        with monkeypatch.context() as patch, pytest.raises(Refused) as told:
            patch.setattr(training, "text_conditions", cached)
            sd(arguments(out, "--network_train_unet_only", *more, **model))
        assert files(tmp_path) == before and "\n" not in str(told.value)
        return str(told.value)

    return run


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------- files and folders


@pytest.fixture(scope="module")
def partly_used(trained, tmp_path_factory):
    """The file of `trained` with a layer that no model has and a norm, and the number of its tensors."""
    state = load_file(trained / "cat.safetensors")
    layer = next(key for key in state if key.endswith("to_q.lora_up.weight")).removesuffix("lora_up.weight")
    for end in ("lora_up.weight", "lora_down.weight", "alpha"):
        state[layer.replace("down_blocks_", "down_blocks_9") + end] = state[layer + end].clone()
    state["lora_unet_conv_norm_out.w_norm"] = torch.ones(32)
    path = tmp_path_factory.mktemp("partly") / "partly.safetensors"
    save_file(state, path)
    return path, len(state)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["networks.lora", "lycoris.kohya"])
@pytest.mark.parametrize("flag", ["--network_weights", "--base_weights"])
def test_unused_tensors_are_reported_once_or_refused(flag, module, arguments, partly_used, caplog):
    if module == "lycoris.kohya":
        pytest.importorskip("lycoris")
    path, count = partly_used
    used, left_out = count - 4, "layer without an adapter here × 3, norm × 1, for example lora_unet_conv_"
    if (flag, module) == ("--base_weights", "lycoris.kohya"):  # LyCORIS merges norms
        used, left_out = count - 3, "layer without an adapter here × 3, for example lora_unet_down_blocks_90"
    line = (flag, str(path), "--network_module", module, "--network_train_unet_only", "--max_train_steps=1")
    with pytest.raises(Refused, match=rf"--strict, and [34] of {count} tensors of .* left out: {left_out}"):
        sd(arguments("strict", *line, "--strict"))
    caplog.clear()
    assert sd(arguments("run", *line)) == 0
    (report,) = [r.getMessage() for r in caplog.records if f"{path}: " in r.getMessage()]
    assert f"{used} of {count} tensors are used; left out: {left_out}" in report


@pytest.mark.parametrize("flag", ["--network_weights", "--base_weights"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("missing", "does not exist"),
        ("folder", "is not a file"),
        ("cut", "not a whole safetensors file"),
        ("garbage.pt", "is damaged or holds more than tensors"),
        ("foreign", "for another base"),
        ("wide", "the rank or the base model differs"),
    ],
)
def test_unusable_file_is_refused(flag, kind, said, early, trained, tmp_path):
    path = tmp_path / (kind if kind.endswith(".pt") else f"{kind}.safetensors")
    state = load_file(trained / "cat.safetensors")
    if kind == "folder":
        path.mkdir()
    elif kind == "cut":
        path.write_bytes((trained / "cat.safetensors").read_bytes()[:-100])
    elif kind == "garbage.pt":
        path.write_bytes(b"no tensors")
    elif kind == "foreign":
        save_file({f"lora_unet_other_{key}": value for key, value in state.items()}, path)
    elif kind == "wide":  # as a model of the same layers and other sizes would have it
        save_file({k: v[:-8] if "lora_up" in k else v for k, v in state.items()}, path)
    told = early(flag, str(path))
    assert path.name in told and said in told


@pytest.fixture
def prodigy(monkeypatch):
    """A package of that name; its optimizer is never made."""
    module = types.ModuleType("prodigyopt")
    module.__spec__ = importlib.machinery.ModuleSpec("prodigyopt", None)
    module.Prodigy = type("Prodigy", (torch.optim.SGD,), {"__module__": "prodigyopt"})
    monkeypatch.setitem(sys.modules, "prodigyopt", module)


@pytest.mark.parametrize("rule", ["module_rules=attn1 -> lr=0.5", "module_rules=te -> lr=0.5"])
def test_rates_of_rules_are_refused_before_pictures(rule, early, prodigy, arguments):
    line = ("--optimizer_type", "Prodigy", "--learning_rate", "1", "--network_args", rule)
    if "attn1" in rule:
        assert "their rates must be equal, but they are 0.5, 1" in early(*line)
    else:  # of a part that is not trained
        assert sd(arguments("other", "--network_train_unet_only", "--dry_run", *line)) == 0


def test_weight_decay_that_erases_the_base_is_refused_before_pictures(early):
    line = ("--network_module", "networks.qrlora", "--optimizer_type", "AdaFactor", "--optimizer_args")
    assert "would pull this method's factors to 0" in early(*line, "weight_decay=0.1")


def test_unwritable_log_folder_is_refused(early, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--logging_dir" in early("--logging_dir", str(tmp_path / "file" / "logs"))


# ---------- states


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--network_module", "networks.dora"), "its network_module is networks.lora and this run's is"),
        (
            ("--network_args", "rank_dropout=0.1"),
            "its network argument rank_dropout is unset and this run's is 0.1",
        ),
        (("--network_dim", "2"), "its network_dim is 4 and this run's is 2"),
        (("--optimizer_type", "AdaFactor"), "its optimizer_type is unset and this run's is AdaFactor"),
        (("--seed", "1"), "its seed is 0 and this run's is 1"),
        (("--train_data_dir", "{tmp}/pictures"), "it had other pictures, masks, captions or repeats"),
        (("--base_weights", "{run}/cat.safetensors"), "it had other --base_weights or their multipliers"),
        (("--max_train_steps", "3"), "is at step 4 and the run ends at 3; raise --max_train_steps"),
    ],
)
def test_state_of_another_run_is_refused(flags, said, early, trained, folders, tmp_path):
    shutil.copytree(folders / "train", tmp_path / "pictures")
    (tmp_path / "pictures" / "2_cat" / "0.caption").write_text("a dog")
    flags = [flag.format(tmp=tmp_path, run=trained) for flag in flags]
    told = early(*flags, "--resume", str(trained / "cat-state"))
    assert said in told and ("--network_weights" in told or "--max_train_steps" in told)


def test_resume_compares_pictures_by_content(early, trained, folders, tmp_path):
    """One painted over in the same number of bytes is another."""
    shutil.copytree(folders / "train", tmp_path / "pictures")
    resume = ("--train_data_dir", str(tmp_path / "pictures"), "--resume", str(trained / "cat-state"))
    assert "raise --max_train_steps" in early(*resume, "--max_train_steps", "3")  # a copy is the same
    picture = next((tmp_path / "pictures").rglob("*.png"))
    data = bytearray(picture.read_bytes())
    data[-20] ^= 1
    picture.write_bytes(data)
    assert "it had other pictures" in early(*resume)


def test_resume_compares_argument_files_by_content(arguments, early, tmp_path):
    """A basis may move, and may not be another one under the same name; a cache may be anywhere."""

    def basis(name: str, seed: int) -> str:
        draw, name_of = torch.Generator().manual_seed(seed), "mid_block_attentions_0_proj_in"
        for one in range(3):
            state = {
                f"lora_unet_{name_of}.lora_down.weight": torch.randn(4, 64, 1, 1, generator=draw),
                f"lora_unet_{name_of}.lora_up.weight": torch.randn(64, 4, 1, 1, generator=draw),
            }
            save_file(state, tmp_path / f"{one}.safetensors")
        path = tmp_path / name
        given = [str(tmp_path / f"{one}.safetensors") for one in range(3)]
        extract_universal_basis.main(["--lora_dir", *given, "--output", str(path), "--rank", "4"])
        return f"basis_path={path}"

    line = ("--network_module", "universal_lora", "--network_train_unet_only", *STATE, "--network_args")
    first = basis("a.safetensors", 0)
    assert sd(arguments("run", *line, first)) == 0
    resume = ("--resume", str(tmp_path / "run" / "cat-state"))
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "moved.safetensors")
    moved = f"basis_path={tmp_path / 'moved.safetensors'}"
    assert "the run ends at 3" in early(*line, moved, *resume, "--max_train_steps", "3")
    basis("a.safetensors", 1)
    assert "it had another file for its network argument basis_path" in early(*line, first, *resume)
    told = early(*line, "basis_path=auto:random", *resume)
    assert "network argument basis_path is sha256:" in told and "this run's is auto:random" in told


def test_state_of_another_base_is_refused(early, trained, tiny_sd, tmp_path):
    shutil.copytree(tiny_sd, tmp_path / "base")
    (weights,) = (tmp_path / "base" / "unet").glob("*.safetensors")
    save_file({key: value * 1.5 for key, value in load_file(weights).items()}, weights)
    told = early("--resume", str(trained / "cat-state"), model=tmp_path / "base")
    assert "it had another base model than this run" in told


def test_resume_compares_base_weights_by_content(arguments, early, trained, tmp_path):
    """Moved, they are the same; of another strength or with other values they are not."""
    shutil.copy(trained / "cat.safetensors", tmp_path / "base.safetensors")
    base = ("--base_weights", str(tmp_path / "base.safetensors"))
    line = ("--network_train_unet_only", *STATE)
    assert sd(arguments("run", *line, *base)) == 0
    resume = ("--resume", str(tmp_path / "run" / "cat-step00000002-state"))
    other = "it had other --base_weights or their multipliers than this run"
    assert other in early(*resume)
    assert other in early(*resume, *base, "--base_weights_multiplier", "0.5")
    moved = ("--base_weights", str(trained / "cat.safetensors"))
    assert sd(arguments("again", *line, *resume, *moved)) == 0
    ours, again = (load_file(tmp_path / run / "cat.safetensors") for run in ("run", "again"))
    assert all(torch.equal(ours[key], again[key]) for key in ours)
    save_file({key: value * 2 for key, value in ours.items()}, tmp_path / "base.safetensors")
    assert other in early(*resume, *base)


@pytest.mark.parametrize(
    "damage",
    ["cut weights", "cut optimizer", "empty optimizer", "no scheduler", "no weights", "no table", "part"],
)
def test_damaged_state_is_refused(damage, early, trained, tmp_path):
    folder = tmp_path / "cat-state"
    shutil.copytree(trained / "cat-state", folder)
    names = {
        "weights": "pytorch_lora_weights.safetensors",
        "optimizer": "optimizer.bin",
        "scheduler": "scheduler.bin",
    }
    how, _, what = damage.partition(" ")
    file = folder / names.get(what, "train_state.json")
    assert file.is_file()
    if how == "part":  # what a kill leaves behind
        file.unlink(), (folder / "optimizer.bin").unlink()
        folder = folder.rename(tmp_path / ".cat-state.part")
    elif how == "no":
        file.unlink()
    else:
        file.write_bytes(b"" if how == "empty" else file.read_bytes()[:-50])
    told = early("--resume", str(folder))
    whole = "is not a whole checkpoint" if damage in ("no table", "part") else f"is damaged: {file.name}"
    assert whole in told and "resume from an earlier" in told


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", '{"current_step": -3}', "[" * 100_000, "\xff", "kohya", "seed", "files", "runs"],
)
def test_loss_table_with_other_columns_is_refused(text, early, trained, tmp_path):
    folder = tmp_path / "cat-state"
    shutil.copytree(trained / "cat-state", folder)
    table = folder / "train_state.json"
    told = json.loads(table.read_text())
    changed = {
        "kohya": {"current_epoch": 1, "current_step": 4},
        "seed": told | {"run": told["run"] | {"seed": "x"}},
        "files": told | {"files": list(told["files"])},
        "runs": told | {"run": ["seed"]},
    }
    table.write_bytes((json.dumps(changed[text]) if text in changed else text).encode("latin-1"))
    assert "is not a whole checkpoint of this program" in early("--resume", str(folder))


def test_missing_state_is_refused(early, trained, tmp_path):
    assert "to resume from does not exist" in early("--resume", str(tmp_path / "nowhere"))
    assert "there is no checkpoint-N folder" in early("--resume", "latest")
    told = early("--resume", str(trained / "cat.safetensors"))
    assert "does not exist" in told and "-state folder" in told
