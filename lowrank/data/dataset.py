"""What a dataset is: three frozen records with kohya's key names, checked when they are made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lowrank.errors import Refused, nearest

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")
MAX_REPEATS = 10**6  # an epoch lists every repeat
MAX_SIDE = 16384  # pixels
_SHARES = ("caption_dropout_rate", "caption_tag_dropout_rate")
_COUNTS = ("keep_tokens", "caption_dropout_every_n_epochs", "token_warmup_min", "token_warmup_step")


@dataclass(frozen=True)
class Subset:
    """One folder of images and how its captions and pixels are varied.

    `class_tokens` is the caption of every image without a caption file. `caption_extension` None: caption
    files are not looked for at all, so every image gets `class_tokens`. With `metadata_file` that file lists
    the images and their captions. With `conditioning_data_dir` every image has a mask of its stem there, in
    place of its alpha channel. Raises `Refused` for a value out of range.
    """

    image_dir: Path
    num_repeats: int = 1
    class_tokens: str | None = None
    is_reg: bool = False
    caption_extension: str | None = ".caption"
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    caption_separator: str = ","
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0.0
    color_aug: bool = False
    flip_aug: bool = False
    random_crop: bool = False
    alpha_mask: bool = False
    conditioning_data_dir: str | os.PathLike | None = None
    metadata_file: str | os.PathLike | None = None
    resize_interpolation: str | None = None  # None: the dataset's

    def __post_init__(self) -> None:
        if self.num_repeats < 1:
            raise Refused(
                f"num_repeats {self.num_repeats} of {self.image_dir} is below 1; "
                "give 1 or more, or leave the folder out"
            )
        if self.num_repeats > MAX_REPEATS:
            raise Refused(
                f"num_repeats {self.num_repeats} of {self.image_dir} is above {MAX_REPEATS}; give fewer, and "
                "more --max_train_steps"
            )
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise Refused(
                    f"{name} {getattr(self, name)} of {self.image_dir} is not a share between 0 and 1"
                )
        for name in _COUNTS:
            if getattr(self, name) < 0:
                raise Refused(
                    f"{name} {getattr(self, name)} of {self.image_dir} is negative; give 0 to switch it off"
                )
        if not self.caption_separator:
            raise Refused(
                f"caption_separator of {self.image_dir} is empty; give the character between tags, e.g. ','"
            )
        _check_interpolation(self.resize_interpolation)

    @property
    def varies_tags(self) -> bool:
        """True when tags are shuffled, dropped or warmed up, so that a caption is taken apart at all."""
        return self.shuffle_caption or self.caption_tag_dropout_rate > 0 or self.token_warmup_step > 0

    @property
    def label(self) -> str:
        """The name kohya's metadata gives it: that of the folder, or of the metadata file."""
        return Path(self.metadata_file).name if self.metadata_file else self.image_dir.name


@dataclass(frozen=True)
class Dataset:
    """Subsets that share one resolution (w, h), one batch size and one set of buckets.

    Images of at most the area of `skip_image_resolution` (w, h) are left out. The share `validation_split` of
    each folder is held out of training, chosen by `validation_seed` (None: the run's seed). Raises `Refused`
    for values out of range; the bucket limits must enclose both sides of the resolution.
    """

    subsets: tuple[Subset, ...]
    resolution: tuple[int, int] = (512, 512)
    batch_size: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    resize_interpolation: str | None = None
    skip_image_resolution: tuple[int, int] | None = None
    validation_split: float = 0.0
    validation_seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "bucket_reso_steps", "min_bucket_reso"):
            if getattr(self, name) < 1:
                raise Refused(f"{name} {getattr(self, name)} is below 1; give 1 or more")
        if min(self.resolution) < 1:
            raise Refused(f"resolution {self.resolution} has a side below 1; give e.g. 512 or 768,512")
        if max(self.resolution) > MAX_SIDE:
            raise Refused(f"resolution {self.resolution} has a side above {MAX_SIDE}; give less")
        _check_interpolation(self.resize_interpolation)
        if not 0 <= self.validation_split < 1:
            raise Refused(
                f"validation_split {self.validation_split} is not a share of at least 0 and below 1; give 0.1"
            )
        if self.enable_bucket:
            self._check_buckets()

    def _check_buckets(self) -> None:
        if self.bucket_no_upscale:  # the limits are not used: buckets come from the images
            if max(self.resolution) < self.bucket_reso_steps:
                raise Refused(
                    f"bucket_reso_steps {self.bucket_reso_steps} exceeds the resolution {self.resolution}; "
                    "lower it"
                )
            return
        step, (smallest, largest) = self.bucket_reso_steps, (min(self.resolution), max(self.resolution))
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
            raise Refused(f"bucket_reso_steps {step} exceeds the resolution's side {smallest}; lower it")


def _check_interpolation(name: str | None) -> None:
    if name not in (None, *INTERPOLATIONS):
        raise Refused(
            f"resize_interpolation {name!r} is unknown{nearest(str(name), INTERPOLATIONS)}; give "
            f"{', '.join(INTERPOLATIONS)}"
        )


@dataclass(frozen=True)
class Example:
    """One image of a dataset before it is placed in a bucket.

    `captions` is one line, or with `enable_wildcard` every line of the caption file; `size` is (w, h) as
    seen, that is after the EXIF orientation; `subset` is the index in `Dataset.subsets`; `mask` is a file of
    `conditioning_data_dir`.
    """

    path: Path
    captions: tuple[str, ...]
    size: tuple[int, int]
    repeats: int
    is_reg: bool
    subset: int
    mask: Path | None = None


SUBSET_FIELDS = tuple(field.name for field in fields(Subset))
DATASET_FIELDS = tuple(field.name for field in fields(Dataset) if field.name != "subsets")


def parse_resolution(value: int | str | tuple[int, int] | list[int]) -> tuple[int, int]:
    """`512`, `"512"`, `"768,512"` or a pair as (w, h); anything else raises `Refused`."""
    parts = (
        value.split(",") if isinstance(value, str) else value if isinstance(value, (tuple, list)) else [value]
    )
    try:
        sides = [int(part) for part in parts]
    except (TypeError, ValueError) as error:
        raise Refused(
            f"resolution {value!r} is not a number or 'width,height'; give e.g. 512 or 768,512"
        ) from error
    if len(sides) not in (1, 2):
        raise Refused(f"resolution {value!r} has {len(sides)} parts; give one number or 'width,height'")
    return sides[0], sides[-1]


def split_values(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword values as (those of `Dataset`, those of `Subset`); another name is a `TypeError`.

    None counts as not given, so that a command line's unset options can be passed on; what both records know
    goes to both.
    """
    unknown = set(values) - set(DATASET_FIELDS) - set(SUBSET_FIELDS)
    if unknown:
        name = sorted(unknown)[0]
        raise TypeError(f"unknown dataset value {name!r}{nearest(name, DATASET_FIELDS + SUBSET_FIELDS)}")
    given = {name: value for name, value in values.items() if value is not None}
    dataset = {name: value for name, value in given.items() if name in DATASET_FIELDS}
    for name in {"resolution", "skip_image_resolution"} & set(dataset):
        dataset[name] = parse_resolution(dataset[name])
    return dataset, {name: value for name, value in given.items() if name in SUBSET_FIELDS}
