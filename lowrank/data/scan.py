"""The images of a dataset, with their sizes, captions and masks.

`scan` reads the head and the caption of each image once, in sorted order; no pixel is decoded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from lowrank.data import caption_files, images, metadata_file
from lowrank.data.captions import varies_tags
from lowrank.data.dataset import Dataset, Example, Subset, describe_content
from lowrank.data.plan import place_image
from lowrank.errors import Refused
from lowrank.files import existing_folder, read_text

log = logging.getLogger(__name__)
_SKIP = "or give --skip_bad_images"
# endings of pictures that no training reads; kohya's scripts leave them out without a word
_UNREAD = (
    *(".gif", ".tif", ".tiff", ".jfif", ".jpe", ".heic"),
    *(".heif", ".avif", ".jxl", ".psd", ".tga", ".ico"),
)
LIMIT = 1 << 20  # bytes of a caption file; encoders read a few hundred words of a caption


def _is_file(entry: os.DirEntry) -> bool:
    """True for a file, and for a broken link: opening the link later gives an error with its name."""
    return (entry.is_symlink() and not os.path.exists(entry)) or entry.is_file()


def scan(dataset: Dataset, *, skip_bad_images: bool = False) -> list[Example]:
    """Every image of every subset, in sorted order, with size, captions and mask.

    Sizes are those after the EXIF orientation. Other files are ignored, and images of at most the area of
    `skip_image_resolution` are left out. Raises `Refused` for a missing or empty folder and when no training
    image is left. A bad image is refused, or with `skip_bad_images` left out with a warning: two images of
    one stem, a head that cannot be read, a size that fits no bucket, a caption that is empty or not UTF-8, a
    mask that is missing or of another shape.
    """
    examples: list[Example] = []
    bad: list[str] = []
    scanned: set[str] = set()
    for index, subset in enumerate(dataset.subsets):
        place = os.path.realpath(subset.metadata_file or subset.image_dir)
        if place in scanned:
            key = "metadata_file" if subset.metadata_file else "image_dir"
            log.warning("%s %s is given twice in one dataset; the second is ignored", key, place)
            continue
        scanned.add(place)
        examples += _scan_subset(dataset, index, bad)
    report_bad(bad, skip=skip_bad_images)
    _warn_of_unused_masks(dataset, examples)
    if all(example.is_reg for example in examples):
        folders = ", ".join(str(subset.image_dir) for subset in dataset.subsets if not subset.is_reg)
        raise Refused(
            f"no training image is left in {folders or 'a dataset of regularisation folders only'}; "
            "give a folder with images that can be read"
        )
    return examples


def report_bad(reasons: Sequence[str], *, skip: bool) -> None:
    """Refuse with the first reason and the number of the others; with `skip`, log them all as warnings."""
    if reasons and not skip:
        more = f" ({len(reasons) - 1} more images have a problem)" if len(reasons) > 1 else ""
        raise Refused(reasons[0] + more)
    for reason in reasons:
        log.warning("skipped: %s", reason)


def _scan_subset(dataset: Dataset, index: int, bad: list[str]) -> list[Example]:
    subset, smallest = dataset.subsets[index], dataset.skip_image_resolution
    masks = _mask_files(subset)
    modes: dict[str, list[str]] = {}
    examples: list[Example] = []
    for path, known in metadata_file.entries(subset) if subset.metadata_file else _list_images(subset, bad):
        try:
            head = images.header(path)
            if smallest and head.size[0] * head.size[1] <= smallest[0] * smallest[1]:
                continue
            _check_place(path, head.size, dataset)
            captions = known or _read_captions(path, subset)
            mask = None if masks is None else _find_mask(path, head.size, masks, subset)
        except Refused as error:
            bad.append(str(error))
            continue
        modes.setdefault(head.mode, []).append(path.name)
        captioned = not known or subset.metadata_file is not None
        repeats, reg = subset.num_repeats, subset.is_reg
        examples.append(Example(path, captions, head.size, repeats, reg, index, mask, captioned))
    _log_surprises(subset, modes, examples)
    return examples


def _list_images(subset: Subset, bad: list[str]) -> list[metadata_file.Entry]:
    """The images of a folder, sorted; an image with a caption file has no captions yet.

    Hidden files (macOS' `._x.png`) are ignored.
    """
    folder, extension = subset.image_dir, subset.captions.caption_extension
    names = {entry.name for entry in os.scandir(existing_folder(folder, "image_dir")) if _is_file(entry)}
    image_names = _images(names)
    if not image_names:
        raise Refused(
            f"image_dir {folder} holds no image ({' '.join(sorted(images.suffixes()))}): "
            f"{describe_content(folder)}; put images there or give another folder"
        )
    foreign = sorted(name for name in names if name.endswith(".npz"))
    if foreign:
        log.info(
            "%s: %d .npz caches (first: %s) are not read, as they do not name their image and model; latents "
            "are encoded again",
            folder,
            len(foreign),
            foreign[0],
        )
    entries: list[metadata_file.Entry] = []
    missing: list[str] = []
    first: dict[str, str] = {}
    for name in image_names:
        stem = os.path.splitext(name)[0]
        if stem in first:
            bad.append(
                f"{folder / first[stem]} and {folder / name} have one stem and would share captions and "
                f"caches; rename or remove one, {_SKIP}"
            )
            continue
        first[stem] = name
        has_file = extension is not None and stem + extension in names
        entries.append((folder / name, () if has_file else (subset.class_tokens or "",)))
        if not has_file:
            missing.append(name)
    if extension is not None:
        caption_files.warn_of_missing(folder, extension, subset.class_tokens, missing, len(first), names)
    _warn_of_formats(folder, names)
    return entries


def _warn_of_formats(folder: Path, names: set[str]) -> None:
    """Name pictures in formats that are not read."""
    endings = [ending for ending in _UNREAD if ending not in images.suffixes()]
    unread = sorted(name for name in names if os.path.splitext(name)[1].lower() in endings)
    if unread:
        log.warning(
            "%s: %d pictures are left out, as their formats are not read: %s; save them as PNG, JPEG or WebP "
            "(a .jfif or .jpe file is a JPEG: rename it to .jpg)",
            folder,
            len(unread),
            caption_files.shorten(unread),
        )


def _images(names: set[str]) -> list[str]:
    known = images.suffixes()
    return sorted(
        name for name in names if not name.startswith(".") and os.path.splitext(name)[1].lower() in known
    )


def _check_place(path: Path, size: tuple[int, int], dataset: Dataset) -> None:
    try:
        place_image(size, dataset)
    except Refused as error:
        raise Refused(f"image {path}: {error}, {_SKIP}") from error


def _read_captions(path: Path, subset: Subset) -> tuple[str, ...]:
    file = path.with_name(path.stem + (subset.captions.caption_extension or ""))
    text = read_text(file, "caption file", LIMIT, "give --skip_bad_images")
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise Refused(
            f"caption file {file} is empty; write a caption, or remove the file to use the class tokens, "
            f"{_SKIP}"
        )
    return lines if subset.captions.enable_wildcard else lines[:1]


def _mask_files(subset: Subset) -> dict[str, Path] | None:
    """Mask files by stem, or None where the subset has no `conditioning_data_dir`.

    Where `conditioning_data_dir` has a subfolder of the image folder's name, the masks are in the subfolder,
    so that several image folders can share one `conditioning_data_dir`.
    """
    if subset.masks.conditioning_data_dir is None:
        return None
    folder = existing_folder(subset.masks.conditioning_data_dir, "conditioning_data_dir")
    if (folder / subset.image_dir.name).is_dir():
        folder /= subset.image_dir.name
    return {os.path.splitext(name)[0]: folder / name for name in reversed(_images(set(os.listdir(folder))))}


def _find_mask(path: Path, size: tuple[int, int], masks: dict[str, Path], subset: Subset) -> Path:
    mask = masks.get(path.stem)
    if mask is None:
        raise Refused(
            f"image {path} has no mask in conditioning_data_dir {subset.masks.conditioning_data_dir}; put "
            f"{path.stem}.png there, {_SKIP}"
        )
    width, height = images.header(mask).size
    if abs(width - height * size[0] / size[1]) > 1 and abs(height - width * size[1] / size[0]) > 1:
        raise Refused(
            f"mask {mask} is {width}x{height} and image {path} is {size[0]}x{size[1]}, which is another "
            f"shape; give a mask of the image's size, {_SKIP}"
        )
    return mask


def _warn_of_unused_masks(dataset: Dataset, examples: list[Example]) -> None:
    files = {path for subset in dataset.subsets for path in (_mask_files(subset) or {}).values()}
    unused = sorted(files - {example.mask for example in examples})
    if unused:
        log.warning("%d masks belong to no image; the first is %s", len(unused), unused[0])


def _log_surprises(subset: Subset, modes: dict[str, list[str]], examples: list[Example]) -> None:
    """Log what a user may not expect: converted pixels, empty captions, a separator without effect."""
    folder, mark = subset.image_dir, subset.captions.keep_tokens_separator
    transparent = [name for mode in ("RGBA", "LA", "PA", "La", "RGBa") for name in modes.get(mode, ())]
    if transparent and not subset.masks.alpha_mask:
        log.info(
            "%s: %d images have an alpha channel, which is dropped: transparent pixels show the colour "
            "that is stored under them (%s); give --alpha_mask to train only what is opaque",
            folder,
            len(transparent),
            caption_files.shorten(transparent),
        )
    for mode, names in modes.items():
        if mode == "CMYK" or mode == "I" or mode.startswith("I;16"):
            log.info(
                "%s: %d images are %s and become 8-bit RGB (first: %s)", folder, len(names), mode, names[0]
            )
    unnamed = [example.path.name for example in examples if example.captions == ("",)]
    if unnamed:
        log.warning(
            "%s: %d images have neither a %s file nor class_tokens; their caption is empty (first: %s)",
            folder,
            len(unnamed),
            subset.captions.caption_extension,
            unnamed[0],
        )
    marked = mark and any(mark in line for example in examples for line in example.captions)
    if marked and not varies_tags(subset.captions):
        log.warning(
            "%s: keep_tokens_separator %r has no effect without shuffle_caption, caption_tag_dropout_rate or "
            "token_warmup_step, and stays in the captions",
            folder,
            mark,
        )
