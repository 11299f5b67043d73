"""Which images make which batch: placement, regularisation balance, the order of an epoch. Pure."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowrank.data import buckets
from lowrank.data.dataset import Dataset, Example, Subset
from lowrank.errors import Refused

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placed:
    """An example with its dataset, its bucket and how often it comes in an epoch."""

    example: Example
    dataset: Dataset
    where: buckets.Placement
    repeats: int

    @property
    def subset(self) -> Subset:
        """The subset the example was found in."""
        return self.dataset.subsets[self.example.subset]

    @property
    def interpolation(self) -> str | None:
        """How the image is scaled: its subset's word, or its dataset's."""
        return self.subset.resize_interpolation or self.dataset.resize_interpolation


def random_stream(*parts: object) -> random.Random:
    """An own random stream for that name; the same on every machine and Python version."""
    return random.Random("/".join(map(str, parts)))


def hold_out(dataset: Dataset, examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """(the examples that are trained on, those held out for validation), each in its order.

    Each folder is shuffled by `validation_seed` (else `seed`), and the last round(n · validation_split)
    images are held out: those that sd-scripts validates with. It trains on the first
    ⌈n (1 − validation_split)⌉, so that one may be on both sides; here it is not trained on. Regularisation
    images are never held out.
    """
    if not dataset.validation_split:
        return list(examples), []
    seed = seed if dataset.validation_seed is None else dataset.validation_seed
    trained: set[int] = set()
    for index, subset in enumerate(dataset.subsets):
        own = [number for number, one in enumerate(examples) if one.subset == index]
        if not subset.is_reg:
            random.Random(seed).shuffle(own)
            own = own[: len(own) - round(len(own) * dataset.validation_split)]
        trained.update(own)
    return (
        [one for number, one in enumerate(examples) if number in trained],
        [one for number, one in enumerate(examples) if number not in trained],
    )


def split_holdout(
    datasets: Sequence[Dataset], found: Sequence[Sequence[Example]], seed: int
) -> tuple[list[list[Example]], list[list[Example]]]:
    """`hold_out` for each dataset; an image that another dataset trains on is not held out.

    Raises `Refused` when nothing is left to train on.
    """
    parts = [hold_out(*pair, seed) for pair in zip(datasets, found, strict=True)]
    trained = {one.path for train, _ in parts for one in train if not one.is_reg}
    held = [[one for one in rest if one.path not in trained] for _, rest in parts]
    if any(held) and not trained:
        raise Refused("validation_split holds out every image; lower it, or add images")
    if not any(held) and any(dataset.validation_split for dataset in datasets):
        log.warning("validation_split holds out no image, the folders have too few; raise it or add images")
    return [train for train, _ in parts], held


def unvaried(dataset: Dataset) -> Dataset:
    """The dataset for validation: nothing is drawn at random but the order of tags, which a seed fixes."""
    subsets = (
        replace(
            subset,
            shuffle_caption=subset.varies_tags,  # the tags are still taken apart, so that separators go
            num_repeats=1,
            color_aug=False,
            flip_aug=False,
            random_crop=False,
            caption_dropout_rate=0.0,
            caption_dropout_every_n_epochs=0,
            caption_tag_dropout_rate=0.0,
            token_warmup_step=0.0,
        )
        for subset in dataset.subsets
    )
    return replace(dataset, subsets=tuple(subsets), validation_split=0.0)


def place_examples(dataset: Dataset, examples: Sequence[Example]) -> tuple[Placed, ...]:
    """Training images, then the regularisation images in use, each with its bucket and final repeats."""
    placed = [Placed(one, dataset, buckets.place_image(one.size, dataset), one.repeats) for one in examples]
    train = [one for one in placed if not one.example.is_reg]
    reg = [one for one in placed if one.example.is_reg]
    return (*train, *balanced(reg, sum(one.repeats for one in train)))


def balanced(reg: Sequence[Placed], total: int) -> list[Placed]:
    """The regularisation images in use, by sd-scripts' rule.

    They are taken in order with their repeats, then each in turn gets one repeat more, until there are
    `total`; what is left over is not used.
    """
    counts: list[int] = []
    reached = 0
    for one in reg:
        if reached >= total:
            break
        counts.append(one.repeats)
        reached += one.repeats
    rounds, rest = divmod(max(total - reached, 0), len(counts)) if counts else (0, 0)
    return [
        replace(one, repeats=count + rounds + (i < rest))
        for i, (one, count) in enumerate(zip(reg, counts, strict=False))
    ]


def log_plan(dataset: Dataset, examples: Sequence[Example], placed: Sequence[Placed]) -> None:
    """Log what a user may not expect: unused regularisation images, images that are mostly cropped away."""
    reg = sum(example.is_reg for example in examples)
    used = sum(one.example.is_reg for one in placed)
    if used < reg:
        log.warning(
            "there are more regularisation than training images: %d of %d are not used", reg - used, reg
        )
    cut = [one for one in placed if _kept(one) < 0.5]
    if cut:
        first = cut[0]
        log.warning(
            "%d images lose more than half of their picture in the crop; the first is %s, %dx%d into bucket "
            "%dx%d%s",
            len(cut),
            first.example.path,
            *first.example.size,
            *first.where.bucket,
            "" if dataset.enable_bucket else " (enable_bucket helps)",
        )


def _kept(one: Placed) -> float:
    (width, height), (whole_width, whole_height) = one.where
    return width * height / (whole_width * whole_height)


def batch_count(groups: Sequence[Sequence[Placed]]) -> int:
    """Batches of one epoch: over datasets and buckets, images x repeats by the batch size, rounded up."""
    return sum(
        -(-sum(one.repeats for one in members) // members[0].dataset.batch_size)
        for placed in groups
        for members in by_bucket(placed).values()
    )


def by_bucket(placed: Sequence[Placed]) -> dict[buckets.Size, list[Placed]]:
    """The members of each bucket, buckets sorted."""
    members: dict[buckets.Size, list[Placed]] = {}
    for one in placed:
        members.setdefault(one.where.bucket, []).append(one)
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
            copies = [one for one in members for _ in range(one.repeats)]
            order.shuffle(copies)
            size = members[0].dataset.batch_size
            batches += [tuple(copies[i : i + size]) for i in range(0, len(copies), size)]
    order.shuffle(batches)
    return batches
