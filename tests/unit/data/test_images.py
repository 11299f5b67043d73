"""Every kind of image file becomes the same upright RGB pixels, or is named."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from PIL import Image

from lowrank.data import images
from lowrank.data.buckets import Placement, cover, crop_box
from lowrank.data.encode import undecodable
from lowrank.errors import Refused


def picture(width=24, height=16):
    """A smooth picture without symmetry: red grows to the right, green downwards, blue where both do."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, x * y / 255], -1).round().astype(np.uint8))


def apart(one, two):
    """Largest difference of two images in 8-bit steps."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(two).astype(int)).max())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = picture()
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x{suffix}"
    stored.save(path, exif=exif, quality=100, **({"lossless": True} if suffix == ".webp" else {}))
    assert images.header(path).size == upright.size
    assert apart(images.read_image(path), upright) <= (
        16 if suffix == ".jpg" else 0
    )  # chroma is subsampled in JPEG


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_invalid_exif_orientation_is_ignored_by_header_and_pixels(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(tmp_path / "x.jpg", exif=exif, quality=100)
    assert images.header(tmp_path / "x.jpg").size == images.read_image(tmp_path / "x.jpg").size == (24, 16)


def test_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    for read in (images.header, images.read_image):
        with pytest.raises(Refused, match="not a regular file"):
            read(tmp_path / "x.png")


def test_damaged_exif_is_said_and_taken_as_upright(tmp_path, caplog):
    path = tmp_path / "x.png"
    picture().save(path, exif=b"Exif\x00\x00not a TIFF head")
    assert images.header(path).size == (24, 16)
    assert "EXIF" in caplog.text


def test_palette_grey_alpha_and_cmyk_become_rgb(tmp_path):
    grey = picture().convert("L")
    for mode in ("L", "LA", "1", "P", "RGBA"):
        path = tmp_path / f"{mode}.png"
        source = grey.convert(mode) if mode != "RGBA" else picture().convert("RGBA")
        source.save(path)
        assert images.header(path).mode in (mode, "L", "LA")
        assert images.read_image(path).mode == "RGB"
        assert apart(images.read_image(path), source.convert("RGB")) == 0
    path = tmp_path / "cmyk.jpg"
    picture().convert("CMYK").save(path, quality=100, subsampling=0)
    assert images.header(path).mode == "CMYK"
    assert apart(images.read_image(path), picture()) <= 4


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path):
    values = np.linspace(0, 65535, 24 * 16).reshape(16, 24).astype(np.uint16)
    path = tmp_path / "x.png"
    Image.fromarray(values).save(path)
    assert images.header(path).mode.startswith("I")
    assert apart(images.read_image(path).getchannel(0), (values // 257).astype(np.uint8)) == 0


def test_palette_with_transparency_keeps_colours_and_gives_a_mask(tmp_path):
    source = picture().quantize(16)
    path = tmp_path / "x.png"
    source.save(path, transparency=bytes([0] * 8 + [255] * 8))
    assert apart(images.read_image(path), source.convert("RGB")) == 0
    alpha = np.asarray(images.read_image(path, alpha=True).getchannel("A"))
    assert np.array_equal(alpha, np.where(np.asarray(source) < 8, 0, 255))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_a_file_without_its_end_is_named_when_decoded(tmp_path, suffix):
    path, good = tmp_path / f"cut{suffix}", tmp_path / f"good{suffix}"
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    noise.save(good)
    path.write_bytes(good.read_bytes()[: -len(good.read_bytes()) // 3])
    with pytest.raises(Refused, match=rf"cut\{suffix} cannot be read .*--skip_bad_images"):
        images.read_image(path)
    assert list(undecodable([(good, None), (path, None)])) == [path]
    found = undecodable([(good, good), (good, path)])
    assert list(found) == [good] and f"cut{suffix}" in found[good]  # the image goes with its mask


def test_what_is_no_image_is_named(tmp_path):
    path = tmp_path / "x.png"
    for content in (b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        path.write_bytes(content)
        with pytest.raises(Refused, match=r"x\.png cannot be read"):
            images.header(path)


@pytest.mark.parametrize("size", [(200, 90), (30, 40), (64, 48), (48, 64)])
@pytest.mark.parametrize("name", [None, "lanczos", "bicubic", "area"])
def test_render_is_resize_then_crop(size, name):
    image = Image.effect_noise(size, 15).convert(
        "RGB"
    )  # low contrast: no overshoot is clipped between the passes
    where = Placement((40, 24), cover(size, (40, 24)))
    if name == "area" and where.resized > size:
        return  # enlarging by area takes the nearest pixel, and a tie may fall to either side
    if name is None:
        chosen = Image.Resampling.BOX if where.resized[0] <= size[0] else Image.Resampling.LANCZOS
    else:
        chosen = {
            "lanczos": Image.Resampling.LANCZOS,
            "bicubic": Image.Resampling.BICUBIC,
            "area": Image.Resampling.BOX,
        }[name]
    for box in (crop_box(where), crop_box(where, random.Random(1))):
        expected = image.resize(where.resized, chosen).crop(box)
        found = images.render(image, where, box, name)
        assert found.size == (40, 24)
        assert apart(found, expected) <= 1  # rounding of the crop's edge


def test_a_sliver_needs_no_memory():
    where = Placement((256, 2048), cover((1, 5000), (256, 2048)))
    assert where.resized == (256, 1280000)
    assert images.render(Image.new("RGB", (1, 5000)), where, crop_box(where), None).size == (256, 2048)


def test_pixels_range_flip_and_mask(tmp_path):
    path = tmp_path / "x.png"
    image = picture(8, 8)
    alpha = Image.fromarray(np.full((8, 8), [0, 0, 0, 0, 255, 255, 255, 255], np.uint8))
    image.putalpha(alpha)
    image.save(path)
    where = Placement((8, 8), (8, 8))
    pixels, mask = images.load_image(path, where, (0, 0, 8, 8), alpha=True)
    assert pixels.shape == (3, 8, 8) and mask.shape == (1, 8, 8)
    assert pixels.amin() == -1 and pixels.amax() == 1
    assert torch.equal(pixels[0, 0], (torch.linspace(0, 255, 8).round() / 255) * 2 - 1)
    assert mask[0, 0].tolist() == [0] * 4 + [1] * 4
    flipped, flipped_mask = images.load_image(path, where, (0, 0, 8, 8), alpha=True, flip=True)
    assert torch.equal(flipped, pixels.flip(-1)) and torch.equal(flipped_mask, mask.flip(-1))
    assert images.load_image(path, where, (0, 0, 8, 8))[1] is None


def test_a_mask_file_is_laid_over_the_whole_image_and_goes_with_its_crop(tmp_path):
    path, mask_file = tmp_path / "x.png", tmp_path / "mask.png"
    Image.new("RGBA", (32, 16), (9, 9, 9, 0)).save(path)
    red = np.zeros((8, 16, 3), np.uint8)  # half the image's size: its left quarter counts, by red alone
    red[:, :4, 0], red[..., 1] = 255, 77
    Image.fromarray(red).save(mask_file)
    where, box = Placement((16, 16), (32, 16)), (4, 0, 20, 16)
    pixels, mask = images.load_image(
        path, where, box, alpha=True, mask_file=mask_file, interpolation="nearest"
    )
    assert pixels.shape == (3, 16, 16) and mask.shape == (1, 16, 16)
    assert mask[0].tolist() == [[1.0] * 4 + [0.0] * 12] * 16
    flipped = images.load_image(path, where, box, mask_file=mask_file, flip=True, interpolation="nearest")
    assert torch.equal(flipped[1], mask.flip(-1))


def test_transparent_pixels_keep_their_colour_when_scaled(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGBA", (16, 16), (200, 100, 50, 0)).save(path)
    pixels, mask = images.load_image(path, Placement((8, 8), (8, 8)), (0, 0, 8, 8), alpha=True)
    assert mask.sum() == 0
    assert torch.allclose((pixels[:, 0, 0] + 1) / 2 * 255, torch.tensor([200.0, 100.0, 50.0]), atol=1e-4)


def test_jitter_is_rare_small_and_repeatable():
    image = picture()
    changed = [images.jitter(image, random.Random(i)) for i in range(300)]
    distances = [apart(one, image) for one in changed]
    assert 60 < sum(distance > 0 for distance in distances) < 140
    assert all(one.mode == "RGB" for one in changed)
    mean = [np.abs(np.asarray(one).astype(int) - np.asarray(image).astype(int)).mean() for one in changed]
    assert max(mean) < 16
    assert apart(images.jitter(image, random.Random(5)), changed[5]) == 0
