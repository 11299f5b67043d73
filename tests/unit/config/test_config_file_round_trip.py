"""Random flags of every training script survive being written as a run writes its config.toml."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.config.flux import FLUX_TRAIN
from lowrank.config.sd import SD_TRAIN, SDXL_TRAIN

SCRIPTS = {"flux": FLUX_TRAIN, "sd": SD_TRAIN, "sdxl": SDXL_TRAIN}
NUMBER = st.floats(0, 1e6, allow_subnormal=False).map(repr)
SHARE = st.floats(0, 1).map(repr)
COUNT = st.integers(1, 10_000).map(str)
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1)
ON = st.just(None)  # a flag without a value
VALUES = {  # flag: what may stand after it
    "--network_dim": COUNT,
    "--network_alpha": NUMBER,
    "--network_dropout": st.floats(0, 0.99).map(repr),
    "--network_args": st.lists(
        st.sampled_from(["rank_dropout=0.1", "target=to_q", "alpha=1"]), min_size=1, unique=True
    ),
    "--learning_rate": NUMBER,
    "--text_encoder_lr": NUMBER,
    "--max_grad_norm": NUMBER,
    "--lr_warmup_steps": st.one_of(st.integers(0, 1000).map(str), st.floats(0.01, 0.99).map(repr)),
    "--optimizer_args": st.lists(
        st.sampled_from(["weight_decay=0.1", "betas=0.9,0.99"]), min_size=1, unique=True
    ),
    "--max_train_steps": COUNT,
    "--gradient_accumulation_steps": COUNT,
    "--train_batch_size": COUNT,
    "--seed": st.integers(0, 2**32 - 1).map(str),
    "--resolution": st.sampled_from(["512", "512,768", "64,64"]),
    "--output_name": st.from_regex(r"[a-z][a-z0-9_]{0,20}", fullmatch=True),
    "--caption_prefix": TEXT,
    "--caption_separator": st.sampled_from([",", ";", "|"]),
    "--caption_dropout_rate": SHARE,
    "--keep_tokens": st.integers(0, 100).map(str),
    "--save_every_n_steps": COUNT,
    "--mixed_precision": st.sampled_from(["no", "bf16"]),
    "--flip_aug": ON,
    "--enable_bucket": ON,
    "--shuffle_caption": ON,
    "--gradient_checkpointing": ON,
    "--save_state": ON,
    "--cache_latents": ON,
}


@st.composite
def command_lines(draw) -> list[str]:
    words = [
        "--pretrained_model_name_or_path",
        "model",
        "--train_data_dir",
        "pictures",
        "--output_dir",
        "out",
    ]
    schedules = [
        "cosine",
        "linear",
        "polynomial",
        "constant_with_warmup",
    ]  # which have a use for warm-up steps
    words.append(f"--lr_scheduler={draw(st.sampled_from(schedules), label='schedule')}")
    for flag in draw(st.lists(st.sampled_from(sorted(VALUES)), unique=True), label="flags"):
        value = draw(VALUES[flag], label=flag)
        if isinstance(value, list):
            words += [flag, *value]
        else:
            words.append(flag if value is None else f"{flag}={value}")
    return words


@pytest.mark.parametrize("script", SCRIPTS)
@given(words=command_lines())
def test_flags_survive_the_config_file_of_their_run(script, words, tmp_path_factory):
    parsed = SCRIPTS[script].parse(words)
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(parsed.toml(), encoding="utf-8")
    again = SCRIPTS[script].parse(["--config_file", str(path)])
    assert again.values() == parsed.values()
    assert again.toml().splitlines()[2:] == parsed.toml().splitlines()[2:]  # below the command's own lines
