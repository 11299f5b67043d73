"""Batches of an epoch, in an order and with choices that depend on nothing but (seed, epoch, position).

Nothing is drawn from a global random stream and no worker has state: a run resumed at (epoch, position)
yields what the uninterrupted one would have, with any number of threads.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lowrank.data import captions, images, plan
from lowrank.data.buckets import crop_box, crop_top_left
from lowrank.data.cache import Cache
from lowrank.data.dataset import Dataset, Example
from lowrank.data.encode import Encoded, encode_all
from lowrank.data.plan import Placed
from lowrank.data.prefetch import ahead
from lowrank.data.scan import scan
from lowrank.errors import Refused

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Batch:
    """B images of one bucket (W, H). Either `pixels` or `encoded` is there, the other is None.

    `position` is the batch's index in its epoch over all processes: noise seeded with (seed, epoch, position)
    is the same however the batches are shared out. `masks` is None unless a subset in the batch has
    `alpha_mask` or `conditioning_data_dir`; it has the size of the pixels, or in the cached case of the
    latents.
    """

    epoch: int
    position: int
    examples: tuple[Example, ...]
    captions: tuple[str, ...]
    pixels: Tensor | None  # (B, 3, H, W) in [-1, 1]
    encoded: Tensor | None  # (B, …) as `encode` gave it
    loss_weights: Tensor  # (B,) 1, or prior_loss_weight for regularisation images
    original_sizes: Tensor  # (B, 2) height, width of the upright image
    crop_top_lefts: Tensor  # (B, 2) top, left as SDXL is conditioned on it
    target_sizes: Tensor  # (B, 2) H, W
    masks: Tensor | None  # (B, 1, H or h, W or w) in [0, 1]


class Loader:
    """All batches of several datasets; immutable, so `shard` and `encode_all` return another loader.

    What `validation_split` holds out is not in it but in `held_out()`. Raises `Refused` for what `scan`
    refuses, and for a bucket side that is not a multiple of `multiple` (what one latent, or one patch of
    latents, covers). `examples` are the datasets' own where they have been scanned before.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        *,
        seed: int,
        prior_loss_weight: float = 1.0,
        skip_bad_images: bool = False,
        workers: int = 2,
        multiple: int = 1,
        examples: Sequence[Sequence[Example]] | None = None,
    ) -> None:
        self.datasets = tuple(datasets)
        self.seed, self.prior_loss_weight, self.skip_bad_images = seed, prior_loss_weight, skip_bad_images
        self.workers, self.rank, self.world = min(workers, os.cpu_count() or 1), 0, 1
        self._encoded: Encoded | None = None
        found = examples or [scan(dataset, skip_bad_images=skip_bad_images) for dataset in self.datasets]
        found, self._held = plan.split_holdout(self.datasets, found, seed)
        self._plan(found)
        for dataset, all_of_it, placed in zip(self.datasets, self.examples, self.groups, strict=True):
            plan.log_plan(dataset, all_of_it, placed)
        self._check_sides(multiple)

    def held_out(self) -> Loader | None:
        """What `validation_split` keeps from training, as an unshared loader; None where that is nothing.

        Each image comes once, as it is, with the caption that the seed draws: epoch 0 is always the same.
        """
        plain = [plan.unvaried(dataset) for dataset in self.datasets]
        once = [[replace(one, repeats=1) for one in held] for held in self._held]
        how = {"seed": self.seed, "skip_bad_images": self.skip_bad_images, "workers": self.workers}
        return Loader(plain, examples=once, **how) if any(once) else None

    def _plan(self, examples: Sequence[Sequence[Example]]) -> None:
        self.examples: tuple[tuple[Example, ...], ...] = tuple(map(tuple, examples))
        self.groups = tuple(
            plan.place_examples(*pair) for pair in zip(self.datasets, self.examples, strict=True)
        )
        self._count = plan.batch_count(self.groups)
        if not self._count:
            raise Refused(
                "no training image is left to make a batch of; give a folder with images that can be read"
            )

    def _check_sides(self, multiple: int) -> None:
        for dataset, placed in zip(self.datasets, self.groups, strict=True):
            for bucket in plan.by_bucket(placed):
                if bucket[0] % multiple or bucket[1] % multiple:
                    option = "bucket_reso_steps" if dataset.enable_bucket else "resolution"
                    raise Refused(
                        f"pictures of {bucket[0]}x{bucket[1]} do not fit this model, whose sides are "
                        f"multiples of {multiple}; give a --{option} that is a multiple of {multiple}"
                    )

    def __len__(self) -> int:
        """Batches per epoch of one process."""
        return -(-self._count // self.world)

    @property
    def placed(self) -> tuple[Placed, ...]:
        """The images in use, over all datasets."""
        return tuple(one for group in self.groups for one in group)

    @property
    def encoded(self) -> bool:
        """Whether batches hold encodings in place of pixels."""
        return self._encoded is not None

    def captions(self) -> tuple[str, ...] | None:
        """Every caption that can occur, sorted; None when open-ended, so that none can be cached."""
        found: set[str] = set()
        for one in self.placed:
            texts = captions.possible_captions(one.example, one.subset)
            if texts is None:
                return None
            found.update(texts)
        return tuple(sorted(found))

    def shard(self, rank: int, world: int) -> Loader:
        """The part of process `rank` of `world`: batches rank, rank + world, … of every epoch's list.

        Where the list is no multiple of `world`, the last ones wrap around to its start, so that every
        process has equally many batches.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of {world} processes")
        other = copy.copy(self)
        other.rank, other.world = rank, world
        return other

    def decodable(self) -> Loader:
        """This loader after decoding every image once: broken ones are refused, or left out and listed.

        For runs without cached latents; `encode_all` does the same on its way.
        """
        files = dict.fromkeys((one.example.path, one.example.mask) for one in self.placed)
        return self._without(images.undecodable(files, workers=self.workers))

    def _without(self, bad: dict[Path, str]) -> Loader:
        if not bad:
            return self
        if not self.skip_bad_images:
            more = f" ({len(bad) - 1} more images have a problem)" if len(bad) > 1 else ""
            raise Refused(next(iter(bad.values())) + more)
        for reason in bad.values():
            log.warning("skipped: %s", reason)
        other = copy.copy(self)
        other._plan([[one for one in examples if one.path not in bad] for examples in self.examples])
        return other

    def encode_all(
        self,
        encode: Callable[[Tensor], Tensor],
        *,
        model_hash: str,
        cache: Cache,
        batch_size: int = 1,
        progress: bool = False,
        wait: Callable[[], None] | None = None,
    ) -> Loader:
        """A loader that yields `encoded` instead of pixels; `encode` maps (B, 3, H, W) in [-1, 1] to (B, …).

        Everything the cache lacks is encoded now, also the mirror image where `flip_aug` is on. Images that
        cannot be decoded are refused, or left out with `skip_bad_images`. With a disk cache, several
        processes (`shard`) share the work when `wait` is a barrier of all of them. Raises `Refused` with
        `color_aug` or `random_crop`.
        """
        for one in self.placed:
            for option in ("color_aug", "random_crop"):
                if getattr(one.subset, option):
                    raise Refused(
                        f"{option} of {one.subset.image_dir} changes the picture each time, so its latents "
                        f"cannot be cached; remove --{option} or --cache_latents"
                    )
        loader = self
        while True:  # again after leaving images out: regularisation images may have taken their place
            encoded, bad = encode_all(
                loader.placed,
                encode,
                model_hash=model_hash,
                cache=cache,
                batch_size=batch_size,
                workers=self.workers,
                progress=progress,
                share=(self.rank, self.world),
                wait=wait,
            )
            if not bad:
                break
            loader = loader._without(bad)
        loader = copy.copy(loader)
        loader._encoded = encoded
        return loader

    def epoch(
        self, epoch: int, start: int = 0, *, max_train_steps: int | None = None, batches_per_step: int = 1
    ) -> Iterator[Batch]:
        """Batches `start`, `start` + 1, … of this process in epoch `epoch` (both from 0).

        The two keywords matter only for `token_warmup_step`, which counts optimizer steps: `batches_per_step`
        is accumulation x processes.
        """
        batches = plan.epoch_batches(self.groups, self.seed, epoch)
        before = epoch * len(self) * self.world

        def make(turn: int) -> Batch:
            position = turn * self.world + self.rank
            step = (before + position) // batches_per_step
            return self._batch(
                batches[position % self._count], epoch, position % self._count, step, max_train_steps
            )

        in_memory = self._encoded is not None and self._encoded.cache.folder is None
        return ahead(make, range(start, len(self)), workers=0 if in_memory else self.workers)

    def _batch(
        self, members: tuple[Placed, ...], epoch: int, position: int, step: int, max_train_steps: int | None
    ) -> Batch:
        def streams(purpose: str):
            return [
                plan.random_stream(self.seed, epoch, position, row, purpose) for row in range(len(members))
            ]

        flips = [
            one.subset.flip_aug and draw.random() < 0.5
            for one, draw in zip(members, streams("flip"), strict=True)
        ]
        texts = [
            captions.draw_caption(
                one.example, one.subset, rng, epoch=epoch, step=step, max_train_steps=max_train_steps
            )
            for one, rng in zip(members, streams("caption"), strict=True)
        ]
        if self._encoded is None:
            rows = [
                _pixels(*row) for row in zip(members, flips, streams("crop"), streams("color"), strict=True)
            ]
        else:
            entries = [self._encoded.get(item) for item in zip(members, flips, strict=True)]
            rows = [(entry["latents"], entry.get("mask")) for entry in entries]
        stacked = torch.stack([tensor for tensor, _ in rows])
        bucket = members[0].where.bucket
        return Batch(
            epoch,
            position,
            tuple(one.example for one in members),
            tuple(texts),
            pixels=stacked if self._encoded is None else None,
            encoded=None if self._encoded is None else stacked,
            loss_weights=torch.tensor(
                [self.prior_loss_weight if one.example.is_reg else 1.0 for one in members]
            ),
            original_sizes=torch.tensor([one.example.size[::-1] for one in members]),
            crop_top_lefts=torch.tensor(
                [
                    crop_top_left(one.example.size, bucket, flipped=flip)
                    for one, flip in zip(members, flips, strict=True)
                ]
            ),
            target_sizes=torch.tensor([bucket[::-1]] * len(members)),
            masks=_masks([mask for _, mask in rows], stacked.shape[-2:]),
        )


def _pixels(one: Placed, flip: bool, crop, color) -> tuple[Tensor, Tensor | None]:
    box = crop_box(one.where, crop if one.subset.random_crop else None)
    return images.load_image(
        one.example.path,
        one.where,
        box,
        interpolation=one.interpolation,
        flip=flip,
        color=color if one.subset.color_aug else None,
        alpha=one.subset.alpha_mask,
        mask_file=one.example.mask,
    )


def _masks(masks: list[Tensor | None], size: torch.Size) -> Tensor | None:
    if all(mask is None for mask in masks):
        return None
    return torch.stack([torch.ones(1, *size) if mask is None else mask for mask in masks])  # (B, 1, h, w)
