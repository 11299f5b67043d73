"""`--dataset_config`: lookup order, and mistakes named with file, table and key."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from lowrank.config.sd import SD_TRAIN
from lowrank.data.dataset_config import from_config
from lowrank.errors import Refused


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")

    def write(text, name="data.toml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


SUBSETS = """
[[datasets.subsets]]
image_dir = "a"
num_repeats = 2
class_tokens = "cat"
[[datasets.subsets]]
image_dir = "b"
is_reg = true
keep_tokens = 3
"""

WHOLE = (
    """
[general]
shuffle_caption = true
caption_extension = ".txt"
keep_tokens = 1
enable_bucket = true
[[datasets]]
resolution = 768
batch_size = 4
keep_tokens = 2
"""
    + SUBSETS
    + """
[[datasets]]
resolution = [640, 512]
[[datasets.subsets]]
image_dir = "a"
caption_dropout_rate = 0
"""
)


def test_caption_extension_gets_its_dot(tmp_path):
    (tmp_path / "cat").mkdir()
    text = (
        f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{tmp_path / "cat"}"\ncaption_extension = "txt"\n'
    )
    (tmp_path / "set.toml").write_text(text)
    (dataset,) = from_config(tmp_path / "set.toml")
    assert dataset.subsets[0].captions.caption_extension == ".txt"
    for given, used in (("txt", ".txt"), (".caption", ".caption")):
        line = ["--pretrained_model_name_or_path", "x", "--train_data_dir", "x", "--output_dir", "x"]
        line += ["--network_module", "networks.lora", "--caption_extension", given]
        assert SD_TRAIN.parse(line).options.captions.caption_extension == used


def test_lookup_order(write):
    first, second = from_config(
        write(WHOLE), {"keep_tokens": 9, "batch_size": 8, "flip_aug": True, "max_bucket_reso": 2048}
    )
    assert (first.resolution, first.batch_size, second.resolution, second.batch_size) == (
        (768, 768),
        4,
        (640, 512),
        8,
    )
    assert first.enable_bucket and second.max_bucket_reso == 2048
    cat, reg = first.subsets
    assert (cat.captions.keep_tokens, reg.captions.keep_tokens, second.subsets[0].captions.keep_tokens) == (
        2,
        3,
        1,
    )
    assert cat.augmentation.flip_aug and cat.captions.shuffle_caption
    assert cat.captions.caption_extension == ".txt"
    assert (cat.num_repeats, cat.class_tokens, cat.is_reg, reg.is_reg) == (2, "cat", False, True)


def test_json_reads_the_same(write):
    tree = {"general": {"flip_aug": True}, "datasets": [{"resolution": 512, "subsets": [{"image_dir": "a"}]}]}
    (dataset,) = from_config(write(json.dumps(tree), "data.json"))
    assert dataset.subsets[0].augmentation.flip_aug and dataset.resolution == (512, 512)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nnum_repeat = 2",
            r"data\.toml, datasets\[0\]\.subsets\[0\]: .* 'num_repeat' \(did you mean 'num_repeats'\?\)",
        ),
        ("[[dataset]]\n", r"top level: unknown key 'dataset' \(did you mean 'datasets'\?\)"),
        ("[general]\nflip = true\n[[datasets]]" + SUBSETS, r"general: unknown key 'flip'"),
        (
            "[general]\nimage_dir = 'a'\n[[datasets]]" + SUBSETS,
            r"general: unknown key 'image_dir' at this level",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nbatch_size = 2",
            r"unknown key 'batch_size' at this level",
        ),
        (
            "[[datasets]]\nsubset = 1" + SUBSETS,
            r"datasets\[0\]: unknown key 'subset' \(did you mean 'subsets'\?\)",
        ),
        ("[[datasets]]\nresolution = 640000" + SUBSETS, r"datasets\[0\]: resolution 640000 is above 16384"),
        (
            "[[datasets]]\nresolution = '512x'" + SUBSETS,
            r"datasets\[0\]: resolution: '512x' is not a number or 'width,height'",
        ),
        (
            "[[datasets]]\nbatch_size = true" + SUBSETS,
            r"batch_size: True is not a whole number",
        ),
        (
            "[[datasets]]\nenable_bucket = 2" + SUBSETS,
            r"enable_bucket: 2 is not true or false",
        ),
        (
            "[general]\ncaption_dropout_rate = 'a'\n[[datasets]]" + SUBSETS,
            r"general: caption_dropout_rate: 'a' is not a finite number",
        ),
        (
            "[general]\ncaption_dropout_rate = 2\n[[datasets]]" + SUBSETS,
            r"general: caption_dropout_rate 2 is above 1",
        ),
        ("[[datasets]]\nbatch_size = 0" + SUBSETS, r"datasets\[0\]: batch_size 0"),
        ("[general]\nflip_aug = true", r"datasets: is missing; it must be one or more \[\[datasets\]\]"),
        ("[[datasets]]\nresolution = 512", r"datasets\[0\]\.subsets: is missing"),
        ("[[datasets]]\n[[datasets.subsets]]\nis_reg = true", r"image_dir is missing"),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'c'",
            r"subsets\[0\]: image_dir c is not a folder \(seen from",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nmetadata_file = 'c'\nclass_tokens = 'cat'",
            r"subsets\[0\]: class_tokens has no meaning beside metadata_file c; remove one",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nmetadata_file = 'c'" + SUBSETS.replace("[[datasets]]", ""),
            r"datasets\[0\]: has subsets with and without metadata_file",
        ),
        (
            "[[datasets]]\nconditioning_data_dir = 'b'" + SUBSETS,
            r"datasets\[0\]: unknown key 'conditioning_data_dir' at this level; move it",
        ),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nface_crop_aug_range = [1.0, 2.0]",
            r"'face_crop_aug_range' of sd-scripts is not supported; crop",
        ),
        ("[[datasets]]\nvalidation_split = 'x'" + SUBSETS, r"validation_split: 'x' is not a finite number"),
        ("[[datasets]]\nvalidation_split = 1.5" + SUBSETS, r"datasets\[0\]: validation_split 1.5"),
        (
            "[general]\nskip_image_resolution = 'x'\n[[datasets]]" + SUBSETS,
            r"general: skip_image_resolution: 'x' is not",
        ),
        ("general = 3\n[[datasets]]" + SUBSETS, r"general: is 3 \(int\), not a table"),
        ("[[datasets]\n", r"data\.toml is not TOML"),
        ("a = ", r"data\.toml is not TOML"),
        (
            "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nresize_interpolation = 'aera'",
            r"subsets\[0\]: resize_interpolation: 'aera' is not one of .*\(did you mean 'area'\?\)",
        ),
    ],
)
def test_mistakes_are_named(write, text, message):
    with pytest.raises(Refused, match=message):
        from_config(write(text))


def test_every_key_of_sd_scripts_is_known(write, caplog):
    """§ the tables of its config schema: each key is read, or said to change nothing, or refused by name."""
    general = """
[general]
enable_bucket = true
min_bucket_reso = 128
max_bucket_reso = 1024
bucket_reso_steps = 32
bucket_no_upscale = false
network_multiplier = 1.0
validation_seed = 3
validation_split = 0.25
skip_image_resolution = [16, 8]
resize_interpolation = "bicubic"
num_repeats = 2
shuffle_caption = true
keep_tokens = 1
keep_tokens_separator = "|||"
secondary_separator = ";"
caption_separator = ","
enable_wildcard = true
caption_prefix = "p"
caption_suffix = "s"
token_warmup_min = 1
token_warmup_step = 2
color_aug = false
flip_aug = true
random_crop = false
caption_dropout_rate = 0
caption_dropout_every_n_epochs = 2
caption_tag_dropout_rate = 0.1
caption_extension = ".txt"
class_tokens = "cat"
alpha_mask = true
cache_info = true
custom_attributes = { a = 1 }
"""
    first, second = from_config(
        write(
            general
            + """
[[datasets]]
resolution = 512
batch_size = 2
[[datasets.subsets]]
image_dir = "a"
resize_interpolation = "area"
conditioning_data_dir = "b"
is_reg = false
[[datasets]]
resolution = [640, 512]
[[datasets.subsets]]
metadata_file = "b/meta.json"
"""
        )
    )
    assert (first.validation_split, first.validation_seed, first.skip_image_resolution) == (0.25, 3, (16, 8))
    (one,), (two,) = first.subsets, second.subsets
    assert (one.value("resize_interpolation"), two.value("resize_interpolation")) == ("area", "bicubic")
    assert (one.masks.conditioning_data_dir, two.metadata_file) == ("b", "b/meta.json")
    assert str(two.image_dir) == "b" and one.masks.alpha_mask and two.augmentation.flip_aug
    for key in ("network_multiplier", "cache_info"):
        assert f"{key} is ignored" in caplog.text
    assert "custom_attributes a has no effect; only diff_output_preservation is used" in caplog.text


def test_differential_output_preservation_of_a_subset(write, tmp_path):
    """In `custom_attributes`, as in sd-scripts, of one subset or of all in a dataset."""
    table = "custom_attributes = { diff_output_preservation = true }\n"
    (dataset,) = from_config(write("[[datasets]]" + SUBSETS + table))
    assert [subset.diff_output_preservation for subset in dataset.subsets] == [False, True]
    (dataset,) = from_config(write("[[datasets]]\n" + table + SUBSETS))
    assert [subset.diff_output_preservation for subset in dataset.subsets] == [True, True]
    with pytest.raises(Refused, match="custom_attributes is 3"):
        from_config(write("[[datasets]]\ncustom_attributes = 3\n" + SUBSETS))
    with pytest.raises(Refused, match="diff_output_preservation"):
        from_config(
            write("[[datasets]]" + SUBSETS + "custom_attributes = { diff_output_preservation = 7 }\n")
        )


def test_the_command_line_s_masks_are_for_training_images(write):
    (dataset,) = from_config(write("[[datasets]]" + SUBSETS), {"conditioning_data_dir": "b"})
    assert [subset.masks.conditioning_data_dir for subset in dataset.subsets] == ["b", None]


def test_bad_files(write, tmp_path):
    with pytest.raises(Refused, match=r"nothing\.toml does not exist"):
        from_config(tmp_path / "nothing.toml")
    with pytest.raises(Refused, match=r"data\.json is not JSON"):
        from_config(write("{", "data.json"))
    with pytest.raises(Refused, match="is a list at the top"):
        from_config(write("[]", "data.json"))
    (tmp_path / "data.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(Refused, match="not UTF-8"):
        from_config(tmp_path / "data.toml")


def test_unknown_keys_can_be_allowed_and_inert_ones_are_said(write, caplog):
    path = write(
        "[[datasets]]\nnetwork_multiplier = 1.0\n[[datasets.subsets]]\nimage_dir = 'a'\nnum_repeat = 2"
    )
    (dataset,) = from_config(path, allow_unknown=True)
    assert dataset.subsets[0].num_repeats == 1
    assert "'num_repeat' is ignored (did you mean 'num_repeats'?)" in caplog.text
    assert "network_multiplier is ignored" in caplog.text
