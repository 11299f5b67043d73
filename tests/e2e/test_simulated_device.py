"""The trainers and every network on the simulated accelerator: no tensor is left on the CPU."""

from __future__ import annotations

import processes
import pytest
import simulated_checks
import torch
from flux_run import WEIGHTS, pictures  # noqa: F401 (fixture)
from safetensors.torch import load_file
from sd_run import folders  # noqa: F401 (fixture)

pytestmark = pytest.mark.slow  # whole runs
DEVICE = {"ACCELERATE_TORCH_DEVICE": "sim:0"}


def ends_well(check, *words, folder) -> str:
    log = folder / "log.txt"
    process = processes.call(check, words, log, DEVICE)
    assert processes.finished(process) == 0, log.read_text()[-4000:]
    return log.read_text()


def test_rules_of_the_device(tmp_path):
    ends_well(simulated_checks.rules, folder=tmp_path)


def test_every_network(tmp_path, bases):
    ends_well(simulated_checks.networks, str(bases), folder=tmp_path)


KOHYA = (
    "--output_name cat --network_dim 4 --save_every_n_steps 1 --save_state --sample_prompts {prompts} "
    "--sample_every_n_steps 2 --validation_split 0.4 --validate_every_n_steps 2 --max_validation_steps 1 "
)
EVERYTHING = (
    "--network_module network_null_lalora_plus_Effi_ABM --network_args basis_path=auto:random "
    "enable_effilora=True num_experts=2 loraplus_lr_ratio=16 --abm_enabled --abm_steps 1 --ema_decay 0.5"
)
RUNS = {
    "train_network_ABM.py": ("tiny_sd", KOHYA + EVERYTHING, "cat-step00000001-state"),
    "sdxl_train_network_ABM.py": (
        "tiny_sdxl",
        KOHYA + "--network_module networks.lora --network_train_unet_only --gradient_checkpointing "
        "--cache_latents --cache_text_encoder_outputs --scale_weight_norms 1",
        "cat-step00000001-state",
    ),
    "flux_train_qrlora.py": (
        "tiny_flux",
        "--rank 4 --instance_prompt cat --checkpointing_steps 1 --validation_prompt cat "
        "--validation_epochs 1 --num_validation_images 1 --gradient_checkpointing",
        "checkpoint-1",
    ),
}


@pytest.mark.parametrize("script", RUNS)
def test_trainer_samples_validates_and_resumes(script, folders, pictures, tmp_path, request):
    """Two steps in bf16 with a preview and a validation; the resumed second step gives the same bits."""
    model, flags, state = RUNS[script]
    prompts, whole, resumed = tmp_path / "prompts.txt", tmp_path / "whole", tmp_path / "resumed"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 1 --l 1")
    given = f"--pretrained_model_name_or_path {request.getfixturevalue(model)} --seed 0 --resolution 64 "
    given += "--learning_rate 1e-2 --max_train_steps 2 --max_data_loader_n_workers 0 --mixed_precision bf16 "
    given += flags.format(prompts=prompts)
    data = (
        ("--instance_data_dir", pictures)
        if script.startswith("flux")
        else ("--train_data_dir", folders / "train")
    )
    run = [script, *given.split(), *map(str, data), "--output_dir"]
    log = ends_well(
        simulated_checks.trainer,
        [*run, str(whole)],
        [*run, str(resumed), "--resume", str(whole / state)],
        folder=tmp_path,
    )
    assert "device: sim:0, precision: bf16" in log
    name = WEIGHTS if script.startswith("flux") else "cat.safetensors"
    first, second = load_file(whole / name), load_file(resumed / name)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert len(list(whole.rglob("*.png"))) >= 1
