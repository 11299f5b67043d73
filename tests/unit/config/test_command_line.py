"""The command line: documented launchers, names and their conflicts, config files, errors, frozen surface."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorder import call, tree
from repository import ROOT

from lowrank.config.checks import adapter_module
from lowrank.config.command_line import CommandLine, ConfigFile
from lowrank.config.flag import literals, option, pairs
from lowrank.config.flags_training import Optimizer
from lowrank.config.flux import FLUX_TRAIN
from lowrank.config.merge import INFERENCE_MERGE
from lowrank.config.sd import SD_TRAIN, SDXL_TRAIN
from lowrank.config.tools import SAVE_RESIDUAL, VISUALIZE_SIMILARITY
from lowrank.errors import Refused
from lowrank.objective.flow import Flow as FlowObjective

__all__ = ["tree"]  # a fixture

PUBLISHED = """
    pretrained_model_name_or_path revision variant dataset_name dataset_config_name
    instance_data_dir cache_dir image_column caption_column repeats class_data_dir instance_prompt
    class_prompt max_sequence_length validation_prompt num_validation_images validation_epochs rank
    with_prior_preservation prior_loss_weight num_class_images output_dir seed resolution
    center_crop random_flip train_text_encoder train_batch_size sample_batch_size num_train_epochs
    max_train_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint
    gradient_accumulation_steps gradient_checkpointing learning_rate guidance_scale text_encoder_lr
    scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power dataloader_num_workers
    weighting_scheme logit_mean logit_std mode_scale optimizer use_8bit_adam adam_beta1 adam_beta2
    prodigy_beta3 prodigy_decouple adam_weight_decay adam_weight_decay_text_encoder lora_layers
    adam_epsilon prodigy_use_bias_correction prodigy_safeguard_warmup max_grad_norm logging_dir
    allow_tf32 cache_latents report_to mixed_precision upcast_before_saving
    prior_generation_precision local_rank lora_init_method use_zero_init delta_scale push_to_hub
    hub_token hub_model_id
"""
KOHYA = """
    --pretrained_model_name_or_path flux1-dev.safetensors --clip_l clip_l.safetensors --t5xxl
    t5.safetensors --ae ae.safetensors --train_data_dir data --caption_extention=.txt --resolution
    768,512 --enable_bucket --cache_latents_to_disk --cache_text_encoder_outputs --network_module
    networks.lora --network_dim 16 --network_alpha 8 --network_args loraplus_lr_ratio=16 target=a=b
    --optimizer_type adamw8bit --optimizer_args weight_decay=0.01 betas=0.9,0.99 --lr_scheduler
    cosine --lr_warmup_steps 10% --unet_lr 1e-4 --text_encoder_lr 5e-5 1e-5 --max_train_epochs 10
    --train_text_encoder --save_every_n_epochs 2 --fp8_base --mixed_precision bf16 --full_bf16
    --timestep_sampling flux_shift --model_prediction_type raw --sdpa --xformers --max_token_length 225
    --min_snr_gamma=5 --noise_offset 0.05 --clip_skip 2 --lowram
    --max_data_loader_n_workers 2 --wandb_api_key SECRET --log_with all
"""
NEEDED = ["--pretrained_model_name_or_path", "m", "--instance_data_dir", "d", "--instance_prompt", "p"]
MERGE = ["--model_path", "m", "--style_lora_path", "s", "--content_lora_path", "c", "--output_dir", "o"]


def flux(*argv: str):
    return FLUX_TRAIN.parse([*NEEDED, *argv])


def refused(*argv: str, surface: CommandLine = FLUX_TRAIN) -> str:
    with pytest.raises(Refused) as caught:
        surface.parse([*(NEEDED if surface is FLUX_TRAIN else ()), *argv])
    text = str(caught.value)
    assert "\n" not in text and not text.endswith(".")
    return text


def exits(capsys, *argv: str, surface: CommandLine = FLUX_TRAIN) -> str:
    """The one line on stderr of a call that argparse itself would refuse."""
    with pytest.raises(SystemExit) as caught:
        surface.parse([*(NEEDED if surface is FLUX_TRAIN else ()), *argv])
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith(f"{surface.prog}: error: ")
    return text


# ---------- the documented calls


@pytest.mark.parametrize(
    ("script", "module"),
    [
        ("train_deltaR_sty.sh", "networks.delta_r_triu"),
        ("train_deltaR_cnt.sh", "networks.delta_r_triu"),
        ("train_QR.sh", "networks.qrlora"),
    ],
)
def test_training_launchers_parse(tree, script, module):
    arguments, _ = call(tree, f"flux_dir/{script}", "0", "64")
    parsed = FLUX_TRAIN.parse(arguments[arguments.index("./flux_train_qrlora.py") + 1 :])
    assert parsed.notes == ()
    assert adapter_module(parsed.options.network) == module
    assert parsed.options.network.network_dim == 64
    assert parsed.options.network.use_zero_init is (True if "deltaR" in script else None)
    assert (parsed.options.train.max_train_steps, parsed.options.optimizer.learning_rate) == (1000, 1e-4)
    assert (parsed.options.train.gradient_accumulation_steps, parsed.options.train.seed) == (1, 0)
    assert (
        parsed.options.flux_model.guidance_scale == 1.0
        and parsed.options.objective.discrete_flow_shift == 1.0
    )
    assert (
        parsed.options.sampling.validation_epochs == 100 and parsed.options.saving.checkpointing_steps == 250
    )
    assert parsed.options.logging.log_with == "tensorboard" and parsed.options.sizes.resolution == (512, 512)


def test_the_other_launchers_parse(tree):
    arguments, _ = call(tree, "flux_dir/save_flux_residual.sh", "0")
    residual = SAVE_RESIDUAL.parse(arguments[1:]).options
    assert (residual.rank, residual.dtype) == (64, "fp16")
    paths = {"STYLE_LORA_PATH": "s.safetensors", "CONTENT_LORA_PATH": "c.safetensors"}
    arguments, _ = call(tree, "flux_dir/inference_merge.sh", "0", **paths)
    merge = INFERENCE_MERGE.parse(arguments[1:]).options
    assert merge.style_weights == merge.content_weights == (0.9, 1.0)
    assert (merge.prompt, merge.num_inference_steps, merge.seed) == ("a <c> dog in <s> style", 28, 42)
    paths = {"LORA1_PATH": "s.safetensors", "LORA2_PATH": "c.safetensors"}
    arguments, _ = call(tree, "test/visualize_qrlora_similarity.sh", "0", **paths)
    similarity = VISUALIZE_SIMILARITY.parse(arguments[1:]).options
    assert (similarity.lora1_name, similarity.lora2_name, similarity.fixed_scale) == ("sty", "cnt", True)


def test_the_published_trainer_flags_are_known():
    """Every flag of the published FLUX trainers is accepted or refused by name; none is unknown."""
    known = {name[2:] for spec in FLUX_TRAIN.specs.values() for name in spec.names}
    assert set(PUBLISHED.split()) <= known | set(FLUX_TRAIN.ignored) | set(FLUX_TRAIN.refused)


def test_a_kohya_launcher_parses_with_one_warning():
    parsed = FLUX_TRAIN.parse(KOHYA.split())
    assert parsed.notes == (
        "ignored for FLUX: clip_skip, lowram, max_token_length, min_snr_gamma, noise_offset, sdpa, xformers",
    )
    assert pairs("--network_args", parsed.options.network.network_args) == {
        "loraplus_lr_ratio": "16",
        "target": "a=b",
    }
    assert (
        parsed.options.sizes.resolution == (768, 512) and parsed.options.captions.caption_extension == ".txt"
    )
    assert parsed.options.optimizer.lr_warmup_steps == 0.1
    assert parsed.options.optimizer.text_encoder_lr == (5e-5, 1e-5)
    assert "SECRET" not in parsed.command and "SECRET" not in parsed.toml() and "***" in parsed.command


def test_defaults_are_kohyas_where_no_reason_speaks_against():
    parsed = flux()
    assert parsed.options.train.max_train_steps == 1600 and parsed.options.train.train_batch_size == 1
    assert (
        parsed.options.objective.model_prediction_type == "raw"
    )  # kohya: sigma_scaled, which does not match the target
    assert (
        parsed.options.objective.timestep_sampling == "sigma"
        and parsed.options.objective.discrete_flow_shift == 3.0
    )
    assert parsed.options.optimizer.learning_rate == 1e-4 and Optimizer().learning_rate == 2e-6
    assert parsed.options.network.network_alpha is None and parsed.options.network.network_dim is None
    assert adapter_module(parsed.options.network) == "networks.delta_r_triu"


def test_objective_is_its_options():
    parsed = flux("--loss_type", "huber", "--logit_mean", "-0.5")
    objective = FlowObjective(**vars(parsed.options.objective))
    assert objective.logit_mean == -0.5 and objective.huber_schedule == "constant"


# ---------- names and words


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ("--rank 8", "--network_dim 8", "network_dim"),
        ("--repeats 3", "--dataset_repeats 3", "dataset_repeats"),
        ("--num_train_epochs 3", "--max_train_epochs 3", "max_train_epochs"),
        ("--random_flip", "--flip_aug", "flip_aug"),
        ("--report_to wandb", "--log_with wandb", "log_with"),
        ("--dataloader_num_workers 0", "--max_data_loader_n_workers 0", "max_data_loader_n_workers"),
        ("--max_sequence_length 77", "--t5xxl_max_token_length 77", "t5xxl_max_token_length"),
        ("--optimizer prodigy", "--optimizer_type prodigy", "optimizer_type"),
        ("--resume_from_checkpoint latest", "--resume latest", "resume"),
        ("--lr_num_cycles 2", "--lr_scheduler_num_cycles 2", "lr_scheduler_num_cycles"),
        ("--lr_power 2", "--lr_scheduler_power 2", "lr_scheduler_power"),
        ("--caption_extention .txt", "--caption_extension .txt", "caption_extension"),
        ("--hub_model_id a/b", "--huggingface_repo_id a/b", "huggingface_repo_id"),
        ("--network_mod lycoris.kohya", "--network_module lycoris.kohya", "network_module"),
        ("--cache_latents=true", "--cache_latents", "cache_latents"),
        ("--no-gradient_checkpointing", "", "gradient_checkpointing"),
    ],
)
def test_two_spellings_are_one_flag(first, second, name):
    assert flux(*first.split()).value(name) == flux(*second.split()).value(name)
    assert flux(*first.split(), *second.split()).value(name) == flux(*second.split()).value(name)


def test_two_names_that_differ_are_refused_and_one_name_twice_is_not():
    assert refused("--rank", "4", "--network_dim", "8") == (
        "--rank (4) and --network_dim (8) name one setting and differ; give one of them"
    )
    assert refused("--flip_aug", "--no-random_flip").startswith("--flip_aug (True) and --random_flip (False)")
    assert flux("--rank", "4", "--rank", "8").options.network.network_dim == 8
    assert flux("--cache_latents", "--no-cache_latents").options.data.cache_latents is False
    notes = flux("--network_args", "a=1", "b=2", "--network_args", "c=3").notes
    assert notes == ("--network_args is given twice and only the last counts: c=3",)


def test_use_zero_init_has_three_states():
    assert flux().options.network.use_zero_init is None
    assert flux("--use_zero_init").options.network.use_zero_init is True
    assert flux("--no-use_zero_init").options.network.use_zero_init is False
    assert flux("--use_zero_init", "False").options.network.use_zero_init is False


def test_negative_numbers_are_values():
    weights = INFERENCE_MERGE.parse(
        [*MERGE, "--prompt", "p", "--style_weights", "-0.5,1e-1", "--content_weights", "-1"]
    )
    assert weights.options.style_weights == (-0.5, 0.1) and weights.options.content_weights == (-1.0,)
    assert "--seed -1 is below 0" in refused("--seed", "-1")


def test_texts_keep_their_blanks():
    assert flux("--caption_separator", " ; ").options.captions.caption_separator == " ; "


@pytest.mark.parametrize(
    ("text", "expected"), [("512", (512, 512)), ("768,512", (768, 512)), ("768, 512", (768, 512))]
)
def test_resolution(text, expected):
    assert flux("--resolution", text).options.sizes.resolution == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("100", 100), ("0.1", 0.1), ("10%", 0.1), ("0", 0), ("5.0", 5)]
)
def test_warmup(text, expected):
    assert (
        flux("--lr_scheduler", "linear", "--lr_warmup_steps", text).options.optimizer.lr_warmup_steps
        == expected
    )


# ---------- exit code 2: what argparse would complain about


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--netwrk_dim 4", "unknown flag --netwrk_dim (did you mean '--network_dim'?)"),
        ("--lora_rank=4", "unknown flag --lora_rank"),
        ("--rank x", "argument --network_dim/--rank: 'x' is not a whole number"),
        ("--rank 4.5", "'4.5' is not a whole number"),
        ("--learning_rate nan", "'nan' is not a finite number"),
        ("--learning_rate inf", "'inf' is not a finite number"),
        ("--rank", "expected one argument"),
        ("--cache_latents perhaps", "'perhaps' is not true or false"),
        ("--weighting_scheme logitnormal", "(did you mean 'logit_normal'?)"),
        ("--lr_scheduler cosin", "(did you mean 'cosine'?)"),
        ("--resolution big", "'big' is not a number or 'width,height'; give e.g. 512 or 768,512"),
        ("--resolution 1,2,3", "'1,2,3' is not a number"),
        ("--lr_warmup_steps 1.5", "'1.5' is neither whole steps nor a share below 1"),
        ("--save", "ambiguous option"),
        ("--output_name my style", "unexpected 'style' belongs to no flag"),
        ("--model_type sd4", "'sd4' is not one of flux"),
        ("--dataset_name lambdalabs/x", "--dataset_name is not supported: pictures come from a folder"),
        ("--torch_compile", "--torch_compile is not supported: no model is compiled here"),
        ("--in_json", "expected one argument"),
    ],
)
def test_usage_errors(capsys, argv, expected):
    assert expected in exits(capsys, *argv.split())


def test_small_scripts_name_what_is_missing(capsys):
    assert "missing --model_path, --output_dir" in exits(capsys, surface=SAVE_RESIDUAL)
    assert "missing --lora2_path" in exits(capsys, "--lora1_path", "a", surface=VISUALIZE_SIMILARITY)
    assert "not one of fp32, fp16, bf16" in exits(capsys, "--dtype", "int8", surface=SAVE_RESIDUAL)
    assert "'0.9;1' is not a list of numbers" in exits(
        capsys, *MERGE, "--style_weights", "0.9;1", surface=INFERENCE_MERGE
    )
    assert refused(*MERGE, surface=INFERENCE_MERGE).startswith("no prompt; give --prompt")
    assert "leaves nothing to do" in refused(*MERGE, "--skip_images", surface=INFERENCE_MERGE)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--output_dir=", "the text is empty"),
        ("--resume=", "the text is empty"),
        ("--network_module=", "the text is empty"),
        ("--base_weights a ''", "the text is empty"),
        ("--lora_layers=", "names nothing"),
        ("--lora_layers ,,", "names nothing"),
        ("--output_name a/b", "'a/b' is not a plain file name"),
        ("--output_name ..", "'..' is not a plain file name"),
        ("--output_name=", "is not a plain file name"),
        (f"--output_name {'ä' * 101}", "is 202 bytes long"),
    ],
)
def test_texts_that_name_nothing_are_refused(capsys, argv, expected):
    assert expected in exits(capsys, *shlex.split(argv))


@pytest.mark.parametrize(
    ("flag", "value", "high"),
    [
        ("seed", 2**63 - 1, 2**63 - 2**32),
        ("dataset_repeats", 10**20, 10**6),
        ("max_train_steps", 10**400, 10**9),
        ("max_sequence_length", 513, 512),
    ],
)
def test_numbers_have_an_upper_limit(flag, value, high):
    assert refused(f"--{flag}", str(value)) == f"--{flag} {value} is above {high}; give {high} or less"
    assert flux(f"--{flag}", str(high))


def help_of(capsys, *words: str, surface=FLUX_TRAIN) -> str:
    with pytest.raises(SystemExit) as caught:
        surface.parse(["--help", *words])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_whole_help_lists_every_name(capsys):
    text = help_of(capsys, "all")
    assert all(name in text for spec in FLUX_TRAIN.specs.values() for name in spec.names)
    assert "--no-cache_latents" not in text and "%%" not in text


@pytest.mark.parametrize("surface", [SD_TRAIN, SDXL_TRAIN, FLUX_TRAIN], ids=lambda line: line.prog)
def test_short_help_has_fifteen_flags_and_an_example_that_parses(surface, capsys):
    text = help_of(capsys, surface=surface)
    shown = [name for name, spec in surface.specs.items() if re.search(rf"^  --{name}\b", text, re.MULTILINE)]
    assert shown == [name for name, spec in surface.specs.items() if spec.flag.essential]
    assert len(shown) == 15 and f"{len(surface.specs)} flags in all" in text
    example = text[text.index("accelerate launch") :].split("\n\n")[0]
    script, *words = shlex.split(example.replace("\\\n", " "))[2:]
    assert script == surface.prog
    assert {word[2:] for word in words if word.startswith("--")} <= set(shown)
    assert surface.parse(words).options
    assert max(map(len, text.splitlines())) <= 110


def test_help_by_group_and_by_word(capsys):
    groups = help_of(capsys, "groups")
    assert all(f"--{name}" in groups for name in FLUX_TRAIN.specs)
    assert "Pictures (--help pictures):" in groups
    pictures = help_of(capsys, "pictures")
    assert "--train_data_dir" in pictures and "--learning_rate" not in pictures
    assert "threshold of the Huber loss" in help_of(capsys, "huber_c")
    for line in re.findall(r"--help ([a-z-]+)\)", groups):
        assert help_of(capsys, line)
    with pytest.raises(SystemExit) as caught:
        FLUX_TRAIN.parse(["--help", "nonsense"])
    assert caught.value.code == 2 and "--help groups lists them" in capsys.readouterr().err


def test_help_of_a_small_script_is_whole(capsys):
    text = help_of(capsys, surface=SAVE_RESIDUAL)
    assert all(f"--{name}" in text for name in SAVE_RESIDUAL.specs)


# ---------- Refused: what needs the whole command line


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--rank 0", "--rank 0 is below 1; give 1 or more"),
        ("--max_train_steps 0", "--max_train_steps 0 is below 1"),
        ("--caption_dropout_rate 1.5", "--caption_dropout_rate 1.5 is above 1; give 1 or less"),
        ("--ema_decay 1", "--ema_decay 1 is not below 1; give less"),
        ("--network_alpha -1", "--network_alpha -1 is below 0; give 0 or more"),
        ("--learning_rate -1", "--learning_rate -1 is below 0"),
        ("--text_encoder_lr 1e-4 -1", "--text_encoder_lr -1 is below 0"),
        ("--min_bucket_reso 0", "--min_bucket_reso 0 is below 1 pixels"),
        ("--resolution 512,0", "--resolution 0 is below 1 pixels"),
        ("--lr_warmup_steps 100", "--lr_warmup_steps 100 has no effect with --lr_scheduler constant"),
        ("--train_data_dir x", "not --train_data_dir and --instance_data_dir"),
        ("--center_crop --random_crop", "--center_crop and --random_crop exclude each other"),
        ("--cache_latents --color_aug", "--color_aug changes images every epoch"),
        ("--min_bucket_reso 2048", "--min_bucket_reso 2048 exceeds --max_bucket_reso 1024"),
        ("--with_prior_preservation --class_prompt x", "--with_prior_preservation needs --class_data_dir"),
        ("--lora_init_method qr --network_module networks.lora", "means networks.qrlora"),
        ("--dim_from_weights", "--dim_from_weights needs --network_weights"),
        ("--base_weights a --base_weights_multiplier 1 2", "has 2 numbers for 1 --base_weights"),
        ("--train_text_encoder --network_train_unet_only", "exclude each other"),
        ("--validation_split 1", "--validation_split 1 is not below 1"),
        ("--masked_loss", "--masked_loss has no masks; give --conditioning_data_dir FOLDER or --alpha_mask"),
        ("--upcast_before_saving --save_precision bf16", "exclude each other"),
        ("--save_model_as ckpt", "would be a pickle"),
        ("--num_train_epochs 2 --max_train_steps 10", "scripts differ in which has precedence"),
        ("--model_type chroma", "Chroma has no CLIP-L and no guidance embedding"),
        ("--network_args rank", "--network_args 'rank' is not of the form key=value; write e.g. rank=1"),
        ("--network_args =1", "--network_args '=1' is not of the form key=value"),
        ("--network_args a=1 a=2", "--network_args has a twice (1 and 2); give it once"),
        ("--output_config", "--output_config needs the file to write"),
    ],
)
def test_rules_between_flags(argv, expected):
    assert expected in refused(*argv.split())


def test_something_to_train_on_is_needed():
    with pytest.raises(Refused, match="no base model; give --pretrained_model_name_or_path"):
        FLUX_TRAIN.parse([])
    with pytest.raises(Refused, match="one source of pictures is needed, not none; give --instance_data_dir"):
        FLUX_TRAIN.parse(["--pretrained_model_name_or_path", "m"])


def test_kohyas_epochs_win_over_steps():
    parsed = flux("--max_train_epochs", "2", "--max_train_steps", "10")
    assert parsed.options.train.max_train_epochs == 2
    assert parsed.notes == ("--max_train_steps has no effect with --max_train_epochs, which has precedence",)


def test_literals():
    assert literals("--a", ["betas=0.9,0.99", "decouple=True", "name='x=y'"]) == {
        "betas": (0.9, 0.99),
        "decouple": True,
        "name": "x=y",
    }
    with pytest.raises(Refused, match=r"--a decouple=true: the value is not a Python literal; write True"):
        literals("--a", ["decouple=true"])


# ---------- config files


def config(tmp_path: Path, text: str) -> str:
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    return str(tmp_path / "run.toml")


def test_config_file_is_flat_typed_and_weaker_than_the_command_line(tmp_path):
    path = config(
        tmp_path,
        """
        rank = 4
        xformers = true
        [anything]
        pretrained_model_name_or_path = "m"
        train_data_dir = "d"
        learning_rate = "2e-4"       # a quoted number, which kohya's script fails on later
        text_encoder_lr = 1e-5
        train_text_encoder = true
        resolution = 640
        network_args = ["a=1", "b=2"]
        gradient_checkpointing = true
        cache_latents = 1            # GUIs
        lr_warmup_steps = "10%"
        lr_scheduler = "linear"
        """,
    )
    parsed = FLUX_TRAIN.parse(
        ["--config_file", path.removesuffix(".toml"), "--rank", "8", "--no-cache_latents"]
    )
    assert parsed.options.network.network_dim == 8
    assert parsed.options.optimizer.learning_rate == 2e-4 and parsed.options.optimizer.text_encoder_lr == (
        1e-5,
    )
    assert parsed.options.sizes.resolution == (640, 640) and parsed.options.network.network_args == (
        "a=1",
        "b=2",
    )
    assert parsed.options.train.gradient_checkpointing and not parsed.options.data.cache_latents
    assert parsed.options.optimizer.lr_warmup_steps == 0.1
    assert parsed.notes == ("ignored for FLUX: xformers",)
    assert (
        parsed.given["learning_rate"] == f"learning_rate in {path}"
        and parsed.given["network_dim"] == "--rank"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "learning_rat = 1",
            "unknown key 'learning_rat' (did you mean 'learning_rate'?); correct or remove it",
        ),
        ("network_dim = 4.5", "'4.5' is not a whole number"),
        ("network_dim = true", "True is not a whole number"),
        ("learning_rate = 'fast'", "'fast' is not a finite number"),
        ("cache_latents = 'yes'", "'yes' is not true or false"),
        ("weighting_scheme = 'x'", "'x' is not one of sigma_sqrt"),
        ("output_dir = ['a']", "['a'] is not a text"),
        ("network_args = {a=1}", 'it is a table; write a list of texts instead: network_args = ["a=1"]'),
        ("[network_args]\na = 1\nb = 'x'", 'network_args = ["a=1", "b=x"]'),
        ("rank = 4\nnetwork_dim = 8", "name one setting and differ"),
        ("[a]\nrank = 4\n[b]\nnetwork_dim = 8", "name one setting and differ"),
        ("rank = 0", "rank 0 is below 1"),
        ("save_state_to_huggingface = true", "is not supported: upload the state folder"),
        ("config_file = 'x'", "unknown key 'config_file'"),
        ("rank = ", "is not TOML"),
    ],
)
def test_config_file_mistakes(tmp_path, text, expected):
    path = config(tmp_path, text)
    message = refused("--config_file", path)
    assert expected in message and "run.toml" in message


def test_unknown_config_keys_can_be_allowed(tmp_path):
    path = config(tmp_path, "noise = 1\nrank = 4")
    parsed = flux("--config_file", path, "--allow_unknown_config_keys")
    assert parsed.options.network.network_dim == 4
    assert parsed.notes == (f"unknown keys of {path} without effect: noise",)
    assert "unknown key 'noise'" in refused("--config_file", path, "--no-allow_unknown_config_keys")


def test_a_missing_config_file_is_named(tmp_path):
    assert "nowhere.toml does not exist" in refused("--config_file", str(tmp_path / "nowhere"))


def test_the_resolved_options_come_back(tmp_path):
    parsed = flux(
        *(
            "--rank",
            "8",
            "--lora_init_method",
            "deltaR",
            "--no-use_zero_init",
            "--lora_layers",
            "attn.to_q,ff.net.2",
        ),
        *("--resolution", "768,512", "--lr_scheduler", "linear", "--lr_warmup_steps", "10%", "--seed", "0"),
        *("--validation_prompt", 'a "<s>" [sks], ünïcödé 🎨\n\\ #1', "--train_text_encoder"),
        *("--text_encoder_lr", "1e-5", "2e-5"),
        *("--network_args", "a=[1,2]", "b=x=y", "--huggingface_repo_id", "a/b", "--hub_token", "hf_secret"),
        *("--dry_run",),
    )
    text = parsed.toml()
    assert "hf_secret" not in text and "dry_run = " not in text
    again = FLUX_TRAIN.parse(["--config_file", config(tmp_path, text)])
    assert again.values() == parsed.values() and again.notes == parsed.notes == ()
    assert again.options.hub.huggingface_token is None and not again.options.train.dry_run
    assert again.toml().splitlines()[2:] == text.splitlines()[2:]


@settings(max_examples=30, deadline=None)
@given(
    st.text(st.characters(exclude_categories=("Cs",))), st.floats(0, allow_nan=False, allow_infinity=False)
)
@pytest.mark.skipif(sys.version_info < (3, 11), reason="the toml package of 3.10 misreads some quotes")
def test_any_text_and_number_comes_back(tmp_path_factory, text, number):
    parsed = flux(f"--validation_prompt={text}", f"--learning_rate={number!r}", "--network_args", f"a={text}")
    path = config(tmp_path_factory.mktemp("round"), parsed.toml())
    assert FLUX_TRAIN.parse(["--config_file", path]).values() == parsed.values()


def test_output_config_writes_what_was_given_and_exits(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    with pytest.raises(SystemExit) as caught:
        flux("--rank", "8", "--output_config", "--config_file", str(tmp_path / "mine"))
    assert caught.value.code == 0 and str(path) in capsys.readouterr().out
    text = path.read_text()
    assert "network_dim = 8" in text and "max_train_steps" not in text
    assert FLUX_TRAIN.parse(["--config_file", str(path)]).options.network.network_dim == 8
    assert "does not write over" in refused("--rank", "4", "--output_config", "--config_file", str(path))
    assert path.read_text() == text


# ---------- the machinery


@dataclasses.dataclass(frozen=True)
class ToyGroup:
    """Toys"""

    size: int = option(3, "how large", unit="mm", low=1)
    names: tuple[str, ...] = option((), "what they are called", aliases=("--labels",))
    ratio: float | None = option(None, "of something, in %")


@dataclasses.dataclass(frozen=True)
class OtherToys:
    """Toys of the same size"""

    size: int = option(1, "how large")


@dataclasses.dataclass(frozen=True)
class Toys:
    """The options of a script with two groups"""

    config_file: ConfigFile
    toy_group: ToyGroup


@dataclasses.dataclass(frozen=True)
class DoubledToys:
    """The options of a script that has a flag twice"""

    toy_group: ToyGroup
    other: OtherToys


def test_a_group_is_its_flags():
    line = CommandLine("toy.py", "", ToyGroup, defaults={"size": 9}, ignored=("old",))
    parsed = line.parse(["--labels", "a b", "c", "--ratio", "5"])
    assert parsed.options == ToyGroup(9, ("a b", "c"), 5.0)
    assert parsed.command == "toy.py --labels 'a b' c --ratio 5"
    assert parsed.flag("names") == "--labels" and parsed.flag("size") == "--size"
    with pytest.raises(AttributeError, match="network"):
        _ = parsed.options.network
    with pytest.raises(dataclasses.FrozenInstanceError):
        parsed.options.size = 4


def test_defaults_of_no_flag_and_doubled_flags_are_bugs():
    with pytest.raises(AssertionError, match="colour"):
        CommandLine("toy.py", "", ToyGroup, defaults={"colour": 1}).parse([])
    with pytest.raises(AssertionError, match=r"'size'.* of OtherToys are declared twice"):
        CommandLine("toy.py", "", DoubledToys).parse([])


def test_without_the_group_there_is_no_config_file(capsys):
    with pytest.raises(SystemExit):
        CommandLine("toy.py", "", ToyGroup).parse(["--config_file", "x"])
    assert "unknown flag --config_file" in capsys.readouterr().err
    assert CommandLine("toy.py", "", Toys).parse([]).options.config_file.config_file is None


@pytest.mark.parametrize(
    "argv",
    [
        "5 a b",
        "5 a b --ratio 1",
        "--ratio 1 5 a b",
        "--ratio=1 5 a b",
        "--size 5 --names a b",
        "5 --names a b",
    ],
)
def test_words_without_a_flag_are_values_of_positional_flags(argv):
    line = CommandLine("toy.py", "", ToyGroup, positional=("size", "names"))
    options = line.parse(argv.split()).options
    assert (options.size, options.names) == (5, ("a", "b"))


def test_words_beyond_the_positional_flags_are_an_error(capsys):
    with pytest.raises(SystemExit):
        CommandLine("toy.py", "", ToyGroup, positional=("size",)).parse(["5", "a"])
    assert "'a' belongs to no flag" in capsys.readouterr().err


def test_flags_of_another_merge_rule_are_refused():
    given = {
        "model_path": "m",
        "style_lora_path": "s",
        "content_lora_path": "c",
        "output_dir": "o",
        "prompt": "p",
    }
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    assert (
        INFERENCE_MERGE.parse([*words, "--merge", "ties", "--merge_density", "0.3"]).options.merge_density
        == 0.3
    )
    with pytest.raises(
        Refused, match="--merge_density has no effect with --merge svd, which uses --merge_rank"
    ):
        INFERENCE_MERGE.parse([*words, "--merge", "svd", "--merge_density", "0.3"])
    with pytest.raises(Refused, match="needs --style_prompt and --content_prompt"):
        INFERENCE_MERGE.parse([*words, "--merge", "ziplora", "--style_prompt", "a"])


# ---------- the frozen surface


def test_the_command_line_is_frozen():
    """A flag that appears, goes or changes its default is seen in a diff: python tools/make_flags.py."""
    spec = importlib.util.spec_from_file_location("make_flags", ROOT / "tools" / "make_flags.py")
    make_flags = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_flags)
    for path, text in make_flags.files().items():
        assert path.read_text(encoding="utf-8") == text, (
            f"{path.name} is stale; run python tools/make_flags.py"
        )


@pytest.mark.parametrize("surface", [FLUX_TRAIN, SD_TRAIN, SDXL_TRAIN], ids=lambda s: s.prog)
def test_nothing_is_both_a_flag_and_not(surface):
    known = [name[2:] for spec in surface.specs.values() for name in spec.names]
    everything = [*known, *surface.ignored, *surface.refused]
    assert len(everything) == len(set(everything))
    assert all(json.dumps(way_out) for way_out in surface.refused.values())


def test_what_is_off_is_accepted(tmp_path):
    parsed = flux("--split_mode", "0", "--torch_compile", "false", "--save_every_n_steps", "0")
    assert parsed.options.saving.save_every_n_steps is None
    assert parsed.notes == ("ignored for FLUX: split_mode, torch_compile",)
    text = "split_mode = false\ntorch_compile = ''\nscale_weight_norms = 0\nmax_train_epochs = 0"
    parsed = flux("--config_file", config(tmp_path, text))
    assert parsed.options.network.scale_weight_norms is None and parsed.options.train.max_train_epochs is None
    assert refused("--rank", "0")
