"""The content of a loader as plain data: for logs, `--dry_run` and kohya's `ss_*` metadata."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lowrank.data import plan
from lowrank.data.dataset import Dataset, Example, Subset
from lowrank.data.loader import Loader
from lowrank.data.plan import Placed

_SUBSET_OPTIONS = (
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
_DATASET_OPTIONS = ("enable_bucket", "min_bucket_reso", "max_bucket_reso", "resize_interpolation")


def dataset_summary(loader: Loader) -> dict[str, Any]:
    """Counts of a loader: per dataset the folders, images, repeats, and the content of each bucket."""
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
                        "images": _count(examples, index),
                        "captions": sum(e.subset == index and e.captioned for e in examples),
                    }
                    for index, subset in enumerate(dataset.subsets)
                ],
                "buckets": {
                    f"{w}x{h}": sum(image.repeats for image in members)
                    for (w, h), members in plan.by_bucket(group).items()
                },
            }
            for dataset, examples, group in zip(loader.datasets, loader.examples, loader.groups, strict=True)
        ],
    }


def describe(loader: Loader) -> list[str]:
    """Lines for people: the folders with pictures, repeats and captions, and the buckets."""
    lines = []
    for number, dataset in enumerate(dataset_summary(loader)["datasets"]):
        width, height = dataset["resolution"]
        lines.append(f"dataset {number}: {width}×{height}, batch {dataset['batch_size']}")
        for place in dataset["folders"]:
            kind = "regularisation" if place["is_reg"] else "training"
            lines.append(
                f"  {place['image_dir']}: {place['images']} {kind} images × {place['repeats']}, "
                f"{place['captions']} with captions"
            )
        lines += [f"  bucket {bucket}: {count}" for bucket, count in dataset["buckets"].items()]
    return lines


def tag_frequency(loader: Loader, index: int | None = None) -> dict[str, dict[str, int]]:
    """`ss_tag_frequency` of one dataset or all: folder name to lower-case tag to number of images.

    A folder of several datasets is counted in the first of them.
    """
    frequency: dict[str, dict[str, int]] = {}
    pairs = list(zip(loader.datasets, loader.examples, strict=True))
    for dataset, examples in pairs if index is None else [pairs[index]]:
        counts: dict[str, Counter[str]] = {}
        for example in examples:
            counts.setdefault(dataset.subsets[example.subset].label, Counter()).update(
                tag.strip().lower() for line in example.captions for tag in line.split(",") if tag.strip()
            )
        frequency = {folder: dict(tags) for folder, tags in counts.items()} | frequency
    return frequency


def dataset_dirs(loader: Loader, *, reg: bool = False) -> dict[str, dict[str, int]]:
    """`ss_dataset_dirs`, or `ss_reg_dataset_dirs` with `reg`: folder name to n_repeats and img_count.

    The second folder of one name is `name (2)`, as in sd-scripts.
    """
    folders: dict[str, dict[str, int]] = {}
    for dataset, examples in zip(loader.datasets, loader.examples, strict=True):
        for number, subset in enumerate(dataset.subsets):
            if subset.is_reg == reg:
                names = itertools.chain([subset.label], (f"{subset.label} ({i})" for i in itertools.count(2)))
                folders[next(name for name in names if name not in folders)] = {
                    "n_repeats": subset.num_repeats,
                    "img_count": _count(examples, number),
                }
    return folders


def bucket_info(loader: Loader, index: int = 0) -> dict[str, Any] | None:
    """`ss_bucket_info` of one dataset: images x repeats per bucket, mean aspect error; or None."""
    placed = loader.groups[index]
    if not loader.datasets[index].enable_bucket or not placed:
        return None
    return {
        "buckets": {
            str(number): {"resolution": list(bucket), "count": sum(image.repeats for image in members)}
            for number, (bucket, members) in enumerate(plan.by_bucket(placed).items())
        },
        "mean_img_ar_error": sum(map(_aspect_error, placed)) / len(placed),
    }


def metadata_datasets(loader: Loader) -> list[dict[str, Any]]:
    """`ss_datasets`: one dict per dataset with its subsets, by kohya's keys; to be written as JSON."""
    return [_dataset_facts(loader, index, dataset) for index, dataset in enumerate(loader.datasets)]


def _dataset_facts(loader: Loader, index: int, dataset: Dataset) -> dict[str, Any]:
    group, examples = loader.groups[index], loader.examples[index]
    return {
        "is_dreambooth": all(subset.metadata_file is None for subset in dataset.subsets),
        "batch_size_per_device": dataset.batch_size,
        "num_train_images": _total(group, reg=False),
        "num_reg_images": _total(group, reg=True),
        "resolution": list(dataset.resolution),
        **{name: getattr(dataset, name) for name in _DATASET_OPTIONS},
        "tag_frequency": tag_frequency(loader, index),
        "bucket_info": bucket_info(loader, index),
        "subsets": [
            {"img_count": _count(examples, number), **_subset_facts(subset)}
            for number, subset in enumerate(dataset.subsets)
        ],
    }


def _subset_facts(subset: Subset) -> dict[str, Any]:
    facts = {name: subset.value(name) for name in _SUBSET_OPTIONS} | {"image_dir": subset.image_dir.name}
    if subset.metadata_file:
        return facts | {"metadata_file": subset.label}
    return facts | {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}


def _count(examples: Sequence[Example], subset: int) -> int:
    return sum(example.subset == subset for example in examples)


def count_regularisation(loader: Loader) -> int:
    """Regularisation images times their folder's repeats, as kohya's metadata count them: not balanced."""
    return sum(example.repeats for part in loader.examples for example in part if example.is_reg)


def _total(group: Sequence[Placed], *, reg: bool) -> int:
    return sum(image.repeats for image in group if image.example.is_reg == reg)


def _aspect_error(image: Placed) -> float:
    (width, height), bucket = image.example.size, image.where.bucket
    return abs(bucket[0] / bucket[1] - width / height)
