"""Where datasets come from: kohya's `N_class` folders, one plain folder with a prompt, a metadata file.

The fourth place, a dataset file, is `dataset_config.py`.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lowrank.data import images
from lowrank.data.dataset import Dataset, Subset, split_values
from lowrank.errors import Refused
from lowrank.files import existing_folder

log = logging.getLogger(__name__)

_REG = MappingProxyType({"is_reg": True, "conditioning_data_dir": None})  # masks are the training images'
_REPEATS = re.compile(r"(\d+)(?:_(.*))?", re.DOTALL)  # kohya takes a bare "10" too


def from_folders(
    train_data_dir: str | os.PathLike, reg_data_dir: str | os.PathLike | None = None, **defaults: object
) -> tuple[Dataset, ...]:
    """One dataset from kohya's layout: subfolders `<repeats>_<class tokens>` of each folder, in sorted order.

    Other subfolders are skipped with a warning; `defaults` are values of `Dataset` and `Subset`. Raises
    `Refused` for a missing folder and where no such subfolder exists.
    """
    dataset, subset = split_values(defaults)
    subsets = _counted(Path(train_data_dir), "train_data_dir", subset | {"is_reg": False})
    if reg_data_dir is not None:
        subsets += _counted(Path(reg_data_dir), "reg_data_dir", subset | _REG)
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
    dataset, subset = split_values(defaults)
    if not instance_prompt and caption_extension is None:
        raise Refused(
            "instance_prompt is missing; give --instance_prompt, or --caption_extension .txt to read "
            "captions from files beside the images"
        )
    folder = existing_folder(instance_data_dir, "instance_data_dir")
    own = {"num_repeats": repeats, "class_tokens": instance_prompt, "caption_extension": caption_extension}
    subsets = [_subset(folder, subset | own | {"is_reg": False})]
    if class_data_dir is not None:
        if not class_prompt:
            raise Refused(f"class_data_dir {class_data_dir} has no prompt; give --class_prompt")
        own |= {"num_repeats": 1, "class_tokens": class_prompt}
        subsets.append(_subset(existing_folder(class_data_dir, "class_data_dir"), subset | own | _REG))
    return (Dataset(tuple(subsets), **dataset),)


def from_metadata(
    metadata_file: str | os.PathLike, image_dir: str | os.PathLike | None = None, **defaults: object
) -> tuple[Dataset, ...]:
    """One dataset from a metadata file (`--in_json`), which names every image (see `metadata_file.py`).

    Relative image names start at `image_dir`, or where that is None at the file's own folder. Raises
    `Refused` for a missing folder.
    """
    dataset, subset = split_values(defaults)
    folder = Path(metadata_file).parent if image_dir is None else existing_folder(image_dir, "train_data_dir")
    return (Dataset((_subset(folder, subset | {"metadata_file": metadata_file}),), **dataset),)


def _subset(folder: Path, values: Mapping[str, Any]) -> Subset:
    own: dict[str, Any] = {**values, "image_dir": folder}
    return Subset(**own)


def _counted(parent: Path, option: str, values: Mapping[str, Any]) -> list[Subset]:
    found = sorted(
        entry.name for entry in os.scandir(existing_folder(parent, option)) if os.path.isdir(entry)
    )
    subsets = []
    for name in found:
        match = _REPEATS.fullmatch(name)
        if match and int(match[1]) >= 1:
            own = {"num_repeats": int(match[1]), "class_tokens": (match[2] or "").strip()}
            subsets.append(_subset(parent / name, dict(values) | own))
        else:
            log.warning(
                "%s: folder %r is skipped: a name begins with the number of repeats, 1 or more, as in 10_%s",
                option,
                name,
                match[2] or name if match else name,
            )
    if not subsets:
        loose = sum(1 for entry in os.scandir(parent) if Path(entry.name).suffix.lower() in images.suffixes())
        has = f"only {loose} images directly in it" if loose else contents(parent)
        raise Refused(
            f"{option} {parent} has no subfolder named <repeats>_<class>: {has}; "
            f"move the images into e.g. {parent / '10_name'}"
        )
    return subsets


def contents(folder: Path) -> str:
    """What a folder without images holds, in words: `only 3 .txt files`, or `it is empty`."""
    kinds = Counter(
        "folder" if os.path.isdir(entry) else f"{Path(entry.name).suffix or 'plain'} file"
        for entry in os.scandir(folder)
    )
    counts = ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in kinds.most_common(6))
    return f"only {counts}" if counts else "it is empty"
