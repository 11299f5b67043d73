"""`--in_json`: both forms of a metadata file, and one sentence for each mistake."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from lowrank.data.dataset import from_metadata
from lowrank.data.loader import Loader
from lowrank.data.scan import scan
from lowrank.data.summary import dataset_dirs, metadata_datasets, tag_frequency
from lowrank.errors import Refused


@pytest.fixture
def folder(tmp_path):
    for name, size in (("a.png", (16, 12)), ("b.JPG", (8, 8)), ("unlisted.png", (8, 8))):
        (tmp_path / "img").mkdir(exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "img" / name)
    return tmp_path


def write(folder, content, name="meta.json"):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / name


def read(folder, content, name="meta.json", **values):
    (dataset,) = from_metadata(write(folder, content, name), folder / "img", **values)
    return {one.path.name: one.captions for one in scan(dataset)}


def test_captions_and_tags_by_name_stem_or_absolute_path(folder):
    absolute = str(folder / "img" / "a.png")
    found = read(
        folder, {"b": {"tags": "x, y"}, absolute: {"caption": "a cat", "tags": "z", "image_size": [1, 1]}}
    )
    assert found == {"a.png": ("a cat,z",), "b.JPG": ("x, y",)}
    (dataset,) = from_metadata(folder / "meta.json", folder / "img", num_repeats=3, keep_tokens=None)
    assert [(one.size, one.repeats) for one in scan(dataset)] == [
        ((16, 12), 3),
        ((8, 8), 3),
    ]  # the true sizes


def test_lines_of_json(folder):
    lines = ['{"image_path": "a.png", "caption": "ü"}', "", '{"image_path": "b.JPG", "tags": "t"}']
    assert read(folder, "\n".join(lines), "meta.JSONL") == {"a.png": ("ü",), "b.JPG": ("t",)}


def test_wildcards_put_the_tags_behind_every_line(folder):
    entry = {"a.png": {"caption": "one\n\ntwo", "tags": "x"}}
    assert read(folder, entry, enable_wildcard=True) == {"a.png": ("one,x", "two,x")}
    assert read(folder, entry) == {"a.png": ("one,x",)}


def test_without_an_image_folder_names_start_at_the_file(folder):
    (dataset,) = from_metadata(write(folder, {"img/a.png": {"caption": "c"}}))
    assert [one.captions for one in scan(dataset)] == [("c",)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"meta\.json is not JSON: .*; correct"),
        ("[]", r"meta\.json is a list at the top"),
        ("{}", r"meta\.json names no image"),
        ({"a.png": "a cat"}, r"entry 'a\.png' is 'a cat', not an object"),
        ({"a.png": {"caption": ["a"]}}, r"caption of 'a\.png' is \['a'\], not a text"),
        ({"a.png": {"tags": 3}}, r"tags of 'a\.png' is 3, not a text"),
        ({"gone.png": {"caption": "x"}}, r"image .*gone\.png cannot be read"),
        ({"gone": {"caption": "x"}}, r"image .*gone cannot be read"),
    ],
)
def test_mistakes_are_named(folder, content, message):
    with pytest.raises(Refused, match=message):
        read(folder, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image_path": "a.png"}\n{', r"meta\.jsonl, line 2 is not JSON"),
        ('{"caption": "x"}', r"meta\.jsonl, line 1: 'image_path' is missing"),
        ("3", r"meta\.jsonl, line 1: 'image_path' is missing"),
    ],
)
def test_mistakes_in_lines_are_named(folder, content, message):
    with pytest.raises(Refused, match=message):
        read(folder, content, "meta.jsonl")


def test_files_that_cannot_be_read(folder):
    with pytest.raises(Refused, match=r"metadata_file .*none\.json does not exist .*correct the path"):
        scan(from_metadata(folder / "none.json", folder / "img")[0])
    (folder / "x.json").write_bytes('{"a.png": {"caption": "für"}}'.encode("latin-1"))
    with pytest.raises(Refused, match=r"metadata_file .*x\.json is not UTF-8 .*save it as UTF-8"):
        scan(from_metadata(folder / "x.json", folder / "img")[0])
    with pytest.raises(Refused, match=r"train_data_dir .*nowhere does not exist"):
        from_metadata(folder / "x.json", folder / "nowhere")


def test_kohya_s_metadata_names_the_file(folder):
    file = write(folder, {"a.png": {"tags": "x, y"}})
    made = Loader(from_metadata(file, folder / "img", resolution=16), seed=0)
    assert tag_frequency(made) == {"meta.json": {"x": 1, "y": 1}}
    assert dataset_dirs(made) == {"meta.json": {"n_repeats": 1, "img_count": 1}}
    (told,) = metadata_datasets(made)
    assert told["is_dreambooth"] is False and told["subsets"][0]["metadata_file"] == "meta.json"
    assert told["subsets"][0]["image_dir"] == "img" and "is_reg" not in told["subsets"][0]
