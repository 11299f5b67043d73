"""All problems of one run in one list: flags, --config_file, --dataset_config, folders, network arguments."""

from __future__ import annotations

import pytest
from PIL import Image

from lowrank.cli import flux_train, sd_train
from lowrank.cli.early import checks_of
from lowrank.config.sd import SD_TRAIN
from lowrank.errors import SeveralRefused


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "2_cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "2_cat" / "a.png")
    return tmp_path


def reasons(main, *words: str) -> tuple[str, ...]:
    with pytest.raises(SeveralRefused) as refused:
        main(["--pretrained_model_name_or_path", "m", "--output_dir", "o", *words])
    return refused.value.reasons


def test_problems_of_all_sources_are_one_list(folder):
    (folder / "set.toml").write_text(
        f"""
        [general]
        shufle_caption = true
        [[datasets]]
        resolution = 256
        batch_size = 0
        [[datasets.subsets]]
        image_dir = "{folder / "2_cat"}"
        num_repeats = "x"
        [[datasets.subsets]]
        image_dir = "{folder / "none"}"
        """
    )
    (folder / "run.toml").write_text("save_model_as = 'ckpt'\nlearning_rat = 1")
    wanted = (
        "unknown key 'learning_rat'",
        "--save_model_as ckpt would be a pickle",
        "--huber_c 0 is not above 0",
        "unknown key 'shufle_caption'",
        "batch_size 0 is below 1",
        "num_repeats: 'x' is not a whole number",
        "image_dir is not a folder",
        "unknown network argument 'conv_dimm' (did you mean 'conv_dim'?)",
        "network argument rank_dropout='much' is not",
    )
    found = reasons(
        sd_train.main,
        *("--config_file", str(folder / "run.toml"), "--dataset_config", str(folder / "set.toml")),
        *("--huber_c", "0", "--network_args", "conv_dimm=4", "rank_dropout=much"),
    )
    shown = [reason.replace(f"{folder / 'none'} ", "") for reason in found]
    assert len(found) == len(wanted)
    for part in wanted:
        assert any(part in reason for reason in shown), (part, shown)


def test_buckets_and_folders_are_in_the_list(folder):
    words = ("--train_data_dir", str(folder), "--resolution", "512", "--enable_bucket")
    found = reasons(flux_train.main, *words, "--min_bucket_reso", "640", "--save_model_as", "pt")
    assert len(found) == 2 and "min_bucket_reso 640 exceeds the resolution's side 512" in found[1]
    words = ("--train_data_dir", str(folder / "2_cat"), "--save_model_as", "pt")
    found = reasons(sd_train.main, *words, "--network_args", "target=attn(")
    assert len(found) == 2 and "is itself a folder <repeats>_<class> with 1 images" in found[1]


def test_missing_packages_and_parts_of_the_model_are_in_the_list(folder, monkeypatch):
    monkeypatch.setattr("lowrank.config.checks.find_spec", lambda name: None)
    words = ("--train_data_dir", str(folder), "--log_with", "wandb", "--clip_l", "put the path here")
    found = reasons(flux_train.main, *words, "--ae", "none.safetensors")
    assert [reason.partition("; ")[0] for reason in found] == [
        "--log_with wandb needs the package wandb",
        "--clip_l put the path here does not exist",
        "--ae none.safetensors does not exist",
    ]


@pytest.mark.parametrize("exists", [True, False])
def test_class_images_may_be_drawn_by_the_run(exists, folder):
    classes = folder / "classes"
    if exists:  # and is empty
        classes.mkdir()
    words = ["--pretrained_model_name_or_path", str(folder), "--output_dir", str(folder / "out")]
    words += ["--instance_data_dir", str(folder / "2_cat"), "--instance_prompt", "a cat"]
    words += ["--with_prior_preservation", "--class_data_dir", str(classes), "--class_prompt", "a pet"]
    assert SD_TRAIN.parse(words, checks_of("networks.lora")).options.prior.class_data_dir == str(classes)
