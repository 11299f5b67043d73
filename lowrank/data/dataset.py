"""What a dataset is: frozen records with kohya's key names, checked when they are made.

Their options are those of the command line (`config.flags_data`), with the facts of a folder added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank.config.flag import Flag, check_fields, fields_of, option, path
from lowrank.config.flags_data import Augmentation, Buckets, Captions, HoldOut, Masks, Resizing, Sizes
from lowrank.errors import Refused, nearest

CAPTIONS = ".caption"  # ending of caption files unless an option names another
MAX_REPEATS = 10**6  # an epoch lists every repeat


@dataclass(frozen=True)
class Subset(Captions, Augmentation, Masks):
    """One folder of images and how its captions and pixels are varied.

    `class_tokens` is the caption of every image without a caption file. `caption_extension` None: caption
    files are not looked for at all, so every image gets `class_tokens`. With `metadata_file` that file lists
    the images and their captions. With `conditioning_data_dir` every image has a mask of its stem there, in
    place of its alpha channel. Raises `Refused` for a value out of range.
    """

    image_dir: Path = field(metadata={"flag": Flag("folder of images", convert=Path)})
    num_repeats: int = option(1, "how often an epoch shows each image", low=1, high=MAX_REPEATS)
    class_tokens: str | None = option(None, "caption of images without a caption file")
    is_reg: bool = option(False, "regularisation images")
    metadata_file: str | None = path(None, "file that lists the images and their captions")

    def __post_init__(self) -> None:
        check_fields(self, f" of {self.image_dir}", mark="")
        if not self.caption_separator:
            raise Refused(
                f"caption_separator of {self.image_dir} is empty; give the character between tags, e.g. ','"
            )

    @property
    def varies_tags(self) -> bool:
        """True when tags are shuffled, dropped or warmed up, so that a caption is taken apart at all."""
        return self.shuffle_caption or self.caption_tag_dropout_rate > 0 or self.token_warmup_step > 0

    @property
    def label(self) -> str:
        """The name kohya's metadata gives it: that of the folder, or of the metadata file."""
        return Path(self.metadata_file).name if self.metadata_file else self.image_dir.name


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


SUBSET_FIELDS = fields_of(Subset)
DATASET_FIELDS = fields_of(Dataset)


def parse_resolution(value: int | str | tuple[int, int] | list[int]) -> tuple[int, int]:
    """`512`, `"512"`, `"768,512"` or a pair as (w, h); anything else raises `Refused`."""
    text = ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    return DATASET_FIELDS["resolution"].read("resolution", text)


def split_values(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword values as (those of `Dataset`, those of `Subset`); another name is a `TypeError`.

    None counts as not given, so that a command line's unset options can be passed on; what both records know
    goes to both. `caption_extension` is `CAPTIONS` where it is not given.
    """
    known = DATASET_FIELDS | SUBSET_FIELDS
    if unknown := sorted(values.keys() - known.keys()):
        raise TypeError(f"unknown dataset value {unknown[0]!r}{nearest(unknown[0], known)}")
    given = {"caption_extension": CAPTIONS} | {
        name: value for name, value in values.items() if value is not None
    }
    dataset = {name: value for name, value in given.items() if name in DATASET_FIELDS}
    for name in {"resolution", "skip_image_resolution"} & set(dataset):
        dataset[name] = parse_resolution(dataset[name])
    return dataset, {name: value for name, value in given.items() if name in SUBSET_FIELDS}
