"""Every mistake in a data folder is one sentence that names the file; `skip_bad_images` goes on without."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from lowrank.data.cache import Cache
from lowrank.data.dataset import from_folders
from lowrank.data.loader import Loader
from lowrank.errors import Refused

VALUES = {"resolution": 64, "caption_extension": ".txt"}


def image(path, size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 90).convert("RGB").save(path)
    return path


def average(pixels):
    """A stand-in for the VAE: (B, 3, H, W) to (B, 3, H/8, W/8)."""
    return torch.nn.functional.avg_pool2d(pixels, 8)


def truncated(folder):
    path = image(folder / "bad.png")
    path.write_bytes(path.read_bytes()[:-2000])


def other_encoding(folder):
    image(folder / "bad.png").with_suffix(".txt").write_bytes("für".encode("cp1252"))


def utf_16(folder):
    image(folder / "bad.png").with_suffix(".txt").write_bytes("a cat".encode("utf-16"))


def empty_caption(folder):
    image(folder / "bad.png").with_suffix(".txt").write_text("\n \n")


def same_stem(folder):
    image(folder / "good.webp")


def no_image(folder):
    (folder / "bad.png").write_bytes(b"<html>404</html>")


def sliver(folder):
    image(folder / "bad.png", (1, 5000))


MISTAKES = [
    (
        truncated,
        {},
        r"image \S+bad\.png cannot be read \(.+\); repair or remove it, or give --skip_bad_images",
    ),
    (
        other_encoding,
        {},
        r"caption file \S+bad\.txt is not UTF-8 \(byte 1.*\); save it as UTF-8, or give --skip_bad",
    ),
    (utf_16, {}, r"caption file \S+bad\.txt is not UTF-8"),
    (empty_caption, {}, r"caption file \S+bad\.txt is empty; write a caption, .*or give --skip_bad_images"),
    (
        same_stem,
        {},
        r"\S+good\.png and \S+good\.webp have one stem .*; rename or remove one, or give --skip_bad",
    ),
    (no_image, {}, r"image \S+bad\.png cannot be read"),
    (
        sliver,
        {"enable_bucket": True, "bucket_no_upscale": True, "bucket_reso_steps": 8},
        r"image \S+bad\.png: size 1x5000 leaves a side below bucket_reso_steps 8.*, or give --skip_bad",
    ),
]


@pytest.mark.parametrize(("spoil", "values", "message"), MISTAKES, ids=[row[0].__name__ for row in MISTAKES])
def test_a_mistake_is_one_sentence_and_can_be_skipped(tmp_path, caplog, spoil, values, message):
    folder = tmp_path / "10_cat"
    image(folder / "good.png").with_suffix(".txt").write_text("a cat")
    spoil(folder)
    datasets = from_folders(tmp_path, **(VALUES | values))
    with pytest.raises(Refused) as refused:
        Loader(datasets, seed=0).encode_all(average, model_hash="m", cache=Cache())
    told = str(refused.value)
    assert re.match(message, told) and "\n" not in told and "Errno" not in told
    made = Loader(datasets, seed=0, skip_bad_images=True).encode_all(average, model_hash="m", cache=Cache())
    assert {one.example.path.name for one in made.placed} == {"good.png"}
    assert f"skipped: {told}" in caplog.text
    assert next(made.epoch(0)).encoded.shape == (1, 3, 8, 8)


def test_class_folder_as_train_data_dir_advises_its_parent(tmp_path):
    image(tmp_path / "10_cat" / "a.png")
    with pytest.raises(Refused) as refused:
        from_folders(tmp_path / "10_cat")
    assert str(refused.value).endswith(f"give the folder that holds it: --train_data_dir {tmp_path}")


def test_a_folder_without_a_number_is_said_and_alone_is_refused(tmp_path, caplog):
    image(tmp_path / "cat" / "a.png")
    with pytest.raises(Refused, match=r"has no subfolder named <repeats>_<class>: .*; move the images into"):
        from_folders(tmp_path)
    assert "folder 'cat' is skipped: its name must begin with a number of repeats" in caplog.text
    image(tmp_path / "3" / "a.png")  # kohya takes a number alone
    (dataset,) = from_folders(tmp_path)
    assert [(subset.num_repeats, subset.class_tokens) for subset in dataset.subsets] == [(3, "")]


def test_unusual_images_are_read_and_said(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "1_cat"
    image(folder / "tall.png", (1, 5000))
    Image.effect_noise((64, 64), 90).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.linspace(0, 65535, 4096).reshape(64, 64).astype(np.uint16)).save(folder / "deep.png")
    made = Loader(from_folders(tmp_path, **VALUES), seed=0)
    assert all(torch.isfinite(batch.pixels).all() for batch in made.epoch(0))
    assert "1 images are CMYK and become 8-bit RGB (first: cmyk.jpg)" in caplog.text
    assert "1 images are I;16 and become 8-bit RGB (first: deep.png)" in caplog.text
    assert "lose more than half" in caplog.text and "tall.png, 1x5000" in caplog.text


def test_caches_of_another_model_or_program_are_not_used_and_said(tmp_path, caplog):
    caplog.set_level("INFO")
    folder, cache = tmp_path / "data" / "1_cat", Cache(tmp_path / "cache")
    image(folder / "a.png")
    np.savez(folder / "a_0064x0064_sd.npz", latents=np.zeros((4, 8, 8)))
    datasets = from_folders(tmp_path / "data", **VALUES)
    first = Loader(datasets, seed=0).encode_all(average, model_hash="one", cache=cache)
    assert "1 .npz caches (first: a_0064x0064_sd.npz) are not read" in caplog.text
    other = Loader(datasets, seed=0).encode_all(lambda x: -average(x), model_hash="two", cache=cache)
    assert torch.equal(next(first.epoch(0)).encoded, -next(other.epoch(0)).encoded)
    mine, theirs = sorted((tmp_path / "cache").iterdir())
    theirs.replace(mine)  # renamed by hand: the file knows whose it is
    Loader(datasets, seed=0).encode_all(average, model_hash="one", cache=cache)
    Loader(datasets, seed=0).encode_all(lambda x: -average(x), model_hash="two", cache=cache)
    assert f"cache file {mine} belongs to another model or image and is made again" in caplog.text


def masked(tmp_path, **values):
    image(tmp_path / "img" / "2_cat" / "a.png"), image(tmp_path / "masks" / "a.png")
    image(tmp_path / "img" / "2_cat" / "b.png"), image(tmp_path / "masks" / "b.jpg")
    return from_folders(tmp_path / "img", conditioning_data_dir=tmp_path / "masks", **(VALUES | values))


def without(tmp_path):
    (tmp_path / "masks" / "b.jpg").unlink()


def misshapen(tmp_path):
    image(tmp_path / "masks" / "b.jpg", (64, 32))


def unreadable(tmp_path):
    (tmp_path / "masks" / "b.jpg").write_bytes(b"x")


def cut(tmp_path):
    path = tmp_path / "masks" / "b.jpg"
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            without,
            r"image \S+b\.png has no mask in conditioning_data_dir \S+masks; put b\.png there, or give",
        ),
        (
            misshapen,
            r"mask \S+b\.jpg is 64x32 and image \S+b\.png is 64x64, .* give a mask of the image's size",
        ),
        (unreadable, r"image \S+masks/b\.jpg cannot be read"),
        (cut, r"image \S+masks/b\.jpg cannot be read"),
    ],
)
@pytest.mark.parametrize("cached", [True, False])
def test_a_bad_mask_is_one_sentence_and_can_be_skipped(tmp_path, caplog, spoil, message, cached):
    datasets = masked(tmp_path)
    spoil(tmp_path)

    def load(**values):
        made = Loader(datasets, seed=0, **values)
        return made.encode_all(average, model_hash="m", cache=Cache()) if cached else made.decodable()

    with pytest.raises(Refused, match=message):
        load()
    made = load(skip_bad_images=True)
    assert {one.example.path.name for one in made.placed} == {"a.png"} and "skipped: " in caplog.text


def test_masks_without_images_and_a_missing_mask_folder_are_said(tmp_path, caplog):
    datasets = masked(tmp_path)
    image(tmp_path / "masks" / "c.png")
    Loader(datasets, seed=0)
    assert re.search(r"1 masks belong to no image; the first is \S+c\.png", caplog.text)
    (dataset,) = from_folders(tmp_path / "img", conditioning_data_dir=tmp_path / "none")
    with pytest.raises(Refused, match=r"conditioning_data_dir .*none does not exist"):
        Loader([dataset], seed=0)
