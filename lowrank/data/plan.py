"""Which images make which batch: placement, regularisation balance, the order of an epoch. Pure functions."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowrank.data import buckets
from lowrank.data.captions import varies_tags
from lowrank.data.dataset import Dataset, Example, Subset
from lowrank.errors import Refused

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Placed:
    """An example with its dataset, its bucket and how often an epoch shows it."""

    example: Example
    dataset: Dataset
    where: buckets.Placement
    repeats: int

    @property
    def subset(self) -> Subset:
        """The subset that lists the example."""
        return self.dataset.subsets[self.example.subset]

    @property
    def interpolation(self) -> str | None:
        """The filter that scales the image: that of its subset, otherwise that of its dataset."""
        return self.subset.augmentation.resize_interpolation or self.dataset.resize_interpolation


def random_stream(*parts: object) -> random.Random:
    """A random stream named by `parts`, equal on every machine and Python version."""
    return random.Random("/".join(map(str, parts)))


def place_image(size: buckets.Size, dataset: Dataset) -> buckets.Placement:
    """The place of an image of this size (w, h) in this dataset.

    Without bucketing the only bucket is the resolution itself. The image is always scaled to cover its
    bucket; sd-scripts leaves an image that is not cached unscaled there, and fails on a small one. Raises
    `Refused` where `bucket_no_upscale` leaves a side below one step.
    """
    width, height = dataset.resolution
    if not dataset.enable_bucket:
        bucket = dataset.resolution
    elif dataset.bucket_no_upscale:
        return buckets.own_place(size, width * height, dataset.bucket_reso_steps)
    else:
        limits = dataset.min_bucket_reso, dataset.max_bucket_reso, dataset.bucket_reso_steps
        bucket = buckets.choose(size, buckets.bucket_sizes(dataset.resolution, *limits))
    return buckets.Placement(bucket, buckets.cover(size, bucket))


def hold_out(dataset: Dataset, examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """(the examples that are trained on, those held out for validation), each in its order.

    Each folder is shuffled by `validation_seed` (else `seed`), and the last round(n · validation_split)
    images are held out: those that sd-scripts validates with. sd-scripts trains on the first
    ⌈n (1 − validation_split)⌉, so that an image may be on both sides; here a held-out image is not trained
    on. Regularisation images are never held out.
    """
    if not dataset.validation_split:
        return list(examples), []
    seed = seed if dataset.validation_seed is None else dataset.validation_seed
    trained: set[int] = set()
    for index, subset in enumerate(dataset.subsets):
        numbers = [number for number, example in enumerate(examples) if example.subset == index]
        if not subset.is_reg:
            random.Random(seed).shuffle(numbers)
            numbers = numbers[: len(numbers) - round(len(numbers) * dataset.validation_split)]
        trained.update(numbers)
    return (
        [example for number, example in enumerate(examples) if number in trained],
        [example for number, example in enumerate(examples) if number not in trained],
    )


def split_holdout(
    datasets: Sequence[Dataset], scanned: Sequence[Sequence[Example]], seed: int
) -> tuple[list[list[Example]], list[list[Example]]]:
    """`hold_out` for each dataset; an image that another dataset trains on is not held out.

    Raises `Refused` when nothing is left to train on.
    """
    parts = [hold_out(*pair, seed) for pair in zip(datasets, scanned, strict=True)]
    trained = {example.path for train, _ in parts for example in train if not example.is_reg}
    held_out = [[example for example in part if example.path not in trained] for _, part in parts]
    if any(held_out) and not trained:
        raise Refused("validation_split holds out every image; lower it, or add images")
    if not any(held_out) and any(dataset.validation_split for dataset in datasets):
        log.warning("validation_split holds out no image, the folders have too few; raise it or add images")
    return [train for train, _ in parts], held_out


def without_variation(dataset: Dataset) -> Dataset:
    """The dataset for validation: only the order of tags is random, and a seed fixes it."""
    subsets = (
        replace(
            subset,
            num_repeats=1,
            augmentation=replace(subset.augmentation, color_aug=False, flip_aug=False, random_crop=False),
            captions=replace(
                subset.captions,
                shuffle_caption=varies_tags(subset.captions),  # tags are still split, to drop separators
                caption_dropout_rate=0.0,
                caption_dropout_every_n_epochs=0,
                caption_tag_dropout_rate=0.0,
                token_warmup_step=0.0,
            ),
        )
        for subset in dataset.subsets
    )
    return replace(dataset, subsets=tuple(subsets), validation_split=0.0)


def place_examples(dataset: Dataset, examples: Sequence[Example]) -> tuple[Placed, ...]:
    """Training images, then the regularisation images in use, each with its bucket and final repeats."""
    placed = [
        Placed(example, dataset, place_image(example.size, dataset), example.repeats) for example in examples
    ]
    train = [image for image in placed if not image.example.is_reg]
    reg = [image for image in placed if image.example.is_reg]
    return (*train, *balanced(reg, sum(image.repeats for image in train)))


def balanced(reg: Sequence[Placed], total: int) -> list[Placed]:
    """The regularisation images in use, by sd-scripts' rule.

    They are taken in order with their repeats, then each in turn gets one repeat more, until there are
    `total`; images beyond `total` are not used.
    """
    counts: list[int] = []
    reached = 0
    for image in reg:
        if reached >= total:
            break
        counts.append(image.repeats)
        reached += image.repeats
    rounds, extra = divmod(max(total - reached, 0), len(counts)) if counts else (0, 0)
    return [
        replace(image, repeats=count + rounds + (i < extra))
        for i, (image, count) in enumerate(zip(reg, counts, strict=False))
    ]


def log_plan(dataset: Dataset, examples: Sequence[Example], placed: Sequence[Placed]) -> None:
    """Warn of unused regularisation images and of images that are mostly cropped away."""
    reg = sum(example.is_reg for example in examples)
    used = sum(image.example.is_reg for image in placed)
    if used < reg:
        log.warning(
            "there are more regularisation than training images: %d of %d are not used", reg - used, reg
        )
    cut = [image for image in placed if _kept_share(image.where) < 0.5]
    if cut:
        first = cut[0]
        log.warning(
            "%d images lose more than half of their area in the crop; the first is %s, %dx%d into bucket "
            "%dx%d%s",
            len(cut),
            first.example.path,
            *first.example.size,
            *first.where.bucket,
            "" if dataset.enable_bucket else "; give --enable_bucket to keep more",
        )


def check_sides(dataset: Dataset, placed: Sequence[Placed], multiple: int) -> None:
    """Raise `Refused` for a bucket with a side that is not a multiple of `multiple` pixels."""
    for width, height in by_bucket(placed):
        if width % multiple or height % multiple:
            option = "bucket_reso_steps" if dataset.enable_bucket else "resolution"
            raise Refused(
                f"images of {width}x{height} do not fit this model, whose sides are multiples of {multiple}; "
                f"give a --{option} that is a multiple of {multiple}"
            )


def _kept_share(where: buckets.Placement) -> float:
    (width, height), (whole_width, whole_height) = where
    return width * height / (whole_width * whole_height)


def batch_count(groups: Sequence[Sequence[Placed]]) -> int:
    """Batches of one epoch: over datasets and buckets, images x repeats by the batch size, rounded up."""
    return sum(
        -(-sum(image.repeats for image in members) // members[0].dataset.batch_size)
        for placed in groups
        for members in by_bucket(placed).values()
    )


def by_bucket(placed: Sequence[Placed]) -> dict[buckets.Size, list[Placed]]:
    """The members of each bucket, buckets sorted."""
    members: dict[buckets.Size, list[Placed]] = {}
    for image in placed:
        members.setdefault(image.where.bucket, []).append(image)
    return dict(sorted(members.items()))


def epoch_batches(groups: Sequence[Sequence[Placed]], seed: int, epoch: int) -> list[tuple[Placed, ...]]:
    """All batches of an epoch, in order; they depend on seed + epoch only.

    Each bucket is shuffled and cut into batches (the last may be smaller), then the batches of all buckets
    and datasets are shuffled.
    """
    order = random_stream(seed + epoch, "order")
    batches: list[tuple[Placed, ...]] = []
    for placed in groups:
        for members in by_bucket(placed).values():
            copies = [image for image in members for _ in range(image.repeats)]
            order.shuffle(copies)
            size = members[0].dataset.batch_size
            batches += [tuple(copies[i : i + size]) for i in range(0, len(copies), size)]
    order.shuffle(batches)
    return batches


def crop_top_left(size: buckets.Size, bucket: buckets.Size, *, flipped: bool = False) -> tuple[int, int]:
    """SDXL's crop conditioning (top, left), as sd-scripts computes it.

    It is half the gap between the bucket and the image *contained* in it, so never negative and not the true
    crop offset; a flipped image has the mirrored left side.
    """
    aspect = size[0] / size[1]
    if bucket[0] / bucket[1] > aspect:
        inner = bucket[1] * aspect, float(bucket[1])
    else:
        inner = float(bucket[0]), bucket[0] / aspect
    left, top = (bucket[0] - inner[0]) // 2, (bucket[1] - inner[1]) // 2
    return int(top), int(bucket[0] - inner[0] - left if flipped else left)
