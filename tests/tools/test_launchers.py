"""The launchers of flux_dir: what they call, what replaces their values, how they answer a wrong call."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from recorder import bash, call, tree, value

TRAINING = ("train_deltaR_sty.sh", "train_deltaR_cnt.sh", "train_QR.sh")
ADAPTER = "pytorch_lora_weights.safetensors"

__all__ = ["tree"]  # a fixture


def finished_run(tree: Path, name: str, age: int = 0) -> Path:
    file = tree / "exps_flux" / name / ADAPTER
    file.parent.mkdir(parents=True)
    file.touch()
    os.utime(file, (1_700_000_000 - age, 1_700_000_000 - age))
    return file


# ---- training


DOCUMENTED = {
    "--pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev",
    "--rank": "64",
    "--mixed_precision": "bf16",
    "--resolution": "512",
    "--train_batch_size": "1",
    "--guidance_scale": "1",
    "--gradient_accumulation_steps": "1",
    "--learning_rate": "1e-4",
    "--lr_scheduler": "constant",
    "--lr_warmup_steps": "0",
    "--seed": "0",
    "--max_train_steps": "1000",
    "--validation_epochs": "100",
    "--checkpointing_steps": "250",
    "--report_to": "tensorboard",
    "--discrete_flow_shift": "1.0",
}


@pytest.mark.parametrize(
    ("script", "own", "zero"),
    [
        (
            "train_deltaR_sty.sh",
            ("assets/sty/cat", "a cat in <s> style", "a dog in <s> style", "triu_deltaR"),
            1,
        ),
        (
            "train_deltaR_cnt.sh",
            ("assets/cnt/dog", "a photo of a <c> dog", "a photo of a <c> dog on the beach", "triu_deltaR"),
            1,
        ),
        (
            "train_QR.sh",
            ("assets/cnt/dog", "a photo of a [sks] dog", "a photo of a [sks] dog on the beach", "qr"),
            0,
        ),
    ],
)
def test_documented_training_values(tree, script, own, zero):
    arguments, environment = call(tree, f"flux_dir/{script}", "0", "64")
    flags = ("--instance_data_dir", "--instance_prompt", "--validation_prompt", "--lora_init_method")
    for flag, expected in (DOCUMENTED | dict(zip(flags, own, strict=True))).items():
        assert value(arguments, flag) == expected
    assert arguments.count("--use_zero_init") == zero
    assert "./flux_train_qrlora.py" in arguments
    trigger = re.search(r"<.>|\[sks\]", own[1])[0]
    output = value(arguments, "--output_dir")
    assert re.fullmatch(rf"\./exps_flux/\d{{4}}-\d{{6}}-{re.escape(trigger)}-64", output)
    copy = (tree / output / "train_script.sh").read_text()
    assert copy.startswith((tree / "flux_dir" / script).read_text())
    assert "--max_train_steps 1000" in copy
    assert environment["CUDA_VISIBLE_DEVICES"] == "0"


def test_gpu_argument(tree):
    arguments, environment = call(tree, "flux_dir/train_QR.sh", "2", "8")
    assert arguments[:2] == ["-m", "accelerate.commands.launch"]
    assert value(arguments, "--num_processes") == "1"
    assert "--multi_gpu" not in arguments and "--cpu" not in arguments
    assert environment["CUDA_VISIBLE_DEVICES"] == "2"
    assert "NCCL_P2P_DISABLE" not in environment

    arguments, environment = call(tree, "flux_dir/train_QR.sh", "0,1", "8", NCCL_IB_DISABLE="0")
    assert "--multi_gpu" in arguments and value(arguments, "--num_processes") == "2"
    assert value(arguments, "--main_process_port") == "0"
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert (environment["NCCL_P2P_DISABLE"], environment["NCCL_IB_DISABLE"]) == ("1", "0")

    arguments, environment = call(tree, "flux_dir/train_QR.sh", "cpu", "8")
    assert "--cpu" in arguments and value(arguments, "--num_processes") == "1"
    script = arguments.index("./flux_train_qrlora.py")
    assert value(arguments[:script], "--mixed_precision") == value(arguments, "--mixed_precision") == "no"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


def test_training_values_from_environment(tree):
    given = {
        "MODEL_NAME": "/models/my flux",
        "INSTANCE_DIR": "my pictures",
        "INSTANCE_PROMPT": 'a "quoted" cat, $HOME',
        "VALID_PROMPT": "a house",
        "LORA_INIT_METHOD": "deltaR",
        "OUTPUT_DIR": "out here",
        "MIXED_PRECISION": "fp16",
        "RESOLUTION": "768",
        "TRAIN_BATCH_SIZE": "2",
        "GRADIENT_ACCUMULATION_STEPS": "3",
        "GUIDANCE_SCALE": "3.5",
        "DISCRETE_FLOW_SHIFT": "3.0",
        "LEARNING_RATE": "2e-4",
        "LR_SCHEDULER": "cosine",
        "LR_WARMUP_STEPS": "10",
        "MAX_TRAIN_STEPS": "7",
        "CHECKPOINTING_STEPS": "5",
        "SEED": "9",
        "REPORT_TO": "all",
        "VALIDATION_EPOCHS": "4",
        "NUM_VALIDATION_IMAGES": "1",
    }
    flags = {"MODEL_NAME": "pretrained_model_name_or_path", "INSTANCE_DIR": "instance_data_dir",
             "VALID_PROMPT": "validation_prompt"}  # fmt: skip
    arguments, _ = call(tree, "flux_dir/train_deltaR_sty.sh", "0", "64", **given)
    for variable, text in given.items():
        assert value(arguments, "--" + flags.get(variable, variable.lower())) == text
    assert (tree / "out here" / "train_script.sh").is_file()


def test_trigger_word(tree):
    arguments, _ = call(tree, "flux_dir/train_deltaR_cnt.sh", "0", "4", TRIGGER_NAME="<rex>")
    assert value(arguments, "--instance_prompt") == "a photo of a <rex> dog"
    assert value(arguments, "--output_dir").endswith("-<rex>-4")


def test_empty_validation_prompt(tree):
    arguments, _ = call(tree, "flux_dir/train_QR.sh", "0", "4", VALID_PROMPT="")
    assert not [a for a in arguments if a.startswith("--valid")]


def test_extra_flags_come_last(tree):
    more = ["--seed", "5", "--network_args", "key=a value"]
    arguments, _ = call(tree, "flux_dir/train_deltaR_sty.sh", "0", "64", *more)
    assert arguments[-4:] == more


def test_rank_argument_is_not_exported(tree):
    """torch.distributed takes an exported RANK for the number of the process."""
    for script, arguments in (("train_QR.sh", ("cpu", "8")), ("save_flux_residual.sh", ("cpu",))):
        called, environment = call(tree, f"flux_dir/{script}", *arguments, RANK="16")
        assert "RANK" not in environment
        assert value(called, "--rank") == ("8" if len(arguments) == 2 else "16")


# ---- wrong calls


@pytest.mark.parametrize(
    ("script", "arguments", "missing"),
    [(f"flux_dir/{script}", given, missing) for script in TRAINING
     for given, missing in (((), "GPU_ID"), (("0",), "RANK"), (("0", "--seed", "1"), "RANK"))]
    + [(f"flux_dir/{script}", (), "GPU_ID")
       for script in ("save_flux_residual.sh", "inference_merge.sh", "visualize_qrlora_similarity.sh")],
)  # fmt: skip
def test_missing_argument_prints_usage(tree, script, arguments, missing):
    done, calls = bash(tree, script, *arguments)
    assert done.returncode == 2
    assert f"{missing} is missing" in done.stderr
    assert f"example: bash {script} 0" in done.stderr
    assert calls == []
    assert not (tree / "exps_flux").exists()


def test_help_exit_code(tree):
    done, calls = bash(tree, "flux_dir/train_QR.sh", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage:") and calls == []


@pytest.mark.parametrize("gpu", ["x", "0;1", "0,", "-1", "0 1"])
def test_wrong_gpu_is_named(tree, gpu):
    done, calls = bash(tree, "flux_dir/train_QR.sh", gpu, "8")
    assert done.returncode != 0 and "GPU_ID" in done.stderr and calls == []


@pytest.mark.parametrize("rank", ["0", "abc", "1.5"])
def test_wrong_rank_is_named(tree, rank):
    for script, arguments, environment in (
        ("train_QR.sh", ("0", rank), {}),
        ("save_flux_residual.sh", ("0",), {"RANK": rank}),
    ):
        done, calls = bash(tree, f"flux_dir/{script}", *arguments, **environment)
        assert done.returncode == 1 and f"RANK is '{rank}'" in done.stderr and calls == []


def test_python_without_accelerate_is_refused(tree):
    done, calls = bash(tree, "flux_dir/train_QR.sh", "0", "8", STUB_LACKS_ACCELERATE="1")
    assert done.returncode == 1 and "tools/setup_env.sh" in done.stderr and calls == []
    assert not (tree / "exps_flux").exists()


def test_choice_of_python(tree):
    """The active environment, else .venv of the repository, else the path."""
    stub = tree / "stub" / "python3"
    for folder in ("active", ".venv"):
        (tree / folder / "bin").mkdir(parents=True)
        shutil.copy(stub, tree / folder / "bin" / "python")
    path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
    for expected, environment in (
        (str(tree / "active" / "bin" / "python"), {"VIRTUAL_ENV": str(tree / "active")}),
        ("./.venv/bin/python", {}),
        ("python3", {}),
    ):
        if expected == "python3":
            shutil.rmtree(tree / ".venv")
        done, calls = bash(tree, "flux_dir/save_flux_residual.sh", "cpu", PYTHON="", PATH=path, **environment)
        assert done.returncode == 0, done.stderr
        assert done.stderr.replace("\\ ", " ").startswith(f"+ {expected} ./save_flux_residual.py")
        assert len(calls) == 1


def test_launch_from_another_folder(tree, tmp_path):
    """Outputs go where the caller stands; the shipped pictures are found where they are."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    arguments, _ = call(tree, "flux_dir/train_deltaR_sty.sh", "cpu", "4", cwd=elsewhere)
    assert value(arguments, "--instance_data_dir") == str(tree / "assets" / "sty" / "cat")
    assert str(tree / "flux_train_qrlora.py") in arguments
    assert (elsewhere / value(arguments, "--output_dir") / "train_script.sh").is_file()


def test_kept_copy_is_harmless_in_a_folder_with_a_newline(tree, tmp_path):
    """The copy names the folder it was started in, in a comment; a second line of it would be a command."""
    folder = tmp_path / "x\ntouch RAN\n"
    folder.mkdir()
    done, _ = bash(tree, "flux_dir/train_deltaR_sty.sh", "0", "4", cwd=folder)
    assert done.returncode == 0, done.stderr
    (kept,) = tmp_path.rglob("train_script.sh")
    comment = kept.read_text().split("# Started with GPU_ID")[1].splitlines()
    assert "touch RAN" in comment[0]
    assert all(line.startswith("#") for line in comment[1:] if line.strip())
    # what runs of the copy's end is nothing: bash reads it without a command
    subprocess.run(["bash", "-c", "#" + "\n".join(comment)], cwd=tmp_path, check=True)
    assert not list(tmp_path.rglob("RAN"))


# ---- after training


def test_residual(tree):
    arguments, environment = call(tree, "flux_dir/save_flux_residual.sh", "1", "--extra")
    expected = ["--model_path", "black-forest-labs/FLUX.1-dev", "--rank", "64", "--output_dir", "flux_dir"]
    assert arguments == ["./save_flux_residual.py", *expected, "--dtype", "fp16", "--extra"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"


def test_documented_merge_values(tree):
    finished_run(tree, "0101-000000-<s>-64", age=100)
    newest = finished_run(tree, "0102-000000-<s>-8", age=10)
    finished_run(tree, "0103-000000-[s]-8")
    content = finished_run(tree, "0101-000000-<c>-64")
    (tree / "exps_flux" / "0104-000000-<s>-64" / "checkpoint-250").mkdir(parents=True)  # unfinished
    done, calls = bash(tree, "flux_dir/inference_merge.sh", "0")
    assert done.returncode == 0, done.stderr
    arguments = calls[0]["arguments"]
    assert arguments[0] == "./inference_merge.py"
    for flag, expected in {
        "--model_path": "black-forest-labs/FLUX.1-dev",
        "--style_lora_path": f"./{newest.relative_to(tree)}",
        "--content_lora_path": f"./{content.relative_to(tree)}",
        "--prompt": "a <c> dog in <s> style",
        "--num_inference_steps": "28",
        "--seed": "42",
        "--style_weights": "0.9,1.0",
        "--content_weights": "0.9,1.0",
        "--dtype": "fp16",
    }.items():
        assert value(arguments, flag) == expected
    assert f"STYLE_LORA_PATH is not set: taking the newest, ./{newest.relative_to(tree)}" in done.stderr
    output = value(arguments, "--output_dir")
    assert re.fullmatch(r"\./outputs_infer_flux/\d{8}_\d{6}", output)
    assert (tree / output / "script.sh").is_file()
    assert "--residual_path" not in arguments


def test_merge_without_adapters(tree):
    done, calls = bash(tree, "flux_dir/inference_merge.sh", "cpu")
    assert done.returncode == 1 and calls == []
    assert "bash flux_dir/train_deltaR_sty.sh cpu 64" in done.stderr and "STYLE_LORA_PATH=" in done.stderr
    finished_run(tree, "0101-000000-<s>-64")
    done, calls = bash(tree, "flux_dir/inference_merge.sh", "cpu")
    assert done.returncode == 1 and calls == []
    assert "train_deltaR_cnt.sh" in done.stderr
    assert not (tree / "outputs_infer_flux").exists()


def test_residual_is_optional(tree):
    given = {"STYLE_LORA_PATH": "s", "CONTENT_LORA_PATH": "c"}
    arguments, _ = call(tree, "flux_dir/inference_merge.sh", "0", RESIDUAL_PATH="r", **given)
    assert value(arguments, "--residual_path") == "r"
    (tree / "flux_dir" / "flux_residual_weights.safetensors").touch()  # of another rank, perhaps
    arguments, _ = call(tree, "flux_dir/inference_merge.sh", "0", **given)
    assert "--residual_path" not in arguments


def test_similarity_at_edited_path(tree):
    script = tree / "test" / "visualize_qrlora_similarity.sh"
    text = script.read_text(encoding="utf-8")
    text = text.replace('LORA1_PATH="${LORA1_PATH:-}"', 'LORA1_PATH="mine.safetensors"')
    script.write_text(text, encoding="utf-8")
    arguments, _ = call(tree, "test/visualize_qrlora_similarity.sh", "0", LORA2_PATH="other.safetensors")
    assert value(arguments, "--lora1_path") == "mine.safetensors"
    assert value(arguments, "--lora2_path") == "other.safetensors"


def test_merge_values_from_environment(tree):
    given = {
        "MODEL_PATH": "m",
        "STYLE_LORA_PATH": "s",
        "CONTENT_LORA_PATH": "c",
        "PROMPT": "p",
        "NUM_STEPS": "4",
        "SEED": "1",
        "STYLE_WEIGHTS": "0.5",
        "CONTENT_WEIGHTS": "0.1,0.2",
        "DTYPE": "bf16",
        "OUTPUT_DIR": "o",
    }
    flags = {"NUM_STEPS": "--num_inference_steps"}
    arguments, _ = call(tree, "flux_dir/inference_merge.sh", "cpu", "--num_images", "2", **given)
    for variable, text in given.items():
        assert value(arguments, flags.get(variable, "--" + variable.lower())) == text
    assert arguments[-2:] == ["--num_images", "2"]
    del given["DTYPE"]
    assert value(call(tree, "flux_dir/inference_merge.sh", "cpu", **given)[0], "--dtype") == "fp32"


def test_similarity_at_documented_path(tree):
    style, content = finished_run(tree, "0101-000000-<s>-64"), finished_run(tree, "0101-000000-<c>-64")
    for script in ("flux_dir/visualize_qrlora_similarity.sh", "test/visualize_qrlora_similarity.sh"):
        arguments, _ = call(tree, script, "0", "--more")
        assert value(arguments, "--lora1_path") == f"./{style.relative_to(tree)}"
        assert value(arguments, "--lora2_path") == f"./{content.relative_to(tree)}"
        assert (value(arguments, "--lora1_name"), value(arguments, "--lora2_name")) == ("sty", "cnt")
        assert arguments[-2:] == ["--fixed_scale", "--more"]
        output = value(arguments, "--output_dir")
        assert re.fullmatch(r"\./output_vis/qrlora_sim-\d{8}-\d{6}", output)
        assert (tree / output / "vis_script.sh").is_file()
    given = {
        "LORA1_PATH": "a",
        "LORA2_PATH": "b",
        "LORA1_NAME": "one",
        "LORA2_NAME": "two",
        "OUTPUT_DIR": "o",
    }
    arguments, _ = call(tree, "flux_dir/visualize_qrlora_similarity.sh", "0", FIXED_SCALE="", **given)
    for variable, text in given.items():
        assert value(arguments, "--" + variable.lower()) == text
    assert "--fixed_scale" not in arguments
