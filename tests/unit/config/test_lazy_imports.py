"""The command line is parsed, and what the flags alone decide is refused, before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "lowrank").is_dir())
SCRIPTS = ("train_network_ABM.py", "sdxl_train_network_ABM.py", "flux_train_qrlora.py")
OTHERS = ("calc_lalora_context.py", "inference_merge.py", "save_flux_residual.py", "visualize_similarity.py")
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "numpy", "PIL")
# Runs a script as `python SCRIPT …` does, and prints which heavy packages it had imported at its end.
PROBE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    print("exit", stop.code, "imported", *(name for name in {heavy!r} if name in sys.modules))
"""


def ended(script: str, *arguments: str) -> tuple[str, str]:
    """The last line of the probe, and stderr."""
    command = [sys.executable, "-c", PROBE.format(heavy=HEAVY), script, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    return result.stdout.splitlines()[-1], result.stderr


def needed(folder: Path) -> list[str]:
    pictures = folder / "10_cat"
    pictures.mkdir(exist_ok=True)
    return [
        *("--pretrained_model_name_or_path", "model", "--train_data_dir", str(folder)),
        *("--output_dir", str(folder / "run")),
    ]


@pytest.mark.parametrize("script", [*SCRIPTS, *OTHERS])
def test_help_does_not_import_torch(script):
    assert ended(script, "--help")[0] == "exit 0 imported"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--network_dimm", "4"], "unknown flag --network_dimm"),
        (["--huber_c", "0"], "--huber_c 0 is not above 0"),
        (["--network_train_unet_only", "--network_train_text_encoder_only"], "exclude each other"),
        (["--sample_prompts", "nowhere.txt"], "nowhere.txt does not exist"),
        (
            ["--network_weights", "nowhere.safetensors"],
            "--network_weights: nowhere.safetensors does not exist",
        ),
        (["--optimizer_type", "AdamX"], "--optimizer_type AdamX is unknown"),
        (["--optimizer_type", "no_such_package.Adam"], "needs the package no-such-package"),
        (["--lr_scheduler", "cosin"], "did you mean 'cosine'"),
        (["--lr_scheduler", "cosine_with_min_lr"], "needs --lr_scheduler_min_lr_ratio"),
        (["--lr_scheduler", "adafactor:1e-3"], "is only for --optimizer_type Adafactor"),
        (
            ["--optimizer_type", "prodigyopt.Prodigy", "--unet_lr", "1", "--text_encoder_lr", "0.5"],
            "Prodigy finds one step size for all parts",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_refusal_by_flags_does_not_import_torch(tmp_path, flags, message):
    last, errors = ended("train_network_ABM.py", *needed(tmp_path), *flags)
    assert message in errors
    assert last in ("exit 1 imported", "exit 2 imported")


def test_missing_folder_of_pictures_is_refused_before_torch(tmp_path):
    flags = ["--pretrained_model_name_or_path", "m", "--output_dir", "o", "--train_data_dir", "nowhere"]
    last, errors = ended("flux_train_qrlora.py", *flags)
    assert "train_data_dir nowhere does not exist" in errors and last == "exit 1 imported"
