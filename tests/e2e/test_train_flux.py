"""Whole runs on the tiny FLUX: what they leave behind, how they go on, and how they stop."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from flux_run import WEIGHTS, arguments, pictures, same  # noqa: F401 (fixtures)
from PIL import Image
from processes import finished, start
from safetensors.torch import load_file
from sd_run import one_thread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lowrank.cli.flux_train import main
from lowrank.errors import Refused
from lowrank.files import only_writer
from lowrank.tensors import read_metadata
from tools.make_tiny_flux import make

pytestmark = pytest.mark.slow  # whole runs

METHODS = {
    "triu": ("--lora_init_method", "triu_deltaR"),
    "qr": ("--lora_init_method", "qr"),
    "lora with dropout": (
        "--network_module",
        "lora",
        "--network_dropout",
        "0.3",
        "--network_args",
        "rank_dropout=0.2",
    ),
    "tlora with pictures": (
        *("--network_module", "tlora", "--train_batch_size", "2", "--gradient_checkpointing"),
        *("--validation_prompt", "a cat", "--num_validation_images", "1"),
    ),
    # the basis is computed again, from the weights before they are stored
    "stored base, no basis in files": (
        *("--network_module", "delta_r", "--network_args", "save_basis=none"),
        *("--base_storage", "nf4", "--mixed_precision", "bf16", "--max_grad_norm", "0"),
    ),
    "lycoris": ("--network_module", "lycoris.kohya", "--network_args", "algo=lora", "preset=attn-mlp"),
}


@pytest.mark.parametrize("method", METHODS)
def test_resume_equals_uninterrupted_run(method, arguments, tmp_path):
    if method == "lycoris":
        pytest.importorskip("lycoris")
    more = (
        *METHODS[method],
        "--checkpointing_steps",
        "2",
        "--gradient_accumulation_steps",
        "2",
        "--lr_scheduler",
        "cosine",
        "--flip_aug",
        "--enable_bucket",
        "--min_bucket_reso",
        "32",
        "--bucket_reso_steps",
        "32",
        "--resolution",
        "64",
    )
    assert main(arguments("whole", *more)) == 0
    assert main(arguments("parts", *more, "--resume", str(tmp_path / "whole" / "checkpoint-2"))) == 0
    for file in (WEIGHTS, f"checkpoint-4/{WEIGHTS}"):
        assert same(tmp_path / "whole" / file, tmp_path / "parts" / file)
    states = [
        torch.load(tmp_path / run / "checkpoint-4" / "optimizer.bin", weights_only=True)
        for run in ("whole", "parts")
    ]
    for one, two in zip(*(state["state"].values() for state in states), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    told = [
        json.loads((tmp_path / run / "checkpoint-4" / "train_state.json").read_text())
        for run in ("whole", "parts")
    ]
    assert [t["current_step"] for t in told] == [4, 4] and told[0]["position"] == told[1]["position"]
    assert (
        load_file(tmp_path / "whole" / WEIGHTS).keys()
        == load_file(tmp_path / "whole" / "checkpoint-2" / WEIGHTS).keys()
    )
    assert not same(tmp_path / "whole" / WEIGHTS, tmp_path / "whole" / "checkpoint-2" / WEIGHTS)
    facts = [read_metadata(tmp_path / "whole" / file) for file in (WEIGHTS, f"checkpoint-2/{WEIGHTS}")]
    said = [{k: v for k, v in told.items() if k.startswith(("tlora_", "lowrank."))} for told in facts]
    assert said[0] == said[1] and (method == "lycoris" or "lowrank.base_hash" in said[0])
    assert ("tlora" in method) is ({"tlora_max_rank", "tlora_min_rank", "tlora_T"} <= said[0].keys())


def test_resume_after_sigkill(arguments, tmp_path):
    more = ("--checkpointing_steps", "2", "--max_train_steps", "6")
    line = arguments("killed", "--checkpointing_steps", "2", "--max_train_steps", "100000")
    with one_thread():
        assert main(arguments("whole", *more)) == 0
    run = start("flux_train_qrlora.py", line, tmp_path / "log")
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint-2").is_dir():
        assert run.is_alive() and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.002)
    run.kill()
    assert finished(run) == -signal.SIGKILL
    for folder in (tmp_path / "killed").glob("checkpoint-*"):  # whatever was reached is whole
        assert json.loads((folder / "train_state.json").read_text())["files"]
    with one_thread():
        assert main(arguments("killed", *more, "--resume", "checkpoint-2")) == 0
    assert same(tmp_path / "whole" / WEIGHTS, tmp_path / "killed" / WEIGHTS)
    assert not list((tmp_path / "killed").glob(".*.part"))


def test_output_folder_of_a_run(arguments, tmp_path):
    more = (
        "--checkpointing_steps",
        "2",
        "--checkpoints_total_limit",
        "1",
        "--validation_prompt",
        "a dog in <s> style",
        "--validation_epochs",
        "1",
        "--num_validation_images",
        "2",
        "--gradient_checkpointing",
        "--output_dir",
        str(tmp_path / "run"),
    )
    assert main(arguments("run", *more)) == 0
    run = tmp_path / "run"
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert {
        WEIGHTS,
        "config.toml",
        "versions.txt",
        "loss.csv",
        "checkpoint-4/optimizer.bin",
        "checkpoint-4/scheduler.bin",
        "checkpoint-4/random_states_0.pkl",
        f"checkpoint-4/{WEIGHTS}",
        "checkpoint-4/train_state.json",
    } <= names
    assert not any(name.startswith("checkpoint-2") for name in names)  # --checkpoints_total_limit
    pictures = sorted((run / "sample").glob("*.png"))
    assert len(pictures) == 2 * (1 + 1)  # after epoch 1 of 3 batches, and at the end
    assert "a dog in <s> style" in Image.open(pictures[0]).text["parameters"]
    with open(run / "loss.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert all(float(row["loss"]) == pytest.approx(float(row["mse"]) + float(row["prior"])) for row in rows)
    assert all(any(row[name] for name in ("t0-250", "t250-500", "t500-750", "t750-1000")) for row in rows)
    events = EventAccumulator(str(run / "logs" / "dreambooth-flux-dev-qrlora-deltaR"))
    events.Reload()
    assert {"loss/current", "loss/average", "loss/mse", "loss/prior", "lr/unet", "norm/gradient"} <= set(
        events.Tags()["scalars"]
    )
    assert "validation/00" in events.Tags()["images"]
    again = [
        "--config_file",
        str(run / "config.toml"),
        "--output_dir",
        str(tmp_path / "again"),
        "--no-gradient_checkpointing",
    ]
    assert main([word for word in again if word != "--no-gradient_checkpointing"]) == 0
    assert same(run / WEIGHTS, tmp_path / "again" / WEIGHTS)


def test_gradient_checkpointing_changes_nothing(arguments, tmp_path):
    assert main(arguments("a")) == 0
    assert main(arguments("b", "--gradient_checkpointing")) == 0
    assert same(tmp_path / "a" / WEIGHTS, tmp_path / "b" / WEIGHTS)


def test_prior_preservation_class_images(arguments, tmp_path):
    more = (
        "--with_prior_preservation",
        "--class_data_dir",
        str(tmp_path / "class"),
        "--class_prompt",
        "a cat",
        "--num_class_images",
        "2",
        "--train_batch_size",
        "2",
        "--prior_loss_weight",
        "0.5",
        "--max_train_steps",
        "6",
    )
    assert main(arguments("run", *more)) == 0
    assert len(list((tmp_path / "class").glob("*.png"))) == 2
    with open(tmp_path / "run" / "loss.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert any(float(row["prior"]) > 0 for row in rows) and any(float(row["mse"]) > 0 for row in rows)


def test_kohya_names_files_and_states(arguments, tmp_path):
    more = (
        "--output_name",
        "cat",
        "--save_every_n_steps",
        "1",
        "--save_last_n_steps",
        "1",
        "--save_state",
        "--save_precision",
        "bf16",
        "--max_train_steps",
        "4",
        "--network_module",
        "networks.lora",
        "--network_alpha",
        "2",
    )
    assert main(arguments("run", *more)) == 0
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"cat.safetensors", "cat-step00000003.safetensors", "cat-state", "cat-step00000003-state"} <= names
    assert "cat-step00000001.safetensors" not in names
    state = load_file(tmp_path / "run" / "cat.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert (
        main(arguments("run2", *more[2:], "--network_weights", str(tmp_path / "run" / "cat.safetensors")))
        == 0
    )


def test_ema_weights_are_saved(arguments, tmp_path):
    assert main(arguments("raw", "--checkpointing_steps", "4")) == 0
    assert main(arguments("ema", "--checkpointing_steps", "4", "--ema_decay", "0.5")) == 0
    assert same(tmp_path / "raw" / WEIGHTS, tmp_path / "ema" / "checkpoint-4" / WEIGHTS)
    assert not same(tmp_path / "raw" / WEIGHTS, tmp_path / "ema" / WEIGHTS)


def test_dry_run_writes_nothing(arguments, tmp_path, capsys):
    assert main(arguments("run", "--dry_run")) == 0
    told = capsys.readouterr().out
    assert "transformer.transformer_blocks.0.attn.to_q  rank 4  alpha 4  lr 0.01" in told
    assert "steps: 4 in 2 epochs of 3 batches" in told
    assert not (tmp_path / "run").exists()


def broken(folder: Path, name: str) -> Path:
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "good.png")
    data = (folder / "good.png").read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    return folder


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--instance_data_dir", "{tmp}/nowhere"), "nowhere"),
        (("--instance_data_dir", "{tmp}/empty"), "empty"),
        (("--instance_data_dir", "{tmp}/broken"), "bad.png"),
        (("--rank", "1000"), "rank 1000 does not fit"),
        (("--network_module", "delta_rr"), "did you mean 'delta_r'"),
        (("--network_args", "use_zeroinit=1"), "did you mean 'use_zero_init'"),
        (("--pretrained_model_name_or_path", "{tmp}/half"), "vae"),
        (("--resume", "latest"), "no checkpoint-N folder"),
        (("--resume", "{tmp}/foreign"), "not a whole checkpoint"),
        (("--network_weights", "{tmp}/missing.safetensors"), "does not exist"),
        (("--optimizer_type", "AdamWW"), "did you mean"),
        (("--resolution", "60"), "multiple"),
    ],
)
def test_bad_input_is_refused_and_writes_nothing(flags, words, arguments, tiny_flux, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    broken(tmp_path / "broken", "bad.png")
    (tmp_path / "half").mkdir()
    for part in tiny_flux.iterdir():
        if part.name != "vae":
            (tmp_path / "half" / part.name).symlink_to(part)
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    with pytest.raises(Refused, match=words) as told:
        main(arguments("run", *flags))
    assert "\n" not in str(told.value)
    assert not any((tmp_path / "run").rglob("*.safetensors")) if (tmp_path / "run").exists() else True


def test_skip_bad_images(arguments, tmp_path, caplog):
    broken(tmp_path / "broken", "bad.png")
    assert main(arguments("run", "--instance_data_dir", str(tmp_path / "broken"), "--skip_bad_images")) == 0
    assert "bad.png" in caplog.text


def test_exit_code_and_error_message(arguments, tmp_path):
    log = tmp_path / "log"
    assert finished(start("flux_train_qrlora.py", arguments("run", "--rank", "1000"), log)) == 1
    printed = log.read_text()
    assert printed.splitlines()[-1].startswith("error: rank 1000 does not fit")
    assert "Traceback" not in printed
    assert finished(start("flux_train_qrlora.py", ["--lerning_rate", "1"], log)) == 2
    assert "--learning_rate" in log.read_text()


def test_non_finite_loss_stops_run(arguments, tmp_path):
    with pytest.raises(Refused) as told:
        main(
            arguments("run", "--learning_rate", "1e30", "--checkpointing_steps", "1", "--max_grad_norm", "0")
        )
    said = str(told.value)
    assert (
        "step 2" in said
        and "module transformer_blocks.0" in said
        and ".png" in said
        and "checkpoint-1" in said
    )
    assert (tmp_path / "run" / "checkpoint-1" / WEIGHTS).is_file() and not (
        tmp_path / "run" / WEIGHTS
    ).exists()


def test_damaged_and_foreign_checkpoints_are_refused(arguments, tmp_path):
    assert main(arguments("run", "--checkpointing_steps", "2")) == 0
    folder = tmp_path / "run" / "checkpoint-2"
    with pytest.raises(Refused, match="its seed is 0 and this run's is 1"):
        main(arguments("other", "--seed", "1", "--resume", str(folder)))
    with pytest.raises(Refused, match=r"its learning_rate is 0\.01"):
        main(arguments("other", "--learning_rate", "1", "--resume", str(folder)))
    with pytest.raises(Refused, match="network_dim"):
        main(arguments("other", "--rank", "2", "--resume", str(folder)))
    data = (folder / "optimizer.bin").read_bytes()
    (folder / "optimizer.bin").write_bytes(data[:-100])
    with pytest.raises(Refused, match=r"damaged: optimizer\.bin"):
        main(arguments("other", "--resume", str(folder)))
    with pytest.raises(Refused, match="raise --max_train_steps"):
        main(arguments("run", "--resume", "checkpoint-4"))
    final = load_file(tmp_path / "run" / WEIGHTS)
    (tmp_path / "run" / WEIGHTS).unlink()  # as after a kill between the last checkpoint and the last file
    assert main(arguments("run", "--resume", "checkpoint-4")) == 0
    again = load_file(tmp_path / "run" / WEIGHTS)
    assert again.keys() == final.keys() and all(torch.equal(again[key], final[key]) for key in final)
    for text in ("[1]", "null", '{"current_step": -3}', "{"):
        (folder / "train_state.json").write_text(text)
        with pytest.raises(Refused, match="not a whole checkpoint"):
            main(arguments("other", "--resume", str(folder)))


def test_output_folder_of_another_run_is_refused(arguments, tmp_path):
    assert main(arguments("run", "--checkpointing_steps", "4")) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(Refused, match="holds checkpoint-4 of an earlier run"):
        main(arguments("run", "--checkpointing_steps", "1", "--checkpoints_total_limit", "1"))
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match=r"--output_dir .* cannot be written to"):
        main(arguments("file"))
    with only_writer(tmp_path / "run"), pytest.raises(Refused, match="another run is writing"):
        main(arguments("run", "--resume", "latest"))


def test_basis_of_another_base_is_refused(arguments, tiny_flux, tmp_path, caplog):
    other = make(tmp_path / "other", seed=1)
    assert main(arguments("run")) == 0
    weights = str(tmp_path / "run" / WEIGHTS)
    with pytest.raises(Refused, match="its basis belongs to that base"):
        main(arguments("b", "--pretrained_model_name_or_path", str(other), "--network_weights", weights))
    assert main(arguments("lora", "--network_module", "lora")) == 0
    weights = str(tmp_path / "lora" / WEIGHTS)
    more = (
        "--pretrained_model_name_or_path",
        str(other),
        "--network_module",
        "lora",
        "--network_weights",
        weights,
    )
    assert main(arguments("c", *more)) == 0
    assert "is used all the same" in caplog.text


def test_resume_without_seed_uses_checkpoint_seed(arguments, tmp_path):
    line = arguments("run", "--checkpointing_steps", "2")
    at = line.index("--seed")
    del line[at : at + 2]
    assert main(line) == 0
    resumed = arguments(
        "on", "--checkpointing_steps", "2", "--resume", str(tmp_path / "run" / "checkpoint-2")
    )
    at = resumed.index("--seed")
    del resumed[at : at + 2]
    assert main(resumed) == 0
    assert same(tmp_path / "run" / WEIGHTS, tmp_path / "on" / WEIGHTS)


def test_full_disk_at_checkpoint_keeps_earlier_files(arguments, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 68864 vs 68756")

    real = torch.save
    calls = []
    monkeypatch.setattr(
        torch, "save", lambda *a, **k: full() if len(calls) > 2 else (calls.append(1), real(*a, **k))
    )
    with pytest.raises(Refused, match=r"could not write .*checkpoint-2"):
        main(arguments("run", "--checkpointing_steps", "1"))
    assert (tmp_path / "run" / "checkpoint-1" / "train_state.json").is_file()
    assert not [p for p in (tmp_path / "run").rglob("*") if ".part" in p.name]


def test_missing_gpu_is_refused(arguments, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(Refused, match="names a GPU"):
        main(arguments("run"))


def test_token_warmup_as_fraction(arguments, tmp_path):
    assert main(arguments("run", "--token_warmup_step", "0.5")) == 0


def test_full_disk_at_the_end_keeps_earlier_files(arguments, tmp_path, monkeypatch):
    assert main(arguments("run", "--checkpointing_steps", "2")) == 0
    before = (tmp_path / "run" / WEIGHTS).read_bytes()
    import lowrank.tensors

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lowrank.tensors, "save_file", full)
    with pytest.raises(Refused, match="No space left on device"):
        main(arguments("run", "--resume", "checkpoint-2"))
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == before
    assert not [p for p in (tmp_path / "run").rglob("*") if ".part" in p.name]


def test_sigint_saves_a_checkpoint_and_exits(arguments, tmp_path):
    line = arguments("run", "--max_train_steps", "100000")
    run = start("flux_train_qrlora.py", line, tmp_path / "log")
    deadline = time.monotonic() + 120
    while (
        not (tmp_path / "run" / "loss.csv").is_file()
        or len((tmp_path / "run" / "loss.csv").read_text().splitlines()) < 3
    ):
        assert run.is_alive() and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGINT)
    assert finished(run) == 130
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert json.loads((saved / "train_state.json").read_text())["current_step"] == int(saved.name[11:])


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--train_text_encoder", "--text_encoder_lr", "1e-3"), {"transformer", "text_encoder"}),
        (("--network_train_text_encoder_only",), {"text_encoder"}),
    ],
)
def test_text_encoder_training(flags, parts, arguments, tmp_path):
    more = (
        *flags,
        "--validation_prompt",
        "a dog in <s> style",
        "--num_validation_images",
        "1",
        "--max_train_steps",
        "2",
    )
    assert main(arguments("run", *more)) == 0
    state = load_file(tmp_path / "run" / WEIGHTS)
    assert {key.partition(".")[0] for key in state} == parts
    moved = {key for key, value in state.items() if key.endswith("delta_r.weight") and value.abs().max() > 0}
    assert {key.partition(".")[0] for key in moved} == parts
    assert any("text_encoder.text_model.encoder.layers.0.self_attn.q_proj" in key for key in state)


def test_kohya_flux_module_trains_its_text_encoders(arguments, tmp_path):
    """networks.lora_flux: CLIP-L without a further flag, T5 on request; the file has kohya's keys."""
    module = ("--network_module", "networks.lora_flux", "--gradient_checkpointing", "--max_train_steps", "2")
    args = ("--network_args", "train_t5xxl=True", "train_blocks=double")
    assert main(arguments("run", *module, *args, "--output_name", "a")) == 0
    state = load_file(tmp_path / "run" / "a.safetensors")
    moved = {key.split("_")[1] for key, value in state.items() if "lora_up" in key and value.any()}
    assert moved == {"unet", "te1", "te3"}
    assert "lora_unet_double_blocks_0_txt_attn_qkv.lora_up.weight" in state
    assert read_metadata(tmp_path / "run" / "a.safetensors")["ss_network_module"] == "networks.lora_flux"
    with pytest.raises(Refused, match="train_t5xxl=True would change them"):
        main(arguments("cached", *module, *args, "--cache_text_encoder_outputs"))
    alone = ("--network_train_unet_only", "--output_name", "b")
    assert main(arguments("alone", *module, *alone)) == 0
    assert all(key.startswith("lora_unet_") for key in load_file(tmp_path / "alone" / "b.safetensors"))
