"""Datasets: frozen records with kohya's key names, and the functions that make them from folders.

The options are those of the command line (`config.flags_data`). A dataset is made from kohya's folders
(`from_folders`), one plain folder (`from_instance`), a metadata file (`from_metadata`) or a file that
describes datasets (`dataset_config.from_config`).
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank.config.flag import Flag, check_fields, fields_of, option, path
from lowrank.config.flags_data import Augmentation, Buckets, Captions, HoldOut, Masks, Resizing, Sizes
from lowrank.errors import Refused, nearest
from lowrank.files import existing_folder

log = logging.getLogger(__name__)

CAPTION_EXTENSION = ".caption"  # ending of caption files unless an option names another
_REG = {"is_reg": True, "conditioning_data_dir": None}  # masks belong to the training images
_REPEATS = re.compile(r"(\d+)(?:_(.*))?", re.DOTALL)  # kohya accepts a bare "10" too


@dataclass(frozen=True)
class Subset:
    """One folder of images and how its captions and pixels are varied.

    `class_tokens` is the caption of every image without a caption file. Caption files are read only where
    `captions.caption_extension` is set. With `metadata_file`, that file lists the images and their captions.
    With `masks.conditioning_data_dir`, every image has a mask of its stem in that folder, in place of its
    alpha channel. Raises `Refused` for a value out of range.
    """

    image_dir: Path = field(metadata={"flag": Flag("folder of images", convert=Path)})
    num_repeats: int = option(1, "how often an epoch shows each image", low=1, high=10**6)
    class_tokens: str | None = option(None, "caption of images without a caption file")
    is_reg: bool = option(False, "regularisation images")
    metadata_file: str | None = path(None, "file that lists the images and their captions")
    diff_output_preservation: bool = option(
        False, "the adapter must keep what the base model predicts for these images"
    )
    captions: Captions = field(default_factory=Captions)
    augmentation: Augmentation = field(default_factory=Augmentation)
    masks: Masks = field(default_factory=Masks)

    def __post_init__(self) -> None:
        for record in (self, self.captions, self.augmentation, self.masks):
            check_fields(record, f" of {self.image_dir}", mark="")
        if not self.captions.caption_separator:
            raise Refused(
                f"caption_separator of {self.image_dir} is empty; give the character between tags, e.g. ','"
            )

    @property
    def label(self) -> str:
        """The name in kohya's metadata: that of the folder, or of the metadata file."""
        return Path(self.metadata_file).name if self.metadata_file else self.image_dir.name

    def value(self, name: str) -> Any:
        """The value of an option by its name, from the record that declares it."""
        section = SUBSET_FIELDS[name].section
        return getattr(getattr(self, section) if section else self, name)


@dataclass(frozen=True)
class Dataset(Sizes, Buckets, HoldOut, Resizing):
    """Subsets that share one resolution (w, h), one batch size and one set of buckets.

    Images of at most the area of `skip_image_resolution` (w, h) are left out. The share `validation_split` of
    each folder is held out of training, chosen by `validation_seed` (None: the run's seed). Raises `Refused`
    for values out of range; the bucket limits must enclose both sides of the resolution.
    """

    subsets: tuple[Subset, ...]
    batch_size: int = option(1, "images per batch", low=1)

    def __post_init__(self) -> None:
        check_fields(self, mark="")
        if self.enable_bucket:
            self._check_buckets()

    def _check_buckets(self) -> None:
        step, (smallest, largest) = self.bucket_reso_steps, (min(self.resolution), max(self.resolution))
        if self.bucket_no_upscale:  # the limits are not used: buckets come from the images
            if largest < step:
                raise Refused(
                    f"bucket_reso_steps {step} exceeds the resolution {self.resolution}; "
                    f"give --bucket_reso_steps {largest} or less"
                )
            return
        lowest, highest = self.min_bucket_reso // step * step, -(-self.max_bucket_reso // step) * step
        if smallest < lowest:
            raise Refused(
                f"min_bucket_reso {self.min_bucket_reso} exceeds the resolution's side {smallest}; "
                f"give --min_bucket_reso {smallest} or less"
            )
        if largest > highest:
            raise Refused(
                f"max_bucket_reso {self.max_bucket_reso} is below the resolution's side {largest}; "
                f"give --max_bucket_reso {largest} or more"
            )
        if smallest < step:
            raise Refused(
                f"bucket_reso_steps {step} exceeds the resolution's side {smallest}; "
                f"give --bucket_reso_steps {smallest} or less"
            )


@dataclass(frozen=True)
class Example:
    """One image of a dataset before it is placed in a bucket.

    `captions` is one line, or with `enable_wildcard` every line of the caption file; `size` is (w, h) after
    the EXIF orientation; `subset` is the index in `Dataset.subsets`; `mask` is a file of
    `conditioning_data_dir`; `captioned` is False if the class tokens replace a missing caption.
    """

    path: Path
    captions: tuple[str, ...]
    size: tuple[int, int]
    repeats: int
    is_reg: bool
    subset: int
    mask: Path | None = None
    captioned: bool = True


_GROUPS = {"captions": Captions, "augmentation": Augmentation, "masks": Masks}
SUBSET_FIELDS = fields_of(Subset) | {
    name: spec for section, group in _GROUPS.items() for name, spec in fields_of(group, section).items()
}
DATASET_FIELDS = fields_of(Dataset)


def parse_resolution(value: int | str | tuple[int, int] | list[int]) -> tuple[int, int]:
    """`512`, `"512"`, `"768,512"` or a pair as (w, h). Raises `Refused` for anything else."""
    text = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    return DATASET_FIELDS["resolution"].read("resolution", text)


def split_values(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword values as (values of a `Dataset`, values of a `Subset`). Raises `TypeError` for another name.

    None is skipped, so that unset options of a command line can be passed. A name of both records goes to
    both. `caption_extension` is `CAPTION_EXTENSION` unless it is given.
    """
    known = DATASET_FIELDS | SUBSET_FIELDS
    if unknown := sorted(values.keys() - known.keys()):
        raise TypeError(f"unknown dataset value {unknown[0]!r}{nearest(unknown[0], known)}")
    given: dict[str, Any] = {"caption_extension": CAPTION_EXTENSION}
    given |= {name: value for name, value in values.items() if value is not None}
    dataset = {name: value for name, value in given.items() if name in DATASET_FIELDS}
    for name in {"resolution", "skip_image_resolution"} & set(dataset):
        dataset[name] = parse_resolution(dataset[name])
    return dataset, {name: value for name, value in given.items() if name in SUBSET_FIELDS}


def make_subset(image_dir: Path, values: Mapping[str, Any]) -> Subset:
    """A subset from values by name: each goes to the record that declares it."""
    records: dict[str, Any] = {
        section: group(**{name: values[name] for name in fields_of(group) if name in values})
        for section, group in _GROUPS.items()
    }
    records |= {name: value for name, value in values.items() if not SUBSET_FIELDS[name].section}
    records["image_dir"] = image_dir
    return Subset(**records)


def from_folders(
    train_data_dir: str | os.PathLike, reg_data_dir: str | os.PathLike | None = None, **defaults: object
) -> tuple[Dataset, ...]:
    """One dataset from kohya's layout: subfolders `<repeats>_<class tokens>` of each folder, in sorted order.

    Other subfolders are skipped with a warning; `defaults` are values of `Dataset` and `Subset`. Raises
    `Refused` for a missing folder and where no such subfolder exists.
    """
    dataset, subset = split_values(defaults)
    subsets = _numbered(Path(train_data_dir), "train_data_dir", subset | {"is_reg": False})
    if reg_data_dir is not None:
        subsets += _numbered(Path(reg_data_dir), "reg_data_dir", subset | _REG)
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

    Only with an explicit `caption_extension` does a caption file beside an image replace the prompt. The
    class images are regularisation images. Raises `Refused` for a missing folder or prompt.
    """
    dataset, subset = split_values(defaults)
    if not instance_prompt and caption_extension is None:
        raise Refused(
            "instance_prompt is missing; give --instance_prompt, or --caption_extension .txt to read "
            "captions from files beside the images"
        )
    folder = existing_folder(instance_data_dir, "instance_data_dir")
    subset |= {"caption_extension": caption_extension}
    training = {"num_repeats": repeats, "class_tokens": instance_prompt, "is_reg": False}
    subsets = [make_subset(folder, subset | training)]
    if class_data_dir is not None:
        if not class_prompt:
            raise Refused(f"class_data_dir {class_data_dir} has no prompt; give --class_prompt")
        reg = {"num_repeats": 1, "class_tokens": class_prompt, **_REG}
        subsets.append(make_subset(existing_folder(class_data_dir, "class_data_dir"), subset | reg))
    return (Dataset(tuple(subsets), **dataset),)


def from_metadata(
    metadata_file: str | os.PathLike, image_dir: str | os.PathLike | None = None, **defaults: object
) -> tuple[Dataset, ...]:
    """One dataset from a metadata file (`--in_json`), which names every image (see `metadata_file.py`).

    Relative image names start at `image_dir`, or where that is None at the folder of the file. Raises
    `Refused` for a missing folder.
    """
    dataset, subset = split_values(defaults)
    folder = Path(metadata_file).parent if image_dir is None else existing_folder(image_dir, "train_data_dir")
    return (Dataset((make_subset(folder, subset | {"metadata_file": metadata_file}),), **dataset),)


def _numbered(parent: Path, option: str, values: Mapping[str, Any]) -> list[Subset]:
    """A subset for each subfolder `<repeats>_<class tokens>` of the folder that `option` names."""
    names = sorted(
        entry.name for entry in os.scandir(existing_folder(parent, option)) if os.path.isdir(entry)
    )
    subsets = []
    for name in names:
        match = _REPEATS.fullmatch(name)
        if match and int(match[1]) >= 1:
            named = {"num_repeats": int(match[1]), "class_tokens": (match[2] or "").strip()}
            subsets.append(make_subset(parent / name, {**values, **named}))
        else:
            log.warning(
                "%s: folder %r is skipped: its name must begin with a number of repeats of 1 or more; "
                "rename it, e.g. to 10_%s",
                option,
                name,
                match[2] or name if match else name,
            )
    if not subsets:
        from lowrank.data.images import suffixes  # imported late: it needs torch and Pillow

        loose = sum(Path(entry.name).suffix.lower() in suffixes() for entry in os.scandir(parent))
        if loose and (match := _REPEATS.fullmatch(parent.resolve().name)) and int(match[1]) >= 1:
            raise Refused(
                f"{option} {parent} is itself a folder <repeats>_<class> with {loose} images; give the "
                f"folder that holds it: --{option} {parent.resolve().parent}"
            )
        content = f"only {loose} images directly in it" if loose else describe_content(parent)
        raise Refused(
            f"{option} {parent} has no subfolder named <repeats>_<class>: {content}; "
            f"move the images into e.g. {parent / '10_name'}"
        )
    return subsets


def describe_content(folder: Path) -> str:
    """What a folder without images holds, in words: `only 3 .txt files`, or `it is empty`."""
    kinds = Counter(
        "folder" if os.path.isdir(entry) else f"{Path(entry.name).suffix or 'plain'} file"
        for entry in os.scandir(folder)
    )
    counts = ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in kinds.most_common(6))
    return f"only {counts}" if counts else "it is empty"
