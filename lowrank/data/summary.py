"""What a loader holds, as plain data: for logs, `--dry_run` and kohya's `ss_*` metadata."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from lowrank.data import plan
from lowrank.data.dataset import Dataset
from lowrank.data.loader import Loader
from lowrank.data.plan import Placed

_OF_SUBSET = (
    "num_repeats",
    "color_aug",
    "flip_aug",
    "random_crop",
    "shuffle_caption",
    "keep_tokens",
    "keep_tokens_separator",
    "secondary_separator",
    "enable_wildcard",
    "caption_prefix",
    "caption_suffix",
    "resize_interpolation",
)
_OF_DATASET = ("enable_bucket", "min_bucket_reso", "max_bucket_reso", "resize_interpolation")


def dataset_summary(loader: Loader) -> dict[str, Any]:
    """Counts for one look: per dataset the folders, images, images x repeats, and what each bucket holds."""
    return {
        "batches_per_epoch": len(loader),
        "num_train_images": sum(_total(group, reg=False) for group in loader.groups),
        "num_reg_images": sum(_total(group, reg=True) for group in loader.groups),
        "datasets": [
            {
                "resolution": list(dataset.resolution),
                "batch_size": dataset.batch_size,
                "folders": [
                    {
                        "image_dir": str(subset.image_dir),
                        "is_reg": subset.is_reg,
                        "repeats": subset.num_repeats,
                        "images": sum(one.subset == index for one in examples),
                    }
                    for index, subset in enumerate(dataset.subsets)
                ],
                "buckets": {
                    f"{w}x{h}": sum(one.repeats for one in members)
                    for (w, h), members in plan.by_bucket(group).items()
                },
            }
            for dataset, examples, group in zip(loader.datasets, loader.examples, loader.groups, strict=True)
        ],
    }


def tag_frequency(loader: Loader, index: int | None = None) -> dict[str, dict[str, int]]:
    """`ss_tag_frequency` of one dataset or all: folder name to lower-case tag to number of images.

    A folder that several datasets have counts once, in the first of them.
    """
    counts: dict[str, dict[str, int]] = {}
    for dataset, examples in _chosen(loader, index):
        own: dict[str, Counter[str]] = {}
        for one in examples:
            own.setdefault(dataset.subsets[one.subset].label, Counter()).update(
                tag.strip().lower() for line in one.captions for tag in line.split(",") if tag.strip()
            )
        counts = {folder: dict(tags) for folder, tags in own.items()} | counts
    return counts


def dataset_dirs(loader: Loader, *, reg: bool = False) -> dict[str, dict[str, int]]:
    """`ss_dataset_dirs`, or `ss_reg_dataset_dirs` with `reg`: folder name to n_repeats and img_count.

    The second folder of one name is `name (2)`, as in sd-scripts.
    """
    found: dict[str, dict[str, int]] = {}
    for dataset, examples in _chosen(loader, None):
        for number, subset in enumerate(dataset.subsets):
            if subset.is_reg == reg:
                names = itertools.chain([subset.label], (f"{subset.label} ({i})" for i in itertools.count(2)))
                found[next(name for name in names if name not in found)] = {
                    "n_repeats": subset.num_repeats,
                    "img_count": sum(one.subset == number for one in examples),
                }
    return found


def bucket_info(loader: Loader, index: int = 0) -> dict[str, Any] | None:
    """`ss_bucket_info` of one dataset: images x repeats per bucket, mean aspect error; or None."""
    placed = loader.groups[index]
    if not loader.datasets[index].enable_bucket or not placed:
        return None
    return {
        "buckets": {
            str(number): {"resolution": list(bucket), "count": sum(one.repeats for one in members)}
            for number, (bucket, members) in enumerate(plan.by_bucket(placed).items())
        },
        "mean_img_ar_error": sum(map(_aspect_error, placed)) / len(placed),
    }


def metadata_datasets(loader: Loader) -> list[dict[str, Any]]:
    """`ss_datasets`: one dict per dataset with its subsets, kohya's keys; to be written as JSON."""
    return [_described(loader, index, dataset) for index, dataset in enumerate(loader.datasets)]


def _described(loader: Loader, index: int, dataset: Dataset) -> dict[str, Any]:
    group, examples = loader.groups[index], loader.examples[index]
    return {
        "is_dreambooth": all(subset.metadata_file is None for subset in dataset.subsets),
        "batch_size_per_device": dataset.batch_size,
        "num_train_images": _total(group, reg=False),
        "num_reg_images": _total(group, reg=True),
        "resolution": list(dataset.resolution),
        **{name: getattr(dataset, name) for name in _OF_DATASET},
        "tag_frequency": tag_frequency(loader, index),
        "bucket_info": bucket_info(loader, index),
        "subsets": [
            {
                "img_count": sum(one.subset == number for one in examples),
                **{name: getattr(subset, name) for name in _OF_SUBSET},
                "image_dir": subset.image_dir.name,
                **(
                    {"metadata_file": subset.label}
                    if subset.metadata_file
                    else {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
                ),
            }
            for number, subset in enumerate(dataset.subsets)
        ],
    }


def _chosen(loader: Loader, index: int | None):
    pairs = list(zip(loader.datasets, loader.examples, strict=True))
    return pairs if index is None else [pairs[index]]


def _total(group: tuple[Placed, ...], *, reg: bool) -> int:
    return sum(one.repeats for one in group if one.example.is_reg == reg)


def _aspect_error(one: Placed) -> float:
    (width, height), bucket = one.example.size, one.where.bucket
    return abs(bucket[0] / bucket[1] - width / height)
