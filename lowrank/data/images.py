"""Image files to pixels: header, upright RGB, scaled crop, tensor. Only Pillow reads files.

The result is always 8-bit RGB, upright (the EXIF orientation is applied first): CMYK, grey, palette and
16-bit files are converted, 16-bit grey by value/257; of several frames the first is used; colour profiles are
not applied. Alpha is dropped, as in sd-scripts, so transparent pixels show the colour stored under them.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lowrank.data.buckets import Placement
from lowrank.errors import Refused
from lowrank.files import sha256

log = logging.getLogger(__name__)

_BROKEN = (  # what Pillow raises on damaged files of these formats (RuntimeError: AVIF)
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "AVIF", "JXL")
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {  # the transposition that undoes each of its values
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = frozenset(_UPRIGHT[value] for value in (5, 6, 7, 8))  # exchange width and height
_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "area": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "linear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "cubic": Image.Resampling.BICUBIC,
}


BEGINNING = 1 << 16  # bytes of an image that are hashed; with its size they distinguish it from others


class Header(NamedTuple):
    """Size (w, h) after the EXIF orientation, and Pillow's mode of the stored pixels."""

    size: tuple[int, int]
    mode: str


@functools.cache
def suffixes() -> frozenset[str]:
    """The lower-case file endings of images; .avif and .jxl only where this Pillow can read them."""
    return frozenset(
        {".png", ".jpg", ".jpeg", ".webp", ".bmp"} | ({".avif", ".jxl"} & set(Image.registered_extensions()))
    )


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


_WAY_OUT = "repair or remove it, or give --skip_bad_images"


def _refused(path: str | os.PathLike, error: BaseException, way_out: str = _WAY_OUT) -> Refused:
    reason = str(error).removesuffix(f" {os.fspath(path)!r}") or type(error).__name__
    return Refused(f"image {path} cannot be read ({reason}); {way_out}")


def _opened(path: str | os.PathLike) -> Image.Image:
    """The image with its head read. Raises OSError for a device or a pipe, which a metadata file can name."""
    if not os.path.isfile(path) and os.path.exists(path):
        raise OSError("it is not a regular file")
    return Image.open(path, formats=_known_formats())


def header(path: str | os.PathLike) -> Header:
    """Size and mode from the head of the file; no pixel is decoded. Raises `Refused` naming the file."""
    try:
        with _opened(path) as image:
            turned = _turn(image, path) in _SIDEWAYS
            return Header(image.size[::-1] if turned else image.size, image.mode)
    except _BROKEN as error:
        raise _refused(path, error) from error


def _turn(image: Image.Image, path: str | os.PathLike) -> Image.Transpose | None:
    """The transposition that makes the image upright, from its EXIF data; None for 1 and invalid values."""
    return _UPRIGHT.get(_orientation(image, path))


def _orientation(image: Image.Image, path: str | os.PathLike) -> int:
    if not any(name in image.info for name in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")):
        return 1
    try:  # the method of the base class: PNG's decodes the whole image to look for a late EXIF chunk
        return int(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except (*_BROKEN, TypeError, KeyError, IndexError) as error:
        log.warning("the EXIF data of %s is damaged (%s); the image is read without rotation", path, error)
        return 1


def read_image(path: str | os.PathLike, *, alpha: bool = False, way_out: str = _WAY_OUT) -> Image.Image:
    """The whole image, decoded and upright, as RGB, or RGBA with `alpha`.

    Raises `Refused` naming the file and the `way_out`, also when only its end is missing.
    """
    try:
        with _opened(path) as image:
            turn = _turn(image, path)
            image.load()
            converted = _converted(image, "RGBA" if alpha else "RGB")
    except _BROKEN as error:
        raise _refused(path, error, way_out) from error
    return converted if turn is None else converted.transpose(turn)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255: nearly everything white
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("PA", "La", "RGBa"):
        image = image.convert("RGBA")
    return image.convert(mode)


def render(
    image: Image.Image, where: Placement, box: tuple[int, int, int, int], interpolation: str | None
) -> Image.Image:
    """The part `box` of the image scaled to `where.resized`; the whole scaled image is never made.

    `interpolation` None is area averaging when shrinking and Lanczos when enlarging. Pillow's filters average
    when shrinking, so e.g. bilinear differs from that of OpenCV, which sd-scripts uses.
    """
    if where.resized == image.size:
        return image.crop(box)
    scale = image.size[0] / where.resized[0], image.size[1] / where.resized[1]
    left, top = box[0] * scale[0], box[1] * scale[1]
    right, bottom = min(box[2] * scale[0], image.size[0]), min(box[3] * scale[1], image.size[1])
    shrinks = where.resized[0] <= image.size[0] and where.resized[1] <= image.size[1]
    chosen = interpolation or ("area" if shrinks else "lanczos")
    return image.resize(where.bucket, _FILTERS[chosen], box=(left, top, right, bottom))


def jitter(image: Image.Image, rng: random.Random) -> Image.Image:
    """`color_aug`: with 33 % chance the hue turned by up to ±8/180 of the circle, or a gamma of 0.95–1.05."""
    if rng.random() > 0.33:
        return image
    if rng.random() > 0.5:
        turn = round(rng.uniform(-8, 8) / 180 * 256)
        hue, *others = image.convert("HSV").split()
        turned = hue.point([(value + turn) % 256 for value in range(256)])
        return Image.merge("HSV", (turned, *others)).convert("RGB")
    gamma = rng.uniform(0.95, 1.05)
    return image.point([round((value / 255) ** gamma * 255) for value in range(256)] * 3)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB or L as float32 (C, H, W); RGB in [-1, 1], L (a mask) in [0, 1]."""
    pixels = torch.from_numpy(np.array(image)).float().div_(255)
    return pixels[None] if image.mode == "L" else pixels.permute(2, 0, 1).mul(2).sub_(1).contiguous()


class Content(NamedTuple):
    """What distinguishes the content of an image file from others: its size and the hash of its beginning."""

    modified: int  # in ns: the content of a file with an equal time is not read again
    size: int
    beginning: str

    def differs(self, path: Path) -> bool:
        """Whether the file has other content now; False for one that was only touched."""
        facts = os.stat(path)
        if (facts.st_mtime_ns, facts.st_size) == self[:2]:
            return False
        return content_of(path)[1:] != self[1:]


def content_of(path: Path) -> Content:
    """The content of a file, as far as its size and its first 64 KiB tell: fast for 100,000 images."""
    facts = os.stat(path)
    return Content(facts.st_mtime_ns, facts.st_size, sha256(path, BEGINNING))


def load_image(
    path: Path,
    where: Placement,
    box: tuple[int, int, int, int],
    *,
    interpolation: str | None = None,
    flip: bool = False,
    color: random.Random | None = None,
    alpha: bool = False,
    mask_file: Path | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One placed image as pixels (3, H, W) in [-1, 1], and with `alpha` its mask (1, H, W) in [0, 1].

    `color` switches the colour jitter on; an image without alpha has a mask of ones. The mask is the red
    channel of `mask_file`, scaled to the image, where that is given, and the alpha channel otherwise. Raises
    `Refused` naming the file.
    """
    whole = read_image(path, alpha=alpha and mask_file is None)
    # colour and alpha are scaled apart: Pillow would blacken transparent pixels
    channel = read_image(mask_file).getchannel("R") if mask_file else whole.getchannel("A") if alpha else None
    mask = None if channel is None else to_tensor(render(channel, where, box, interpolation))
    image = render(whole.convert("RGB"), where, box, interpolation)
    pixels = to_tensor(jitter(image, color) if color else image)
    if flip:
        pixels, mask = pixels.flip(-1), None if mask is None else mask.flip(-1)
    return pixels, mask
