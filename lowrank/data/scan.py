"""Folders to examples: which images there are, how large they are and what they are called.

The places a dataset can come from: kohya's `N_class` folders, one plain folder with a prompt, a dataset file
(`config.py`). `scan` then reads each image's header and caption once, in sorted order.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowrank.data import buckets, images
from lowrank.data.config import from_config
from lowrank.data.records import Dataset, Example, Subset, parse_resolution, split
from lowrank.errors import Refused

__all__ = [
    "Dataset",
    "Example",
    "Subset",
    "from_config",
    "from_folders",
    "from_instance",
    "parse_resolution",
    "scan",
]

log = logging.getLogger(__name__)

_REPEATS = re.compile(r"(\d+)_(.*)", re.DOTALL)


def from_folders(
    train_data_dir: str | os.PathLike, reg_data_dir: str | os.PathLike | None = None, **defaults: object
) -> tuple[Dataset, ...]:
    """One dataset from kohya's layout: subfolders `<repeats>_<class tokens>` of each folder, in sorted order.

    Other subfolders are skipped with a warning; `defaults` are values of `Dataset` and `Subset`. Raises
    `Refused` for a missing folder and where no such subfolder exists.
    """
    dataset, subset = split(defaults)
    subsets = _counted(Path(train_data_dir), "train_data_dir", subset | {"is_reg": False})
    if reg_data_dir is not None:
        subsets += _counted(Path(reg_data_dir), "reg_data_dir", subset | {"is_reg": True})
    return (Dataset(tuple(subsets), **dataset),)


def from_instance(
    instance_data_dir: str | os.PathLike,
    instance_prompt: str | None,
    class_data_dir: str | os.PathLike | None = None,
    class_prompt: str | None = None,
    *,
    repeats: int = 1,
    caption_extension: str | None = None,
    **defaults: object,
) -> tuple[Dataset, ...]:
    """One dataset from a plain folder whose images all have one prompt, and perhaps a folder of class images.

    Only with an explicit `caption_extension` does a caption file beside an image win over the prompt. The
    class images are regularisation images. Raises `Refused` for a missing folder or prompt.
    """
    dataset, subset = split(defaults)
    if not instance_prompt and caption_extension is None:
        raise Refused(
            "instance_prompt is missing; give --instance_prompt, or --caption_extension .txt to read "
            "captions from files beside the images"
        )
    folder = _folder(instance_data_dir, "instance_data_dir")
    own = {"num_repeats": repeats, "class_tokens": instance_prompt, "caption_extension": caption_extension}
    subsets = [_subset(folder, subset | own | {"is_reg": False})]
    if class_data_dir is not None:
        if not class_prompt:
            raise Refused(f"class_data_dir {class_data_dir} has no prompt; give --class_prompt")
        own |= {"num_repeats": 1, "class_tokens": class_prompt}
        subsets.append(_subset(_folder(class_data_dir, "class_data_dir"), subset | own | {"is_reg": True}))
    return (Dataset(tuple(subsets), **dataset),)


def _folder(path: str | os.PathLike, option: str) -> Path:
    path = Path(path)
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else f"does not exist (seen from {Path.cwd()})"
        raise Refused(f"{option} {path} {what}; give the folder that holds the images")
    return path


def _subset(folder: Path, values: Mapping[str, Any]) -> Subset:
    own: dict[str, Any] = {**values, "image_dir": folder}
    return Subset(**own)


def _counted(parent: Path, option: str, values: Mapping[str, Any]) -> list[Subset]:
    found = sorted(entry.name for entry in os.scandir(_folder(parent, option)) if os.path.isdir(entry))
    subsets = []
    for name in found:
        match = _REPEATS.fullmatch(name)
        if match and int(match[1]) >= 1:
            own = {"num_repeats": int(match[1]), "class_tokens": match[2].strip()}
            subsets.append(_subset(parent / name, dict(values) | own))
        else:
            log.warning(
                "%s: folder %r is skipped: a name begins with the number of repeats, 1 or more, as in 10_%s",
                option,
                name,
                match[2] if match else name,
            )
    if not subsets:
        loose = sum(1 for entry in os.scandir(parent) if Path(entry.name).suffix.lower() in images.suffixes())
        has = f"only {loose} images directly in it" if loose else _contents(parent)
        raise Refused(
            f"{option} {parent} has no subfolder named <repeats>_<class>: {has}; "
            f"move the images into e.g. {parent / '10_name'}"
        )
    return subsets


def _contents(folder: Path) -> str:
    """What a folder without images holds, in words: `only 3 .txt files`, or `it is empty`."""
    kinds = Counter(
        "folder" if os.path.isdir(entry) else f"{Path(entry.name).suffix or 'plain'} file"
        for entry in os.scandir(folder)
    )
    told = ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in kinds.most_common(6))
    return f"only {told}" if told else "it is empty"


def _is_file(entry: os.DirEntry) -> bool:
    """True for a broken link too (it may be a loop), so that it is named when it is opened."""
    return (entry.is_symlink() and not os.path.exists(entry)) or entry.is_file()


def scan(dataset: Dataset, *, skip_bad_images: bool = False) -> list[Example]:
    """Every image of every subset, in sorted order, with size and captions; only heads of files are read.

    Sizes are those after the EXIF orientation. Other files are ignored. Raises `Refused` for a missing or
    empty folder, two images of one stem, an image whose head cannot be read or that fits no bucket (with
    `skip_bad_images` it is left out and listed), a caption file that is empty or not UTF-8, and when nothing
    is left.
    """
    examples, bad, seen = [], [], {}
    for index, subset in enumerate(dataset.subsets):
        folder = os.path.realpath(subset.image_dir)
        if folder in seen:
            log.warning("image_dir %s is given twice in one dataset; the second is ignored", subset.image_dir)
            continue
        seen[folder] = index
        examples += _scan_subset(dataset, index, bad)
    if bad and not skip_bad_images:
        more = f" ({len(bad) - 1} more images have a problem)" if len(bad) > 1 else ""
        raise Refused(bad[0] + more)
    for reason in bad:
        log.warning("skipped: %s", reason)
    if not any(not example.is_reg for example in examples):
        folders = ", ".join(str(subset.image_dir) for subset in dataset.subsets if not subset.is_reg)
        raise Refused(
            f"no training image is left in {folders or 'a dataset of regularisation folders only'}; "
            "give a folder with images that can be read"
        )
    return examples


def _scan_subset(dataset: Dataset, index: int, bad: list[str]) -> list[Example]:
    subset = dataset.subsets[index]
    names, found = _listed(subset.image_dir)
    modes: dict[str, list[str]] = {}
    unnamed, examples = [], []
    for name in found:
        path = subset.image_dir / name
        try:
            head = images.header(path)
            _check_place(path, head.size, dataset)
        except Refused as error:
            bad.append(str(error))
            continue
        modes.setdefault(head.mode, []).append(name)
        captions = _captions(path, subset, names)
        if captions == ("",):
            unnamed.append(name)
        examples.append(Example(path, captions, head.size, subset.num_repeats, subset.is_reg, index))
    _tell(subset, modes, unnamed, examples)
    return examples


def _listed(folder: Path) -> tuple[set[str], list[str]]:
    """All names of a folder, and its images sorted; hidden files (macOS' `._x.png`) are no images."""
    entries = [entry.name for entry in os.scandir(_folder(folder, "image_dir")) if _is_file(entry)]
    known = images.suffixes()
    found = sorted(
        name for name in entries if not name.startswith(".") and os.path.splitext(name)[1].lower() in known
    )
    if not found:
        raise Refused(
            f"image_dir {folder} holds no image ({' '.join(sorted(known))}): {_contents(folder)}; "
            "put images there or give another folder"
        )
    first: dict[str, str] = {}
    for name in found:
        stem = os.path.splitext(name)[0]
        if stem in first:
            raise Refused(
                f"{folder / first[stem]} and {folder / name} have one stem and would share captions and "
                "caches; rename or remove one"
            )
        first[stem] = name
    return set(entries), found


def _check_place(path: Path, size: tuple[int, int], dataset: Dataset) -> None:
    try:
        buckets.place(size, dataset)
    except Refused as error:
        raise Refused(f"image {path}: {error}, or give --skip_bad_images") from error


def _captions(path: Path, subset: Subset, names: set[str]) -> tuple[str, ...]:
    if subset.caption_extension is None or path.stem + subset.caption_extension not in names:
        return (subset.class_tokens or "",)
    file = path.with_name(path.stem + subset.caption_extension)
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(
            f"caption file {file} is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise Refused(
            f"caption file {file} cannot be read ({error.strerror}); check its permissions"
        ) from error
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise Refused(
            f"caption file {file} is empty; write a caption, or remove the file to use the class tokens"
        )
    return lines if subset.enable_wildcard else lines[:1]


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
