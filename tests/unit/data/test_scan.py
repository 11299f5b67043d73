"""Folders to examples: conventions, order, and one sentence for each mistake."""

from __future__ import annotations

import time

import pytest
from PIL import Image

from lowrank.data.dataset import (
    Dataset,
    Subset,
    from_folders,
    from_instance,
    make_subset,
    parse_resolution,
)
from lowrank.data.scan import scan
from lowrank.errors import Refused


def save(path, size=(16, 12), color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def test_instance_folder_gives_every_image_the_prompt(tmp_path):
    for name in ("b.png", "a.JPG", "c.webp"):
        save(tmp_path / name)
    (tmp_path / "a.txt").write_text("its own caption")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "._b.png").write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    (dataset,) = from_instance(tmp_path, "a <s> cat", repeats=3, resolution="64,32", batch_size=2)
    assert dataset.resolution == (64, 32) and dataset.batch_size == 2
    found = scan(dataset)
    assert [one.path.name for one in found] == ["a.JPG", "b.png", "c.webp"]
    assert {one.captions for one in found} == {("a <s> cat",)}
    assert {(one.size, one.repeats, one.is_reg, one.subset) for one in found} == {((16, 12), 3, False, 0)}


def test_instance_captions_win_only_when_asked_for(tmp_path):
    save(tmp_path / "a.png"), save(tmp_path / "b.png")
    (tmp_path / "a.txt").write_bytes("\ufeffder Bär\nzweite Zeile\n".encode())
    (dataset,) = from_instance(tmp_path, "prompt", caption_extension=".txt")
    assert [one.captions for one in scan(dataset)] == [("der Bär",), ("prompt",)]
    (dataset,) = from_instance(tmp_path, "prompt", caption_extension=".txt", enable_wildcard=True)
    assert scan(dataset)[0].captions == ("der Bär", "zweite Zeile")


def test_captions_of_another_ending_are_told(tmp_path, caplog):
    """kohya's default ending is .caption, and most people's files are .txt."""
    for name in ("a", "b", "c"):
        save(tmp_path / "10_cat" / f"{name}.png")
    (tmp_path / "10_cat" / "a.txt").write_text("a cat, sitting")
    (tmp_path / "10_cat" / "b.txt").write_text("a cat, asleep")
    (tmp_path / "10_cat" / "b.caption").write_text("a cat")
    (dataset,) = from_folders(tmp_path)
    assert [one.captions for one in scan(dataset)] == [("cat",), ("a cat",), ("cat",)]
    assert "1 images have a caption file that is not read (first: a.txt)" in caplog.text
    assert "give --caption_extension .txt" in caplog.text
    caplog.clear()
    (dataset,) = from_folders(tmp_path, caption_extension=".txt")
    scan(dataset)
    assert "1 of 3 images have no .txt file" in caplog.text and "is not read" not in caplog.text


def test_missing_captions_are_named_with_their_reason(tmp_path, caplog):
    for index in range(5):
        save(tmp_path / "10_cat" / f"{index}.png")
    for name in ("0.txt", "1.TXT", "2.png.txt", "3.caption"):
        (tmp_path / "10_cat" / name).write_text("a cat")
    (dataset,) = from_folders(tmp_path, caption_extension=".txt")
    examples = scan(dataset)
    assert [(example.captions, example.captioned) for example in examples] == [
        (("a cat",), True),
        *[(("cat",), False)] * 4,
    ]
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    message = record.getMessage()
    assert "4 of 5 images have no .txt file and train on 'cat': 1.png, 2.png, 3.png, 4.png" in message
    assert "1.TXT differ in capitals: rename them to end in .txt" in message
    assert "2.png.txt have the image's ending" in message and "the first to 2.txt" in message
    assert "(first: 3.caption)" in message and "give --caption_extension .caption" in message


def test_folder_without_any_caption_is_no_warning(tmp_path, caplog):
    for index in range(7):
        save(tmp_path / "10_cat" / f"{index}.png")
    caplog.set_level("INFO")
    scan(*from_folders(tmp_path, caption_extension=".txt"))
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "7 of 7 images have no .txt file and train on 'cat': 0.png, 1.png" in caplog.text
    assert "4.png and 2 more" in caplog.text


def test_unread_formats_and_transparent_pictures_are_named(tmp_path, caplog):
    folder = tmp_path / "1_cat"
    save(folder / "a.png")
    Image.new("RGBA", (16, 16)).save(folder / "b.png")
    for name in ("c.gif", "d.tif", "e.JFIF", "notes.txt"):
        (folder / name).write_bytes(b"x")
    caplog.set_level("INFO")
    (dataset,) = from_folders(tmp_path)
    assert len(scan(dataset)) == 2
    assert "3 pictures are left out, as their formats are not read: c.gif, d.tif, e.JFIF" in caplog.text
    assert "1 images have an alpha channel, which is dropped" in caplog.text and "(b.png)" in caplog.text
    caplog.clear()
    scan(*from_folders(tmp_path, alpha_mask=True))
    assert "alpha channel" not in caplog.text


def test_class_images_are_regularisation_images(tmp_path):
    save(tmp_path / "own" / "a.png"), save(tmp_path / "class" / "b.png")
    (dataset,) = from_instance(tmp_path / "own", "a sks dog", tmp_path / "class", "a dog", repeats=4)
    assert [(one.captions, one.is_reg, one.repeats) for one in scan(dataset)] == [
        (("a sks dog",), False, 4),
        (("a dog",), True, 1),
    ]
    with pytest.raises(Refused, match="--class_prompt"):
        from_instance(tmp_path / "own", "a sks dog", tmp_path / "class")
    with pytest.raises(Refused, match="--instance_prompt"):
        from_instance(tmp_path / "own", None)


def test_counted_folders(tmp_path, caplog):
    save(tmp_path / "img" / "10_sks dog" / "a.png"), save(tmp_path / "img" / "2_cat" / "b.png")
    save(tmp_path / "img" / "notes" / "c.png"), save(tmp_path / "img" / "0_off" / "d.png")
    save(tmp_path / "reg" / "1_dog" / "e.png")
    (tmp_path / "img" / "10_sks dog" / "a.caption").write_text("written")
    (dataset,) = from_folders(tmp_path / "img", tmp_path / "reg", flip_aug=True, num_repeats=7)
    assert [(one.path.name, one.captions[0], one.repeats, one.is_reg) for one in scan(dataset)] == [
        ("a.png", "written", 10, False),
        ("b.png", "cat", 2, False),
        ("e.png", "dog", 1, True),
    ]
    assert all(subset.augmentation.flip_aug for subset in dataset.subsets)
    assert "'notes' is skipped" in caplog.text and "'0_off' is skipped" in caplog.text


def test_loose_images_in_a_train_data_dir(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(
        Refused, match=r"train_data_dir .*<repeats>_<class>: only 1 images directly in it; move .*10_"
    ):
        from_folders(tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: from_folders(path),
        lambda path: from_instance(path, "x"),
        lambda path: scan(Dataset((Subset(path),))),
    ],
)
def test_a_missing_folder_is_named(tmp_path, make):
    with pytest.raises(
        Refused, match=r"(train_data_dir|instance_data_dir|image_dir) .*nowhere does not exist"
    ):
        make(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(Refused, match="is a file, not a folder"):
        make(tmp_path / "file")


def test_an_empty_folder_says_what_it_found_instead(tmp_path):
    (dataset,) = from_instance(tmp_path, "x")
    with pytest.raises(Refused, match=r"no image .*it is empty"):
        scan(dataset)
    (tmp_path / "a.txt").write_text("x"), (tmp_path / "b.txt").write_text("x"), (tmp_path / "sub").mkdir()
    with pytest.raises(Refused, match=r"no image .*only 2 \.txt files, 1 folder"):
        scan(dataset)


@pytest.mark.parametrize("goal", ["nowhere.png", "b.png"])  # a link to nothing, a link to itself
def test_a_broken_link_is_a_bad_image(tmp_path, goal):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / goal)
    (dataset,) = from_instance(tmp_path, "x")
    with pytest.raises(Refused, match=r"image .*b\.png cannot be read"):
        scan(dataset)
    assert len(scan(dataset, skip_bad_images=True)) == 1


def test_a_loop_of_links_is_no_folder(tmp_path):
    (tmp_path / "10_loop").symlink_to(tmp_path / "10_loop")
    (tmp_path / "0_cat").mkdir()
    with pytest.raises(Refused, match="has no subfolder named"):
        from_folders(tmp_path)


def test_small_images_are_left_out_by_area(tmp_path):
    save(tmp_path / "a.png", (16, 16)), save(tmp_path / "b.png", (8, 32)), save(tmp_path / "c.png", (17, 16))
    (dataset,) = from_instance(tmp_path, "x", skip_image_resolution="16")
    assert [one.path.name for one in scan(dataset)] == ["c.png"]  # at most 256 pixels: kohya's ≤


def test_too_many_repeats_are_refused(tmp_path):
    (tmp_path / "99999999999999999999_cat").mkdir()
    with pytest.raises(Refused, match=r"num_repeats 9{20} .* is above 1000000"):
        from_folders(tmp_path)


def test_a_bad_image_is_refused_or_skipped_and_listed(tmp_path, caplog):
    save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"not an image")
    (tmp_path / "c.png").write_bytes(b"")
    (dataset,) = from_instance(tmp_path, "x")
    with pytest.raises(Refused, match=r"b\.png .*--skip_bad_images \(1 more images have a problem\)"):
        scan(dataset)
    assert [one.path.name for one in scan(dataset, skip_bad_images=True)] == ["a.png"]
    assert "b.png" in caplog.text and "c.png" in caplog.text
    (tmp_path / "a.png").unlink()
    with pytest.raises(Refused, match="no training image is left"):
        scan(dataset, skip_bad_images=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("für".encode("latin-1"), r"a\.txt is not UTF-8"),
        ("cat".encode("utf-16"), r"a\.txt is not UTF-8"),
        (b"", r"a\.txt is empty"),
        (b" \n\t\n", r"a\.txt is empty"),
    ],
)
def test_a_bad_caption_file_is_named(tmp_path, content, message):
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(content)
    (dataset,) = from_instance(tmp_path, "x", caption_extension=".txt")
    with pytest.raises(Refused, match=message):
        scan(dataset)


def test_two_images_of_one_stem_are_refused(tmp_path):
    save(tmp_path / "a.png"), save(tmp_path / "a.jpg")
    with pytest.raises(Refused, match=r"a\.jpg and .*a\.png have one stem"):
        scan(from_instance(tmp_path, "x")[0])


def test_an_image_that_fits_no_bucket_is_named(tmp_path, caplog):
    save(tmp_path / "a.png", (64, 64)), save(tmp_path / "thin.png", (1, 500))
    (dataset,) = from_instance(tmp_path, "x", enable_bucket=True, bucket_no_upscale=True)
    with pytest.raises(Refused, match=r"thin\.png: size 1x500 .*--skip_bad_images"):
        scan(dataset)
    assert len(scan(dataset, skip_bad_images=True)) == 1


def test_what_a_user_may_not_expect_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    Image.new("CMYK", (8, 8)).save(tmp_path / "a.jpg")
    (dataset,) = from_instance(tmp_path, "x ||| y", keep_tokens_separator="|||")
    scan(dataset)
    assert "1 images are CMYK" in caplog.text and "keep_tokens_separator '|||' has no effect" in caplog.text
    scan(Dataset((Subset(tmp_path), Subset(tmp_path))))
    assert "caption is empty" in caplog.text and "given twice" in caplog.text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (512, (512, 512)),
        ("512", (512, 512)),
        ("768, 512", (768, 512)),
        ((64, 32), (64, 32)),
        ([64, 32], (64, 32)),
    ],
)
def test_resolutions(value, expected):
    assert parse_resolution(value) == expected


@pytest.mark.parametrize("value", ["a", "512x512", "1,2,3", "", 1.5j, "0"])
def test_bad_resolutions(value, tmp_path):
    with pytest.raises(Refused, match="resolution"):
        Dataset((), resolution=parse_resolution(value))


def test_bad_values_are_refused_and_unknown_names_are_errors(tmp_path):
    for values in (
        {"caption_dropout_rate": 1.5},
        {"num_repeats": 0},
        {"keep_tokens": -1},
        {"caption_separator": ""},
    ):
        with pytest.raises(Refused, match=next(iter(values))):
            make_subset(tmp_path, values)
    save(tmp_path / "a.png")
    (dataset,) = from_instance(tmp_path, "x", resolution=None, keep_tokens=None)
    assert dataset == Dataset(dataset.subsets) and dataset.subsets[0].captions.keep_tokens == 0
    with pytest.raises(TypeError, match="did you mean 'flip_aug'"):
        from_instance(tmp_path, "x", flip_aut=True)


def test_scanning_is_fast(tmp_path):
    content = save(tmp_path / "0.png").read_bytes()
    for index in range(1, 2000):
        (tmp_path / f"{index}.png").write_bytes(content)
        (tmp_path / f"{index}.txt").write_text("a cat")
    (dataset,) = from_instance(tmp_path, "x", caption_extension=".txt", enable_bucket=True)
    start = time.process_time()
    assert len(scan(dataset)) == 2000
    assert time.process_time() - start < 60 * 2000 / 100_000  # the rate of 100,000 files in a minute
