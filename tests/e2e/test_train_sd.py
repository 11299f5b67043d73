"""Whole runs on the tiny SD 1.5, SD 2 and SDXL: kohya's command line on our loop."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from flux_run import same
from PIL import Image
from processes import finished, start
from safetensors.torch import load_file, save_file
from sd_run import arguments, folders, metadata, one_thread, rows, scalars  # noqa: F401 (fixtures)

from lowrank.cli.sd_train import main as sd
from lowrank.cli.sd_train import main_sdxl as sdxl
from lowrank.errors import Refused

pytestmark = pytest.mark.slow  # whole runs

# The user's own command, word for word but for the script's name.
DOCUMENTED = """
  --pretrained_model_name_or_path=../models/Stable-diffusion/v1-5-pruned-emaonly.safetensors
  --train_data_dir=lora_train_set
  --output_dir=lora_output
  --logging_dir=training_logs/logs
  --resolution=512,512
  --network_module=networks.lora
  --network_dim=32
  --train_batch_size=1
  --max_train_steps=200
  --mixed_precision=fp16
  --cache_latents
  --learning_rate=5e-5
  --save_every_n_epochs=50
  --save_model_as=safetensors
  --save_state
  --log_with=tensorboard
  --gradient_accumulation_steps=1
"""


# ---------- the user's command


@pytest.mark.parametrize("form", ["folder", "file"])
def test_documented_command(form, tiny_sd, folders, tmp_path, monkeypatch, capfd):
    """Smaller only by what follows it: pictures of 64 pixels, 12 steps, the tiny model's tokenizer."""
    models = tmp_path / "models" / "Stable-diffusion"
    models.mkdir(parents=True)
    (models / "v1-5-pruned-emaonly.safetensors").symlink_to(tiny_sd / "single" / "model.safetensors")
    (models / "v1-5").symlink_to(tiny_sd)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "lora_train_set").symlink_to(folders / "train")
    monkeypatch.chdir(tmp_path / "here")
    smaller = ["--resolution=64,64", "--max_train_steps=12", "--seed=3", "--learning_rate=5e-3"]
    if form == "file":
        smaller.append(f"--tokenizer_cache_dir={tiny_sd / 'single' / 'tokenizers'}")
    else:
        smaller.append("--pretrained_model_name_or_path=../models/Stable-diffusion/v1-5")
    assert sd(shlex.split(DOCUMENTED) + smaller) == 0
    out = Path("lora_output")
    names = {p.name for p in out.iterdir()}
    assert {"last.safetensors", "last-state"} <= names  # 12 steps are 2 epochs of 6: no file of epoch 50
    state = load_file(out / "last.safetensors")
    modules = {key.partition(".")[0] for key in state}
    assert sum(name.startswith("lora_unet_") for name in modules) == 192
    assert all(state[f"{name}.lora_down.weight"].shape[0] == 32 for name in modules)
    (run,) = Path("training_logs/logs").iterdir()
    told = scalars(run / "network_train")
    assert {"loss/current", "loss/average", "loss/mse", "loss/prior", "loss/epoch_average"} <= told.keys()
    assert {"lr/unet", "lr/textencoder"} <= told.keys()
    assert sum(told["loss/current"][-6:]) < sum(told["loss/current"][:6])
    said = capfd.readouterr()
    assert "num train images * repeats: 6" in said.out and "steps: 100%" in said.err
    assert "avr_loss=" in said.err and "model saved." in said.out and "epoch 1/2" in said.out
    facts = metadata(out / "last.safetensors")
    assert facts["ss_base_model_version"] == "sd_v1" and facts["ss_network_dim"] == "32"
    assert facts["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert facts["modelspec.prediction_type"] == "epsilon"


def test_file_loads_in_stock_diffusers(arguments, tiny_sd, tmp_path):
    from diffusers import StableDiffusionPipeline

    assert sd(arguments()) == 0
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)

    def drawn():
        generator = torch.Generator().manual_seed(0)
        return pipe("a cat", height=64, width=64, num_inference_steps=2, generator=generator).images[0]

    before = drawn()
    pipe.load_lora_weights(str(tmp_path / "run"), weight_name="cat.safetensors")
    assert drawn().tobytes() != before.tobytes()


# ---------- resume

LAW = {
    "sd": (sd, "tiny_sd", ("--noise_offset", "0.1", "--min_snr_gamma", "5", "--shuffle_caption")),
    "sd, encoders": (sd, "tiny_sd", ("--network_dropout", "0.3", "--ip_noise_gamma", "0.1")),
    "sdxl": (sdxl, "tiny_sdxl", ("--network_train_unet_only", "--multires_noise_iterations", "3")),
}


@pytest.mark.parametrize("case", LAW)
def test_resume_twice_equals_uninterrupted_run(case, arguments, tmp_path, request):
    """Bit for bit, with buckets, accumulation over the end of an epoch, regularisation; resumed twice."""
    main, model, more = LAW[case]
    more = (
        *(*more, "--gradient_accumulation_steps", "2", "--enable_bucket", "--min_bucket_reso", "32"),
        *("--bucket_reso_steps", "32", "--lr_scheduler", "cosine", "--flip_aug", "--caption_dropout_rate"),
        *("0.3", "--save_every_n_steps", "3", "--save_state", "--max_train_steps", "8"),
        *("--reg_data_dir", str(Path(arguments()[3]).parent / "reg")),
    )

    def run(out, *rest):
        return main(arguments(out, *more, *rest, model=request.getfixturevalue(model)))

    assert run("whole") == 0
    whole = tmp_path / "whole"
    assert run("second", "--resume", str(whole / "cat-step00000003-state")) == 0
    second = tmp_path / "second"
    assert {p.name for p in second.glob("*.safetensors")} == {
        "cat-step00000006.safetensors",
        "cat.safetensors",
    }
    assert run("third", "--resume", str(second / "cat-step00000006-state")) == 0
    for folder in (second, tmp_path / "third"):
        assert same(whole / "cat.safetensors", folder / "cat.safetensors")
        told = [json.loads((f / "cat-state/train_state.json").read_text()) for f in (whole, folder)]
        assert told[0]["current_step"] == told[1]["current_step"] == 8
        assert told[0]["position"] == told[1]["position"]
    states = [
        torch.load(f / "cat-state" / "optimizer.bin", weights_only=True) for f in (whole, tmp_path / "third")
    ]
    for one, two in zip(*(state["state"].values() for state in states), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_resume_after_sigkill(arguments, tmp_path):
    more = ("--save_every_n_steps", "2", "--save_state", "--network_train_unet_only")
    with one_thread():
        assert sd(arguments("whole", *more, "--max_train_steps", "6")) == 0
    line = arguments("killed", *more, "--max_train_steps", "100000")
    run = start("train_network_ABM.py", line, tmp_path / "log")
    killed = tmp_path / "killed"
    deadline = time.monotonic() + 240
    while not (killed / "cat-step00000002-state").is_dir():
        assert run.is_alive() and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.002)
    run.kill()
    assert finished(run) == -signal.SIGKILL
    for folder in killed.glob("*-state"):  # whatever was reached is whole
        assert json.loads((folder / "train_state.json").read_text())["files"]
    for file in killed.glob("*.safetensors"):
        assert load_file(file)
    state = str(killed / "cat-step00000002-state")
    with one_thread():
        assert sd(arguments("killed", *more, "--max_train_steps", "6", "--resume", state)) == 0
    assert same(tmp_path / "whole" / "cat.safetensors", killed / "cat.safetensors")


# ---------- what is trained


def moved(folder: Path) -> dict[str, float]:
    """The largest element of the ups, which start at zero, by part."""
    found: dict[str, float] = {}
    for key, value in load_file(folder / "cat.safetensors").items():
        if key.endswith("lora_up.weight"):
            part = key.split("_")[1]
            found[part] = max(found.get(part, 0.0), value.abs().max().item())
    return found


@pytest.mark.parametrize(
    ("flags", "parts", "still"),
    [
        ((), {"unet", "te1", "te2"}, set()),
        (("--network_train_unet_only",), {"unet"}, set()),
        (("--network_train_text_encoder_only",), {"te1", "te2"}, set()),
        (("--text_encoder_lr", "0"), {"unet"}, set()),
        (("--text_encoder_lr", "1e-3", "0"), {"unet", "te1", "te2"}, {"te2"}),
        (("--unet_lr", "0"), {"unet", "te1", "te2"}, {"unet"}),
    ],
)
def test_sdxl_learning_rates_by_component(flags, parts, still, arguments, tmp_path, tiny_sdxl):
    assert sdxl(arguments("run", *flags, "--max_train_steps", "2", model=tiny_sdxl)) == 0
    found = moved(tmp_path / "run")
    assert found.keys() == parts
    assert {part for part, size in found.items() if size == 0} == still
    facts = metadata(tmp_path / "run" / "cat.safetensors")
    assert facts["ss_base_model_version"] == "sdxl_base_v1-0"
    assert facts["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def test_base_weights_apply_to_frozen_encoders(arguments, tmp_path, tiny_sd):
    """As in diffusers' fused pipeline, also where the disk holds the captions of the base as it was."""
    from diffusers import StableDiffusionPipeline

    assert sd(arguments("told", "--network_train_text_encoder_only")) == 0
    more = ("--network_train_unet_only", "--cache_text_encoder_outputs_to_disk", "--max_train_steps", "1")

    def loss(run: str, *flags: str, model: Path = tiny_sd) -> float:
        assert sd(arguments(run, *more, *flags, model=model)) == 0
        return float(rows(tmp_path / run)[0]["loss"])

    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, local_files_only=True)
    pipe.load_lora_weights(str(tmp_path / "told"), weight_name="cat.safetensors")
    pipe.fuse_lora(components=["text_encoder"])
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "fused")
    plain, merged = loss("plain"), loss("merged", "--base_weights", str(tmp_path / "told/cat.safetensors"))
    assert merged == pytest.approx(loss("fused", model=tmp_path / "fused"), rel=1e-5)
    assert abs(merged - plain) > 1e-3


def test_rates_are_logged_by_part(arguments, tmp_path, tiny_sdxl):
    more = ("--text_encoder_lr", "1e-3", "1e-4", "--unet_lr", "1e-2", "--max_train_steps", "1")
    assert sdxl(arguments("run", *more, "--logging_dir", str(tmp_path / "logs"), model=tiny_sdxl)) == 0
    told = scalars(tmp_path / "logs")
    assert told["lr/unet"] == pytest.approx([1e-2])
    assert told["lr/textencoder 1"] == pytest.approx([1e-3])
    assert told["lr/textencoder 2"] == pytest.approx([1e-4])


def test_sd2_predicts_v(arguments, tmp_path, tiny_sd2):
    more = ("--v2", "--zero_terminal_snr", "--scale_v_pred_loss_like_noise_pred", "--max_train_steps", "2")
    with pytest.raises(Refused, match="--v_parameterization is missing"):
        sd(arguments("no", "--v2", model=tiny_sd2))
    assert sd(arguments("run", *more, "--v_parameterization", model=tiny_sd2)) == 0
    facts = metadata(tmp_path / "run" / "cat.safetensors")
    assert facts["ss_base_model_version"] == "sd_v2_v" and facts["ss_v2"] == "True"
    assert facts["modelspec.prediction_type"] == "v" and facts["ss_zero_terminal_snr"] == "True"


@pytest.mark.parametrize(
    ("family", "method"), [("sd", "delta_r"), ("sd", "dora"), ("sdxl", "delta_r_triu"), ("sdxl", "qrlora")]
)
def test_every_method_trains(family, method, arguments, tmp_path, request):
    main = {"sd": sd, "sdxl": sdxl}[family]
    model = request.getfixturevalue(f"tiny_{family}")
    more = ("--network_module", f"networks.{method}", "--network_train_unet_only", "--max_train_steps", "2")
    assert main(arguments("run", *more, model=model)) == 0
    assert load_file(tmp_path / "run" / "cat.safetensors")
    assert float(rows(tmp_path / "run")[-1]["loss"]) > 0


def test_lycoris_network_trains(arguments, tmp_path):
    pytest.importorskip("lycoris")
    more = ("--network_module", "lycoris.kohya", "--network_args", "algo=loha", "preset=attn-mlp")
    assert sd(arguments("run", *more, "--max_train_steps", "2")) == 0
    assert any("hada_w1_a" in key for key in load_file(tmp_path / "run" / "cat.safetensors"))


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_half_precision(precision, arguments, tmp_path):
    more = ["--mixed_precision", "bf16", "--full_bf16" if precision == "bf16" else "--fp8_base"]
    assert sd(arguments("run", *more, "--max_train_steps", "2", "--gradient_checkpointing")) == 0
    kinds = {value.dtype for value in load_file(tmp_path / "run" / "cat.safetensors").values()}
    assert kinds == {torch.bfloat16 if precision == "bf16" else torch.float32}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--full_fp16", "--mixed_precision", "bf16"), "--full_fp16 needs --mixed_precision fp16"),
        (("--full_bf16", "--mixed_precision", "no"), "--full_bf16 needs --mixed_precision bf16"),
        (("--fp8_base", "--mixed_precision", "no"), "--fp8_base needs --mixed_precision"),
    ],
)
def test_precision_flags_need_matching_precision(flags, said, arguments):
    with pytest.raises(Refused, match=said):
        sd(arguments("run", *flags))


# ---------- loss, masks, held-out images


def test_prior_loss_is_a_component(arguments, folders, tmp_path):
    more = ("--reg_data_dir", str(folders / "reg"), "--prior_loss_weight", "0.5", "--train_batch_size", "2")
    assert sd(arguments("run", *more)) == 0
    told = rows(tmp_path / "run")
    assert any(float(row["prior"]) > 0 for row in told) and any(float(row["mse"]) > 0 for row in told)
    for row in told:
        assert float(row["loss"]) == pytest.approx(float(row["mse"]) + float(row["prior"]))


def test_masked_loss_counts_white_pixels(arguments, folders, tmp_path):
    flags = ("--conditioning_data_dir", str(folders / "masks"), "--max_train_steps", "1")
    assert sd(arguments("whole", "--max_train_steps", "1")) == 0
    assert sd(arguments("unused", *flags)) == 0
    assert sd(arguments("masked", *flags, "--masked_loss")) == 0
    whole, unused, masked = (float(rows(tmp_path / run)[0]["loss"]) for run in ("whole", "unused", "masked"))
    assert unused == whole and 0.3 * whole < masked < 0.7 * whole  # half of each picture is black


def test_validation_loss_does_not_change_training(arguments, tmp_path):
    more = (
        "--validation_split",
        "0.34",
        "--validation_seed",
        "7",
        "--max_train_steps",
        "8",
        "--cache_latents",
    )
    logs = str(tmp_path / "logs")
    assert sd(arguments("a", *more, "--validate_every_n_steps", "4", "--logging_dir", logs)) == 0
    assert sd(arguments("b", *more, "--max_validation_steps", "1")) == 0
    assert same(tmp_path / "a" / "cat.safetensors", tmp_path / "b" / "cat.safetensors")
    told = scalars(tmp_path / "logs")
    assert (
        len(told["loss/validation/step_average"]) == 2 and len(told["loss/validation/step_divergence"]) == 2
    )
    assert metadata(tmp_path / "a" / "cat.safetensors")["ss_num_validation_images"] == "1"
    again = sd(arguments("c", *more, "--validate_every_n_epochs", "1", "--logging_dir", logs + "2"))
    assert again == 0
    assert len(scalars(tmp_path / "logs2")["loss/validation/epoch_average"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "when", [(), ("--validate_every_n_steps", "50"), ("--validate_every_n_epochs", "50")]
)
def test_validation_at_the_end_of_a_run_inside_its_first_epoch(when, arguments, tmp_path):
    """Pictures that are held out are measured at least once, and a part of an epoch has a mean loss."""
    more = ("--validation_split", "0.34", "--max_train_steps", "2", "--network_train_unet_only")
    more = (*more, "--cache_latents", "--logging_dir", str(tmp_path / "logs"))
    assert sd(arguments("run", *more, *when, "--network_args", "target=mid_block.*to_q")) == 0
    logged = scalars(tmp_path / "logs")
    kind = "step" if "--validate_every_n_steps" in when else "epoch"
    assert len(logged[f"loss/validation/{kind}_average"]) == 1
    mean = sum(float(row["loss"]) for row in rows(tmp_path / "run")) / 2
    assert logged["loss/epoch_average"] == [pytest.approx(mean, rel=1e-5)]


def test_validation_loss_is_repeatable(arguments, tmp_path):
    more = ("--validation_split", "0.34", "--validate_every_n_steps", "1", "--learning_rate", "1e-30")
    assert sd(arguments("run", *more, "--logging_dir", str(tmp_path / "logs"))) == 0
    told = scalars(tmp_path / "logs")["loss/validation/step_average"]
    assert len(told) == 4 and len(set(told)) == 1


# ---------- caches


def test_invalid_caches_are_rebuilt(arguments, folders, tiny_sd, tmp_path, monkeypatch, caplog):
    """A run on them is the run without any; kohya's caches beside the pictures are left as they are."""
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    shutil.copytree(folders / "train", tmp_path / "pictures")
    beside = tmp_path / "pictures" / "2_cat" / "0_0064x0064_sd.npz"
    beside.write_bytes(b"kohya's")
    more = ("--train_data_dir", str(tmp_path / "pictures"), "--network_train_unet_only")
    disk = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")

    def loss(run: str, *flags: str, model: Path = tiny_sd) -> str:
        assert sd(arguments(run, *more, *flags, "--max_train_steps", "1", model=model)) == 0
        return rows(tmp_path / run)[0]["loss"]

    first = loss("first", *disk)
    latents, text = (sorted((tmp_path / "cache" / kind).iterdir()) for kind in ("latents", "text"))
    assert len(latents) == 3 and len(text) == 3
    for damaged in (latents[0], text[0]):
        damaged.write_bytes(damaged.read_bytes()[:-9])
    shutil.copy(latents[2], latents[1])  # whole, and another picture's
    assert loss("again", *disk) == first
    told = [record.getMessage() for record in caplog.records if "made again" in record.getMessage()]
    assert {str(path) for path in (*latents[:2], text[0])} == {line.split()[2] for line in told}

    shutil.copytree(tiny_sd, tmp_path / "other")
    for part in ("vae", "text_encoder"):
        (weights,) = (tmp_path / "other" / part).glob("*.safetensors")
        save_file({key: value * 1.1 for key, value in load_file(weights).items()}, weights)
    other = loss("other", *disk, model=tmp_path / "other")
    assert other == loss("plain", model=tmp_path / "other") != first
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 12
    assert beside.read_bytes() == b"kohya's"


# ---------- pictures


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' numpy 1 code
def test_sample_images_with_kohyas_prompt_file(arguments, tmp_path):
    (tmp_path / "p.txt").write_text(
        "# two\na cat --n blurry, dark --w 64 --h 70 --d 5 --l 7.5 --s 2\n"
        "a dog --d 5 --s 2 --ss euler_a --l 1\n"
    )
    more = ("--sample_prompts", str(tmp_path / "p.txt"), "--sample_every_n_steps", "2", "--sample_at_first")
    assert sd(arguments("run", *more, "--sample_sampler", "pndm", "--max_train_steps", "3")) == 0
    found = sorted(p.name for p in (tmp_path / "run" / "sample").iterdir())
    tags = {name.split("_")[1] for name in found}
    assert tags == {"e000000", "000002", "final"} and len(found) == 6
    assert all(name.startswith("cat_") and name.endswith("_5.png") for name in found)
    first = Image.open(tmp_path / "run" / "sample" / found[0])
    assert first.size == (64, 64) and "Sampler: pndm" in first.text["parameters"]
    assert "Negative prompt: blurry, dark" in first.text["parameters"]


def test_unknown_sampler_is_left_out(arguments, tmp_path, caplog):
    (tmp_path / "p.txt").write_text("a cat --ss euler_b --s 2")
    sd(arguments("run", "--sample_prompts", str(tmp_path / "p.txt"), "--max_train_steps", "1"))
    assert "'euler_b' of a prompt is left out (did you mean 'euler_a'?)" in caplog.text
    (picture,) = (tmp_path / "run" / "sample").glob("*.png")
    assert "Sampler: ddim" in Image.open(picture).text["parameters"]


# ---------- metadata


def test_metadata_of_each_file_are_kohyas(arguments, folders, tmp_path):
    """sd-scripts' train_network.py: epochs of step files count those that ended, the others their epoch."""
    more = ("--reg_data_dir", str(folders / "reg"), "--unet_lr", "1e-3", "--text_encoder_lr", "5e-4")
    more += ("--save_every_n_steps", "1", "--save_every_n_epochs", "1", "--max_train_epochs", "2")
    more += ("--train_batch_size", "4", "--optimizer_args", "weight_decay=0.05", "betas=(0.8,0.9)")
    more += ("--ip_noise_gamma", "0.1", "--scale_weight_norms", "1", "--logging_dir", str(tmp_path / "logs"))
    line = arguments("run", *more, "--output_name", "cat.safetensors")
    del line[line.index("--max_train_steps") : line.index("--max_train_steps") + 2]
    assert sd(line) == 0
    run = tmp_path / "run"
    files = {path.name: metadata(path) for path in sorted(run.glob("*.safetensors"))}
    epochs = {name: (facts["ss_epoch"], facts["ss_steps"]) for name, facts in files.items()}
    steps = int(files["cat.safetensors"]["ss_num_batches_per_epoch"])
    assert steps == 3  # 6 training and 6 of 2 regularisation images, in batches of 4
    assert epochs == {
        "cat-000001.safetensors": ("1", "3"),
        "cat-step00000001.safetensors": ("0", "1"),
        "cat-step00000002.safetensors": ("0", "2"),
        "cat-step00000003.safetensors": ("0", "3"),
        "cat-step00000004.safetensors": ("1", "4"),
        "cat-step00000005.safetensors": ("1", "5"),
        "cat.safetensors": ("2", "6"),
    }
    for facts in files.values():
        assert facts["ss_num_reg_images"] == "2"
        assert facts["ss_optimizer"] == "torch.optim.adamw.AdamW(weight_decay=0.05,betas=(0.8, 0.9))"
        assert (facts["ss_unet_lr"], facts["ss_text_encoder_lr"]) == ("0.001", "0.0005")
        assert facts["ss_ip_noise_gamma"] == "0.1" and facts["ss_output_name"] == "cat"
        assert facts["modelspec.implementation_version"].startswith("lowrank/")
        assert facts["modelspec.title"] == "cat"
    dates = [files[name]["modelspec.date"] for name in ("cat-step00000001.safetensors", "cat.safetensors")]
    parsed = [time.mktime(time.strptime(date, "%Y-%m-%dT%H:%M:%S")) for date in dates]
    finished_at = [float(facts["ss_training_finished_at"]) for facts in files.values()]
    assert parsed[0] <= parsed[1] and abs(parsed[1] - max(finished_at)) < 2  # each file has its own
    norms = scalars(tmp_path / "logs")
    assert norms["norm/avg_key_norm"] == norms["max_norm/average_key_norm"]
    assert len(norms["max_norm/max_key_norm"]) == len(norms["max_norm/keys_scaled"]) == 6


def test_metadata_of_unset_options_are_kohyas(arguments, tmp_path):
    assert sd(arguments("run", "--max_train_steps", "1")) == 0
    facts = metadata(tmp_path / "run" / "cat.safetensors")
    assert facts["ss_ip_noise_gamma"] == facts["ss_text_encoder_lr"] == facts["ss_unet_lr"] == "None"
    assert facts["ss_num_reg_images"] == "0" and facts["ss_optimizer"] == "torch.optim.adamw.AdamW"


# ---------- what a run prints


def test_start_of_a_run_names_what_is_trained(arguments, folders, tmp_path, capsys, caplog):
    more = ("--reg_data_dir", str(folders / "reg"), "--enable_bucket", "--min_bucket_reso", "32")
    line = arguments("run", *more, "--bucket_reso_steps", "8", "--max_train_steps", "1")
    assert sd(line) == 0
    printed = capsys.readouterr().out
    for text in (
        "dataset 0: 64×64, batch 1",
        f"{folders / 'train' / '2_cat'}: 3 training images × 2, 3 with captions",
        f"{folders / 'reg' / '1_animal'}: 2 regularisation images × 1, 0 with captions",
        "bucket 64x64: ",
        "text encoder: 18 layers (attention 12, feed-forward 6)",
        "denoiser: 192 layers (attention 128, ",
        "total optimization steps: 1",
        "memory of weights (GiB): denoiser 0.",
        "--dry_run predicts the peak",
    ):
        assert text in printed, text
    assert "2 of 2 images have no .caption file and train on 'animal': 0.png, 1.png" in caplog.text


def test_captions_over_the_limit_are_named_once(arguments, folders, tmp_path, caplog):
    """Also where they are found in the cache, and where a trained encoder encodes them at every step."""
    shutil.copytree(folders / "train", tmp_path / "train")
    (tmp_path / "train" / "2_cat" / "0.caption").write_text("cat " * 90)
    data = ("--train_data_dir", str(tmp_path / "train"), "--max_train_steps", "2")
    cached = ("--network_train_unet_only", "--cache_text_encoder_outputs_to_disk")
    for more in (cached, cached, ()):
        caplog.clear()
        assert sd(arguments(f"run{len(more)}", *data, *more)) == 0
        (report,) = [r.getMessage() for r in caplog.records if "are cut" in r.getMessage()]
        assert "1 of 3 captions are longer than the 75 tokens of CLIP and are cut" in report
        assert "the longest has 90: cat cat" in report and report.endswith("give --max_token_length 225")


# ---------- dry run


def test_dry_run_prints_every_layer_and_rate(arguments, tmp_path, capsys, tiny_sdxl):
    more = ("--text_encoder_lr", "1e-3", "1e-4", "--dry_run")
    assert sdxl(arguments("run", *more, model=tiny_sdxl)) == 0
    told = capsys.readouterr().out
    assert "lora_te2_text_model_encoder_layers_0_mlp_fc1  rank 4  alpha 1  lr 0.0001" in told
    assert "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q  rank 4  alpha 1  lr 0.01" in told
    assert "bucket 64x64: 6" in told and "steps: 4 in 1 epochs of 6 batches" in told
    assert "group textencoder 1:" in told and "GiB" in told
    assert not (tmp_path / "run").exists()
