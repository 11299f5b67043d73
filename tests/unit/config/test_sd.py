"""The command lines of SD and SDXL against the flags of kohya's scripts: names, types, defaults, mistakes."""

from __future__ import annotations

import dataclasses
import shlex

import pytest

from lowrank.cli.resolve import with_network
from lowrank.cli.train_jobs import sd_switches
from lowrank.config.flag import fields_of
from lowrank.config.flux import FluxModel
from lowrank.config.sd import SAMPLERS, SD_TRAIN, SDXL_TRAIN, Generation, SdModel
from lowrank.errors import Refused
from lowrank.models.flux import FluxOptions
from lowrank.models.samplers import build_sampler
from lowrank.models.sd import SdOptions
from lowrank.objective.diffusion import Diffusion

BOTH = pytest.mark.parametrize("surface", [SD_TRAIN, SDXL_TRAIN], ids=lambda s: s.prog)
# Every flag that two or more of six launchers send, with the type and the default of kohya's parser: a bar
# before the words of a choice, "b" for a switch, "…" for several values. Only --network_alpha (module's own),
# --huber_* (in range) and the required ones may differ.
KOHYA = """
    logging_dir text - | log_with text - | log_prefix text - | log_tracker_name text - | wandb_api_key text -
    pretrained_model_name_or_path text - | vae text - | v_parameterization b | no_half_vae b
    train_data_dir text - | reg_data_dir text - | in_json text - | dataset_repeats integer 1
    dataset_config text - | enable_bucket b | min_bucket_reso integer 256 | max_bucket_reso integer 1024
    bucket_reso_steps integer 64 | bucket_no_upscale b | caption_separator text , | shuffle_caption b
    keep_tokens integer 0 | keep_tokens_separator text - | caption_dropout_rate number 0.0
    caption_dropout_every_n_epochs integer 0 | caption_tag_dropout_rate number 0.0 | weighted_captions b
    color_aug b | flip_aug b | random_crop b | cache_latents b | cache_latents_to_disk b
    vae_batch_size integer 1 | prior_loss_weight number 1.0 | train_batch_size integer 1
    max_train_steps integer 1600 | max_train_epochs integer - | gradient_accumulation_steps integer 1
    gradient_checkpointing b | full_fp16 b | full_bf16 b | fp8_base b | fp8_base_unet b | seed integer -
    max_data_loader_n_workers integer 8 | xformers b | sdpa b | mem_eff_attn b | max_grad_norm number 1.0
    resume text - | config_file text - | optimizer_type text - | optimizer_args text… -
    use_8bit_adam b | learning_rate number 2e-06 | unet_lr number - | text_encoder_lr number… -
    lr_scheduler_num_cycles integer 1 | lr_scheduler_power number 1.0 | lr_scheduler_type text -
    lr_scheduler_args text… - | noise_offset number - | adaptive_noise_scale number -
    multires_noise_iterations integer - | multires_noise_discount number 0.3 | zero_terminal_snr b
    min_timestep integer - | max_timestep integer - | min_snr_gamma number -
    scale_v_pred_loss_like_noise_pred b | debiased_estimation_loss b | network_module text -
    network_dim integer - | network_dropout number - | network_args text… - | network_weights text -
    dim_from_weights b | network_train_unet_only b | network_train_text_encoder_only b
    scale_weight_norms number - | base_weights text… - | base_weights_multiplier number… -
    training_comment text - | no_metadata b | output_dir text - | output_name text -
    save_every_n_epochs integer - | save_every_n_steps integer - | save_n_epoch_ratio integer -
    save_last_n_epochs integer - | save_last_n_steps integer - | save_last_n_epochs_state integer -
    save_state b | save_state_on_train_end b | huggingface_repo_id text - | huggingface_token text -
    sample_every_n_steps integer - | sample_every_n_epochs integer - | sample_prompts text -
    validation_split number 0.0 | validation_seed integer - | validate_every_n_steps integer -
    validate_every_n_epochs integer - | max_validation_steps integer - | masked_loss b | alpha_mask b
    v_pred_like_loss number - | noise_offset_random_strength b | ip_noise_gamma_random_strength b
    cache_text_encoder_outputs b | cache_text_encoder_outputs_to_disk b | tokenizer_cache_dir text -
"""
CHOICES = {
    "mixed_precision": {"no", "fp16", "bf16"},
    "loss_type": {"l1", "l2", "huber", "smooth_l1"},
    "huber_schedule": {"constant", "exponential", "snr"},
    "save_precision": {"float", "fp16", "bf16"},
    "save_model_as": {"ckpt", "pt", "safetensors"},
    "log_with": {"tensorboard", "wandb", "all"},
}
NEEDED = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--output_dir", "o"]
# What lora-scripts and the bmaltais GUI send for an SDXL LoRA, put together.
LAUNCHER = """
    --pretrained_model_name_or_path sd_xl_base_1.0.safetensors --vae vae.safetensors --train_data_dir data
    --reg_data_dir reg --output_dir out --output_name cat --logging_dir logs --log_prefix cat
    --resolution 1024,1024 --enable_bucket --min_bucket_reso 256 --max_bucket_reso 2048 --bucket_reso_steps 32
    --bucket_no_upscale --network_module networks.lora --network_dim 32 --network_alpha 16 --unet_lr 1e-4
    --text_encoder_lr 1e-5 2e-5 --learning_rate 1e-4 --network_args conv_dim=8 conv_alpha=4 --lr_scheduler
    cosine_with_restarts --lr_warmup_steps 10% --lr_scheduler_num_cycles 3 --optimizer_type AdamW8bit
    --optimizer_args weight_decay=0.1 betas=.9,.99 --train_batch_size 2 --max_train_epochs 10
    --save_every_n_epochs 2 --save_last_n_epochs 3 --save_model_as safetensors --save_precision bf16
    --mixed_precision bf16 --full_bf16 --seed 1337 --caption_extention .txt --shuffle_caption --keep_tokens 1
    --max_token_length 225 --clip_skip 2 --cache_latents --cache_latents_to_disk --xformers --lowram
    --gradient_checkpointing --min_snr_gamma 5 --noise_offset 0.0357 --ip_noise_gamma 0.1 --no_half_vae
    --prior_loss_weight 1 --persistent_data_loader_workers --max_data_loader_n_workers 8 --log_with all
    --sample_prompts p.txt --sample_sampler euler_a --sample_every_n_epochs 2 --multires_noise_iterations 0
    --training_comment hi --scale_weight_norms 1 --wandb_api_key SECRET
"""


def sd(*argv: str):
    return SD_TRAIN.parse([*NEEDED, *argv])


@BOTH
def test_kohyas_flags_have_kohyas_types_and_defaults(surface):
    """Only what is not in the table differs, such as --network_alpha, which is the module's own."""
    words = {bool: "b", int: "integer", float: "number", str: "text"}
    for line in KOHYA.split("\n"):
        for entry in filter(None, (part.strip() for part in line.split("|"))):
            name, kind, *default = entry.split()
            spec = surface.specs[name]
            assert words[spec.kind] + ("…" if spec.many else "") == kind, name
            off = spec.default is None or spec.default is False or spec.default == ()
            assert ("" if off else str(spec.default)) == ("".join(default).strip("-")), name
    for name, choices in CHOICES.items():
        assert choices <= set(surface.specs[name].flag.choices), name


@BOTH
def test_a_launchers_command_parses(surface):
    argv = shlex.split(LAUNCHER)
    parsed = surface.parse(argv)
    ignored = {"persistent_data_loader_workers"} | ({"clip_skip"} if surface is SDXL_TRAIN else set())
    assert set(parsed.notes) == {
        f"ignored for {surface.ignored_by}: {', '.join(sorted(ignored))}",
        "--max_bucket_reso has no effect with --bucket_no_upscale, which has precedence",
        "--learning_rate has no effect: every part that is trained has a rate of its own (--unet_lr, "
        "--text_encoder_lr)",
    }
    assert parsed.value("max_token_length") == 225 and parsed.options.captions.caption_extension == ".txt"
    assert parsed.options.optimizer.text_encoder_lr == (1e-5, 2e-5) and "SECRET" not in parsed.toml()
    objective = Diffusion(**vars(parsed.options.objective))
    assert objective.min_snr_gamma == 5 and objective.noise_offset == 0.0357
    assert sd_switches(parsed.options).chunks == 3


@BOTH
def test_objective_is_its_options(surface):
    options = surface.parse(NEEDED).options
    assert Diffusion(**vars(options.objective)) == Diffusion()
    assert {field.name for field in dataclasses.fields(Diffusion)} == set(vars(options.objective))


@pytest.mark.parametrize(
    ("family", "group"),
    [(SdOptions, SdModel), (SdOptions, Generation), (FluxOptions, FluxModel)],
    ids=["sd", "sd-generation", "flux"],
)
def test_switches_of_a_family_have_the_flags_defaults(family, group):
    flags = fields_of(group)
    shared = [field for field in dataclasses.fields(family) if field.name in flags]
    assert shared and all(field.default == flags[field.name].default for field in shared)


def test_the_module_is_kohyas_unless_named():
    assert with_network(sd(), "networks.lora").value("network_module") == "networks.lora"
    delta = with_network(sd("--lora_init_method", "deltaR"), "networks.lora")
    assert delta.value("network_module") == "networks.delta_r"


@pytest.mark.parametrize(
    ("argv", "trains"),
    [
        ("", True),
        ("--network_train_unet_only", False),
        ("--text_encoder_lr 0", False),
        ("--text_encoder_lr 0 1e-5", True),
        ("--no-train_text_encoder", False),
        ("--network_train_text_encoder_only", True),
    ],
)
def test_the_text_encoders_train_unless_told_otherwise(argv, trains):
    assert sd(*argv.split()).options.trains_text is trains


def test_the_resolved_options_come_back(tmp_path):
    parsed = sd("--network_train_unet_only", "--max_token_length", "150", "--min_snr_gamma", "5")
    (tmp_path / "run.toml").write_text(parsed.toml())
    again = SD_TRAIN.parse(["--config_file", str(tmp_path / "run")])
    assert again.values() == parsed.values() and not again.options.trains_text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--cache_text_encoder_outputs", "give --network_train_unet_only"),
        ("--output_dir=", None),
        ("--clip_skip 13", "--clip_skip 13 is above 12"),
        ("--masked_loss", "has no masks"),
    ],
)
def test_rules_between_flags(argv, said):
    with pytest.raises(Refused if said else SystemExit, match=said):
        sd(*argv.split())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            "--dataset_config d.toml --reg_data_dir r",
            "--train_data_dir, --reg_data_dir: no effect with",
        ),
        ("--dataset_config d.toml --in_json j.json", "--in_json, --train_data_dir: no effect with"),
        ("--in_json j.json --reg_data_dir r", "--reg_data_dir: no effect with --in_json"),
        ("--dataset_repeats 3", "--dataset_repeats: no effect with --train_data_dir"),
        ("--log_prefix cat", "--log_prefix has no effect without --logging_dir"),
    ],
)
def test_what_changes_nothing_is_said(argv, said):
    (note,) = sd(*argv.split()).notes
    assert note.startswith(said)


def test_an_alpha_of_zero_is_the_rank():
    assert sd("--network_alpha", "0").options.network.network_alpha == 0


def test_an_output_folder_is_needed():
    with pytest.raises(Refused, match="give --output_dir FOLDER"):
        SD_TRAIN.parse(NEEDED[:4])


def test_usage_errors(capsys):
    for surface, argv, said in (
        (SDXL_TRAIN, "--v2", "SDXL is not SD 2.x; use train_network_ABM.py"),
        (SD_TRAIN, "--max_token_length 100", "is not one of 75, 150, 225"),
        (SD_TRAIN, "--sample_sampler ddimm", "did you mean 'ddim'"),
        (SD_TRAIN, "--face_crop_aug_range 1,2", "use --random_crop"),
        (SD_TRAIN, "--guidance_scale 1", "unknown flag --guidance_scale"),
        (SD_TRAIN, "--deepspeed", "use `accelerate launch --num_processes N`"),
    ):
        with pytest.raises(SystemExit) as caught:
            surface.parse([*NEEDED, *argv.split()])
        assert caught.value.code == 2 and said in capsys.readouterr().err


def test_every_sampler_on_offer_is_there():
    pytest.importorskip("scipy")  # lms
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for name in SAMPLERS:
        assert build_sampler(name, schedule).config.beta_end == 0.012
