"""Files of kohya's scripts and of the interface kohya_ss as they are; all problems of a file at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

from lowrank.config.flux import FLUX_TRAIN
from lowrank.config.sd import SD_TRAIN, SDXL_TRAIN
from lowrank.errors import Refused, SeveralRefused

NEEDED = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--output_dir", "o"]
# Settings as kohya_ss saves them: those that are off are there too.
GUI: dict[str, object] = {
    **{"LoRA_type": "Standard", "LyCORIS_preset": "full", "additional_parameters": "", "optimizer": "AdamW"},
    **{"max_resolution": "768,512", "epoch": 3, "max_train_epochs": 0, "max_train_steps": 0, "lr_warmup": 10},
    **{
        "lr_warmup_steps": 0,
        "lr_scheduler": "cosine",
        "unet_lr": 2e-4,
        "text_encoder_lr": 5e-5,
        "t5xxl_lr": 0,
    },
    **{"learning_rate": 1e-4, "xformers": "sdpa", "seed": 0, "vae_batch_size": 0, "noise_offset": 0.05},
    **{"noise_offset_type": "Original", "multires_noise_iterations": 8, "multires_noise_discount": 0.2},
    **{"rank_dropout": 0.1, "module_dropout": 0, "block_dims": "", "loraplus_lr_ratio": 4, "conv_dim": 8},
    **{"optimizer_args": "weight_decay=0.1 betas=0.9,0.99", "network_dim": 16, "network_alpha": 8.0},
    **{"sdxl": True, "sdxl_no_half_vae": True, "sdxl_cache_text_encoder_outputs": False, "gpu_ids": ""},
    **{"sample_prompts": "a cat --w 512\n# no\na dog", "sample_every_n_epochs": 1, "num_processes": 1},
    **{
        "keep_tokens": "0",
        "gradient_accumulation_steps": 1.0,
        "train_blocks": "all",
        "clip_l": "",
        "v2": False,
    },
    **{
        "train_inpainting": False,
        "stop_text_encoder_training": 0,
        "min_snr_gamma": 5,
        "flux1_checkbox": False,
    },
    **{"guidance_scale": 3.5, "save_last_n_steps": 0, "anima_qwen3": "", "lumina_checkbox": False},
}


def saved(tmp_path: Path, name: str = "a.json", **changes: object) -> str:
    (tmp_path / name).write_text(json.dumps({**GUI, **changes}), encoding="utf-8")
    return str(tmp_path / name)


def toml(tmp_path: Path, text: str) -> str:
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    return str(tmp_path / "run.toml")


def test_interface_json_is_read_as_the_interface_reads_it(tmp_path):
    parsed = SDXL_TRAIN.parse([*NEEDED, "--config_file", saved(tmp_path)])
    options = parsed.options
    assert options.network.network_module == "networks.lora"
    assert options.network.network_args == ("rank_dropout=0.1", "loraplus_lr_ratio=4")
    assert (options.network.network_dim, options.network.network_alpha) == (16, 8)
    assert options.sizes.resolution == (768, 512) and options.model.no_half_vae
    assert options.train.max_train_epochs == 3 and options.train.gradient_accumulation_steps == 1
    assert options.optimizer.lr_warmup_steps == 0.1 and options.optimizer.optimizer_type == "AdamW"
    assert options.optimizer.optimizer_args == ("weight_decay=0.1", "betas=0.9,0.99")
    assert options.optimizer.text_encoder_lr == (5e-5,) and options.optimizer.unet_lr == 2e-4
    assert options.objective.noise_offset == 0.05 and options.objective.multires_noise_iterations is None
    assert options.objective.min_snr_gamma == 5 and options.sd_model.sdpa and not options.xformers
    assert options.train.seed is None and options.data.vae_batch_size == 1
    assert options.sampling.sample_prompt_lines == ("a cat --w 512", "a dog")
    assert not any("unknown" in note for note in parsed.notes)


@pytest.mark.parametrize(
    "changes, module, arguments",
    [
        ({"LoRA_type": "Kohya LoCon", "conv_alpha": 4}, "networks.lora", {"conv_dim=8", "conv_alpha=4"}),
        (
            {"LoRA_type": "LyCORIS/LoKr", "factor": 8},
            "lycoris.kohya",
            {"algo=lokr", "factor=8"},
        ),
        ({"LoRA_type": "LyCORIS/iA3"}, "lycoris.kohya", {"algo=ia3", "train_on_input=True"}),
        ({"LoRA_type": "LyCORIS/DyLoRA", "unit": 2}, "lycoris.kohya", {"algo=dylora", "block_size=2"}),
    ],
)
def test_kind_of_network(changes, module, arguments, tmp_path):
    network = SDXL_TRAIN.parse([*NEEDED, "--config_file", saved(tmp_path, **changes)]).options.network
    assert network.network_module == module and arguments <= set(network.network_args)


def test_flux_settings_of_the_interface(tmp_path):
    flux = {"LoRA_type": "Flux1", "flux1_checkbox": True, "sdxl": False, "text_encoder_lr": 0}
    flux |= {"train_double_block_indices": "all", "train_single_block_indices": "0-3", "img_mod_dim": ""}
    flux |= {"flux1_cache_text_encoder_outputs": True, "t5xxl": "t5.safetensors", "split_qkv": False}
    options = FLUX_TRAIN.parse([*NEEDED, "--config_file", saved(tmp_path, **flux)]).options
    assert options.network.network_module == "networks.lora_flux" and options.network.network_train_unet_only
    chosen = {"train_double_block_indices=all", "train_single_block_indices=0-3", "rank_dropout=0.1"}
    assert set(options.network.network_args) == {*chosen, "loraplus_lr_ratio=4"}
    assert options.data.cache_text_encoder_outputs and options.flux_model.t5xxl == "t5.safetensors"
    assert options.flux_model.guidance_scale == 3.5


def test_additional_parameters_are_flags(tmp_path):
    words = '--lr_scheduler_type "CosineAnnealingLR" --lr_scheduler_args "T_max=10" --max_grad_norm=0'
    path = saved(tmp_path, additional_parameters=words, max_grad_norm=1)
    optimizer = SDXL_TRAIN.parse([*NEEDED, "--config_file", path]).options.optimizer
    assert (optimizer.lr_scheduler_type, optimizer.lr_scheduler_args) == ("CosineAnnealingLR", ("T_max=10",))
    assert optimizer.max_grad_norm == 0
    with pytest.raises(Refused, match="'--wrong' in additional_parameters is unknown"):
        SDXL_TRAIN.parse([*NEEDED, "--config_file", saved(tmp_path, additional_parameters="--wrong")])


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"sdxl": False}, "the settings are for Stable Diffusion; use train_network_ABM.py"),
        ({"flux1_checkbox": True}, "the settings are for FLUX; use flux_train_qrlora.py"),
        ({"lumina_checkbox": True}, "lumina_checkbox is on: that model is not trained here"),
        ({"LoRA_type": "Flux1 OFT"}, "LoRA_type 'Flux1 OFT' is not here; choose Standard"),
    ],
)
def test_settings_of_another_model_are_refused(changes, reason, tmp_path):
    with pytest.raises(Refused) as caught:
        SDXL_TRAIN.parse([*NEEDED, "--config_file", saved(tmp_path, **changes)])
    assert reason in str(caught.value)


def test_settings_of_another_tab_are_refused(tmp_path):
    path = tmp_path / "dreambooth.json"
    path.write_text(json.dumps({"max_resolution": "512,512", "learning_rate_te": 1e-5}))
    with pytest.raises(Refused, match="a tab of kohya_ss that trains whole models"):
        SD_TRAIN.parse([*NEEDED, "--config_file", str(path)])


def test_json_of_flags(tmp_path):
    (tmp_path / "run.json").write_text('\ufeff{"network_dim": 8, "network_args": ["a=1"], "log_with": ""}')
    network = SD_TRAIN.parse([*NEEDED, "--config_file", str(tmp_path / "run.json")]).options.network
    assert network.network_dim == 8 and network.network_args == ("a=1",)
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(Refused, match="is not a JSON object"):
        SD_TRAIN.parse([*NEEDED, "--config_file", str(tmp_path / "run.json")])


def test_empty_text_is_unset(tmp_path):
    text = "vae = ''\nseed = ''\nsample_prompts = ''\nmax_train_epochs = ''\noutput_name = ''\nlog_with = ''"
    parsed = SD_TRAIN.parse([*NEEDED, "--config_file", toml(tmp_path, text)])
    assert parsed.options.sd_model.vae is None and parsed.options.train.seed is None and parsed.notes == ()


def test_interface_keys_in_toml_get_one_line(tmp_path):
    text = "epoch = 8\nnoise_offset_type = 'Original'\nmem_eff_save = true\nnetwork_dim = 8"
    parsed = SDXL_TRAIN.parse([*NEEDED, "--config_file", toml(tmp_path, text)])
    (note,) = parsed.notes
    assert note.startswith("keys of kohya_ss' interface without effect in ")
    assert note.endswith(": epoch, mem_eff_save, noise_offset_type")


def test_all_problems_are_listed_at_once(tmp_path):
    text = """
        learning_rat = 1e-4
        num_repeats = 10
        network_dim = 4.5
        vae_batch_size = 0
        train_inpainting = true
        save_model_as = "ckpt"
        lr_scheduler = "piecewise_constant"
        """
    with pytest.raises(SeveralRefused) as caught:
        SDXL_TRAIN.parse([*NEEDED, "--config_file", toml(tmp_path, text)])
    wanted = (
        *("unknown key 'learning_rat' (did you mean 'learning_rate'?)", "unknown key 'num_repeats'"),
        *("network_dim: '4.5' is not a whole number", "vae_batch_size 0 is below 1; give 1 or more"),
        *("train_inpainting is not supported: no inpainting", "--save_model_as ckpt would be a pickle"),
        "piecewise_constant needs --lr_scheduler_args",
    )
    reasons = caught.value.reasons
    assert len(reasons) == len(wanted)
    assert all(any(part in reason for reason in reasons) for part in wanted), reasons


def test_problems_of_flags_and_of_this_machine_are_one_list(tmp_path):
    """A run of the script: each problem on a line of its own, paths that do not exist among them."""
    path = toml(tmp_path, "save_model_as = 'ckpt'\nnetwork_weights = 'nowhere.safetensors'\nwrong = 1")
    words = ["--pretrained_model_name_or_path", "m", "--train_data_dir", str(tmp_path / "none")]
    command = [sys.executable, "train_network_ABM.py", *words, "--output_dir", str(tmp_path / "o")]
    done = subprocess.run(
        [*command, "--config_file", path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and lines[0].endswith("run.toml has several problems:") and len(lines) == 5
    assert [line.strip()[:2] for line in lines[1:]] == ["1.", "2.", "3.", "4."]
    for part in ("unknown key 'wrong'", "would be a pickle", "nowhere.safetensors", "train_data_dir"):
        assert any(part in line for line in lines), part


@pytest.mark.parametrize("surface", [SD_TRAIN, SDXL_TRAIN, FLUX_TRAIN])
def test_cosmetic_flags_do_not_stop_a_run(surface):
    words = (
        *("--log_config", "--cache_info", "--skip_cache_check", "--disable_mmap_load_safetensors"),
        *("--ddp_timeout", "10", "--ddp_gradient_as_bucket_view", "--ddp_static_graph"),
        *("--initial_epoch", "2", "--initial_step", "3", "--skip_until_initial_step"),
    )
    notes = surface.parse([*NEEDED, *words]).notes
    flags = sorted(word for word in words if word.startswith("--"))
    assert [note.split(" has no effect: ")[0] for note in notes] == flags
    assert surface.parse([*NEEDED, "--debug_dataset"]).options.train.dry_run
