"""A dataset to examples: which images there are, how large they are and what they are called.

`scan` reads each image's head and caption once, in sorted order; no pixel is decoded.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from lowrank.data import buckets, images, metadata_file
from lowrank.data.dataset import Dataset, Example, Subset, parse_resolution
from lowrank.data.dataset_config import from_config
from lowrank.data.metadata_file import Named
from lowrank.data.sources import contents, from_folders, from_instance, from_metadata
from lowrank.errors import Refused
from lowrank.files import existing_folder

__all__ = [
    "Dataset",
    "Example",
    "Subset",
    "from_config",
    "from_folders",
    "from_instance",
    "from_metadata",
    "parse_resolution",
    "scan",
]

log = logging.getLogger(__name__)
_SKIP = "or give --skip_bad_images"
_ENDINGS = (".txt", ".caption")  # of caption files: most people's, and kohya's default


def _is_file(entry: os.DirEntry) -> bool:
    """True for a broken link too (it may be a loop), so that it is named when it is opened."""
    return (entry.is_symlink() and not os.path.exists(entry)) or entry.is_file()


def scan(dataset: Dataset, *, skip_bad_images: bool = False) -> list[Example]:
    """Every image of every subset, in sorted order, with size, captions and mask; only heads of files are
    read.

    Sizes are those after the EXIF orientation. Other files are ignored, and images of at most the area of
    `skip_image_resolution` are left out. Raises `Refused` for a missing or empty folder and when nothing is
    left; and for two images of one stem, an image whose head cannot be read or that fits no bucket, a caption
    that is empty or not UTF-8, a mask that is missing or of another shape, unless with `skip_bad_images`:
    then these images are left out and listed.
    """
    examples, bad, seen = [], [], set()
    for index, subset in enumerate(dataset.subsets):
        place = os.path.realpath(subset.metadata_file or subset.image_dir)
        if place in seen:
            key = "metadata_file" if subset.metadata_file else "image_dir"
            log.warning("%s %s is given twice in one dataset; the second is ignored", key, place)
            continue
        seen.add(place)
        examples += _scan_subset(dataset, index, bad)
    if bad and not skip_bad_images:
        more = f" ({len(bad) - 1} more images have a problem)" if len(bad) > 1 else ""
        raise Refused(bad[0] + more)
    for reason in bad:
        log.warning("skipped: %s", reason)
    _tell_unused_masks(dataset, examples)
    if not any(not example.is_reg for example in examples):
        folders = ", ".join(str(subset.image_dir) for subset in dataset.subsets if not subset.is_reg)
        raise Refused(
            f"no training image is left in {folders or 'a dataset of regularisation folders only'}; "
            "give a folder with images that can be read"
        )
    return examples


def _scan_subset(dataset: Dataset, index: int, bad: list[str]) -> list[Example]:
    subset = dataset.subsets[index]
    named = metadata_file.entries(subset) if subset.metadata_file else _listed(subset, bad)
    masks = _masks(subset)
    modes: dict[str, list[str]] = {}
    unnamed, examples = [], []
    smallest = dataset.skip_image_resolution
    for path, known in named:
        try:
            head = images.header(path)
            if smallest and head.size[0] * head.size[1] <= smallest[0] * smallest[1]:
                continue
            _check_place(path, head.size, dataset)
            captions = known or _captions(path, subset)
            mask = None if masks is None else _mask(path, head.size, masks, subset)
        except Refused as error:
            bad.append(str(error))
            continue
        modes.setdefault(head.mode, []).append(path.name)
        if captions == ("",):
            unnamed.append(path.name)
        examples.append(Example(path, captions, head.size, subset.num_repeats, subset.is_reg, index, mask))
    _tell(subset, modes, unnamed, examples)
    return examples


def _listed(subset: Subset, bad: list[str]) -> list[Named]:
    """The images of a folder, sorted; those without a caption file of their own with their caption.

    Hidden files (macOS' `._x.png`) are no images.
    """
    folder = subset.image_dir
    entries = {entry.name for entry in os.scandir(existing_folder(folder, "image_dir")) if _is_file(entry)}
    found = _images(entries)
    if not found:
        raise Refused(
            f"image_dir {folder} holds no image ({' '.join(sorted(images.suffixes()))}): {contents(folder)}; "
            "put images there or give another folder"
        )
    foreign = sorted(name for name in entries if name.endswith(".npz"))
    if foreign:
        log.info(
            "%s: %d .npz caches (first: %s) are not read, as they do not tell the picture and the model they "
            "are of; caches are made anew",
            folder,
            len(foreign),
            foreign[0],
        )
    named: list[Named] = []
    unread: list[str] = []
    first: dict[str, str] = {}
    for name in found:
        stem = os.path.splitext(name)[0]
        if stem in first:
            bad.append(
                f"{folder / first[stem]} and {folder / name} have one stem and would share captions and "
                f"caches; rename or remove one, {_SKIP}"
            )
            continue
        first[stem] = name
        has_file = subset.caption_extension is not None and stem + subset.caption_extension in entries
        named.append((folder / name, () if has_file else (subset.class_tokens or "",)))
        if subset.caption_extension is not None and not has_file:
            unread += [stem + ending for ending in _ENDINGS if stem + ending in entries]
    if unread:
        log.warning(
            "%s: %d images have a caption file that is not read (first: %s), as caption_extension is %s; "
            "give --caption_extension %s to read them",
            folder,
            len(unread),
            unread[0],
            subset.caption_extension,
            os.path.splitext(unread[0])[1],
        )
    return named


def _images(names: set[str]) -> list[str]:
    known = images.suffixes()
    return sorted(
        name for name in names if not name.startswith(".") and os.path.splitext(name)[1].lower() in known
    )


def _check_place(path: Path, size: tuple[int, int], dataset: Dataset) -> None:
    try:
        buckets.place_image(size, dataset)
    except Refused as error:
        raise Refused(f"image {path}: {error}, {_SKIP}") from error


def _captions(path: Path, subset: Subset) -> tuple[str, ...]:
    file = path.with_name(path.stem + (subset.caption_extension or ""))
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(
            f"caption file {file} is not UTF-8 (byte {error.start}: {error.reason}); save it so, {_SKIP}"
        ) from error
    except OSError as error:
        raise Refused(
            f"caption file {file} cannot be read ({error.strerror}); check its permissions, {_SKIP}"
        ) from error
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise Refused(
            f"caption file {file} is empty; write a caption, or remove the file to use the class tokens, "
            f"{_SKIP}"
        )
    return lines if subset.enable_wildcard else lines[:1]


def _masks(subset: Subset) -> dict[str, Path] | None:
    """Mask files by stem, or None where the subset has no `conditioning_data_dir`.

    Where that holds a folder of the image folder's name, the masks are in it: so one `conditioning_data_dir`
    serves several folders.
    """
    if subset.conditioning_data_dir is None:
        return None
    folder = existing_folder(subset.conditioning_data_dir, "conditioning_data_dir")
    if (folder / subset.image_dir.name).is_dir():
        folder /= subset.image_dir.name
    return {os.path.splitext(name)[0]: folder / name for name in reversed(_images(set(os.listdir(folder))))}


def _mask(path: Path, size: tuple[int, int], masks: dict[str, Path], subset: Subset) -> Path:
    mask = masks.get(path.stem)
    if mask is None:
        raise Refused(
            f"image {path} has no mask in conditioning_data_dir {subset.conditioning_data_dir}; put "
            f"{path.stem}.png there, {_SKIP}"
        )
    width, height = images.header(mask).size
    if abs(width - height * size[0] / size[1]) > 1 and abs(height - width * size[1] / size[0]) > 1:
        raise Refused(
            f"mask {mask} is {width}x{height} and image {path} is {size[0]}x{size[1]}, which is another "
            f"shape; give a mask of the image's size, {_SKIP}"
        )
    return mask


def _tell_unused_masks(dataset: Dataset, examples: list[Example]) -> None:
    there = {path for subset in dataset.subsets for path in (_masks(subset) or {}).values()}
    unused = sorted(there - {example.mask for example in examples})
    if unused:
        log.warning("%d masks belong to no image; the first is %s", len(unused), unused[0])


def _tell(subset: Subset, modes: dict[str, list[str]], unnamed: list[str], examples: list[Example]) -> None:
    """One line for each thing about a subset that a user may not expect."""
    folder, mark = subset.image_dir, subset.keep_tokens_separator
    for mode, names in modes.items():
        if mode == "CMYK" or mode == "I" or mode.startswith("I;16"):
            log.info(
                "%s: %d images are %s and become 8-bit RGB (first: %s)", folder, len(names), mode, names[0]
            )
    if unnamed:
        log.warning(
            "%s: %d images have neither a %s file nor class_tokens; their caption is empty (first: %s)",
            folder,
            len(unnamed),
            subset.caption_extension,
            unnamed[0],
        )
    if (
        mark
        and not subset.varies_tags
        and any(mark in line for example in examples for line in example.captions)
    ):
        log.warning(
            "%s: keep_tokens_separator %r has no effect without shuffle_caption, caption_tag_dropout_rate or "
            "token_warmup_step, and stays in the captions",
            folder,
            mark,
        )
