"""A flag that cannot act in a run is named in one line; what flags alone decide is refused before torch."""

from __future__ import annotations

import shlex

import pytest

from lowrank.config.effects import FACTS, flags_of
from lowrank.config.flux import FLUX_TRAIN
from lowrank.config.sd import SD_TRAIN, SDXL_TRAIN
from lowrank.errors import Refused

SURFACES = {"sd": SD_TRAIN, "sdxl": SDXL_TRAIN, "flux": FLUX_TRAIN}
NEEDED = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--output_dir", "o"]


def notes(line: str, surface: str = "sd") -> tuple[str, ...]:
    return SURFACES[surface].parse([*NEEDED, *shlex.split(line)]).notes


def refused(line: str, surface: str = "sd") -> str:
    with pytest.raises(Refused) as caught:
        notes(line, surface)
    return str(caught.value)


@pytest.mark.parametrize("surface", SURFACES.values(), ids=SURFACES)
def test_conditions_name_flags_and_facts(surface):
    everywhere = {name for other in SURFACES.values() for name in other.specs}
    for spec in surface.specs.values():
        for condition in spec.flag.acts_with:
            assert all(word in FACTS or flags_of(word) for word in condition.split(" or "))
            names = flags_of(condition)
            assert set(names) <= everywhere, spec.name
            for name, word in zip(names, condition.split(" or "), strict=False):
                choices = surface.specs[name].flag.choices if name in surface.specs else None
                values = word.partition("=")[2].split("|") if "=" in word else []
                assert not choices or set(values) <= set(choices), condition


def test_sixteen_flags_without_effect():
    """A command line that a user could write: none of these acts, and each gets a line."""
    without = {
        **{"--save_last_n_steps": "1", "--save_last_n_steps_state": "1", "--min_bucket_reso": "32"},
        **{"--bucket_no_upscale": "", "--keep_tokens": "1", "--text_encoder_lr": "5e-5", "--huber_c": "0.2"},
        **{"--noise_offset_random_strength": "", "--multires_noise_discount": "0.2"},
        **{"--max_validation_steps": "3", "--lr_scheduler_power": "2", "--lr_scheduler_num_cycles": "3"},
        **{"--lr_scheduler_min_lr_ratio": "0.1", "--sample_sampler": "euler", "--max_train_steps": "5"},
        "--validate_every_n_steps": "4",
    }
    line = " ".join(f"{flag} {value}" for flag, value in without.items())
    found = notes(f"--max_train_epochs 3 --save_every_n_epochs 1 --network_train_unet_only {line}")
    assert sorted(note.split(" has no effect")[0] for note in found) == sorted(without)


@pytest.mark.parametrize(
    "line, surface, note",
    [
        ("--keep_tokens 1", "sd", "tags stay in place without --shuffle_caption, --caption_tag_dropout_rate"),
        ("--lr_scheduler_power 2", "sd", "without --lr_scheduler polynomial"),
        ("--unet_lr 1e-4 --network_train_text_encoder_only", "sd", "the text encoders alone are trained"),
        ("--text_encoder_lr 1e-5", "flux", "no text encoder is trained; that needs --train_text_encoder"),
        ("--sample_every_n_epochs 1", "flux", "without --sample_prompts or --sample_prompt_lines or"),
        ("--logit_mean 1", "flux", "without --weighting_scheme logit_normal"),
        ("--discrete_flow_shift 2 --timestep_sampling sigmoid", "flux", "without --timestep_sampling sigma"),
        ("--wandb_run_name a --log_with tensorboard", "sd", "without --log_with wandb or all"),
        ("--abm_lr 1e-3", "sdxl", "without --abm_enabled"),
        ("--lr_scheduler cosine --lr_scheduler_type StepLR", "sd", "--lr_scheduler_type has precedence"),
        ("--lr_scheduler cosine --optimizer_type AdamWScheduleFree", "sd", "a schedule of its own"),
        ("--lr_scheduler cosine --optimizer_type Adafactor", "sd", "a schedule of its own"),
        ("--sample_prompts p.txt", "sd", "drawn only at the end of training"),
        ("--learning_rate 1", "sd", "1 is very high for AdamW, where 1e-4 is usual"),
    ],
)
def test_line_of_a_flag(line, surface, note):
    found = notes(line, surface)
    assert len(found) == 1 and note in found[0], found


@pytest.mark.parametrize(
    "line",
    [
        "--max_train_epochs 3 --max_train_steps 1600",  # the default: files of interfaces hold it
        "--keep_tokens 1 --shuffle_caption",
        "--dataset_config d.toml --keep_tokens 1 --enable_bucket --max_bucket_reso 512",
        "--huber_c 0.2 --loss_type smooth_l1",
        "--optimizer_type Prodigy --learning_rate 1",
        "--optimizer_type SGD --learning_rate 1",
        "--text_encoder_lr 0",
        "--lr_scheduler cosine_with_restarts --lr_scheduler_num_cycles 3",
    ],
)
def test_no_line_for_a_flag_that_acts(line):
    dataset = "--dataset_config" in line
    assert [note for note in notes(line) if not (dataset and "--train_data_dir" in note)] == []


@pytest.mark.parametrize(
    "line, reason",
    [
        ("--optimizer_type Prodigy --unet_lr 1 --text_encoder_lr 0.5", "their rates must be equal"),
        ("--optimizer_type Prodigy --text_encoder_lr 1 --learning_rate 0.9", "0.9, 1"),
        ("--optimizer_type Prodigy --learning_rate 1 --network_args loraplus_lr_ratio=16", "are 1, 16"),
        ("--lr_scheduler piecewise_constant", 'needs --lr_scheduler_args "step_rules='),
        ("--lr_scheduler piecewise_constant --lr_scheduler_args \"step_rules='1,2,3'\"", "not of the form"),
        ("--lr_scheduler cosine --lr_scheduler_args T_max=3", "T_max is no argument of cosine"),
        ("--lr_scheduler cosine_with_min_lr", "needs --lr_scheduler_min_lr_ratio"),
        ("--lr_scheduler adafactor", "is only for --optimizer_type Adafactor"),
        (
            "--lr_scheduler adafactor --optimizer_type Adafactor --optimizer_args relative_step=False",
            "relative_step=False switches that off; use constant_with_warmup",
        ),
    ],
)
def test_what_flags_decide_is_refused_at_once(line, reason):
    assert reason in refused(line)
