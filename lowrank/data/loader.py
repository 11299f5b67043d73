"""Batches of an epoch, in an order and with random choices that depend on (seed, epoch, position) only.

No global random stream is used and no worker has state: a run resumed at (epoch, position) yields the batches
of an uninterrupted run, with any number of threads.
"""

from __future__ import annotations

import copy
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lowrank.data import images, plan
from lowrank.data.buckets import crop_box
from lowrank.data.cache import Cache
from lowrank.data.captions import draw_caption, possible_captions
from lowrank.data.dataset import Dataset, Example
from lowrank.data.encode import Item, encode_images, files_of, undecodable
from lowrank.data.images import Content, content_of
from lowrank.data.plan import Placed
from lowrank.data.prefetch import ahead
from lowrank.data.scan import report_bad, scan
from lowrank.errors import Refused

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Batch:
    """B images of one bucket (W, H), with either `pixels` or `encoded`; the other is None.

    `position` is the batch's index in its epoch over all processes: noise seeded with (seed, epoch, position)
    does not depend on the number of processes. `masks` is None unless a subset in the batch has `alpha_mask`
    or `conditioning_data_dir`; it has the size of the pixels, or with `encoded` that of the latents.
    """

    epoch: int
    position: int
    examples: tuple[Example, ...]
    captions: tuple[str, ...]
    pixels: Tensor | None  # (B, 3, H, W) in [-1, 1]
    encoded: Tensor | None  # (B, …), results of `encode`
    loss_weights: Tensor  # (B,) 1, or prior_loss_weight for regularisation images
    original_sizes: Tensor  # (B, 2) height, width of the upright image
    crop_top_lefts: Tensor  # (B, 2) top, left: SDXL's crop condition
    target_sizes: Tensor  # (B, 2) H, W
    masks: Tensor | None  # (B, 1, H or h, W or w) in [0, 1]
    preserved: Tensor | None = None  # (B,) True: the target is the base's prediction; None: for no image


class Loader:
    """All batches of several datasets; immutable, so `shard` and `encode_all` return another loader.

    Images that `validation_split` holds out are in the loader `held_out()` instead. Raises `Refused` for
    every reason of `scan`, and for a bucket side that is not a multiple of `multiple` (the pixels of one
    latent, or of one patch of latents). `examples` are those of the datasets where they are scanned already.
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
        self._cache: Cache | None = None
        self._keys: dict[Item, str] = {}
        self._content: dict[Path, Content] = {}
        scanned = examples or [scan(dataset, skip_bad_images=skip_bad_images) for dataset in self.datasets]
        trained, self._held_out = plan.split_holdout(self.datasets, scanned, seed)
        self._plan(trained)
        for dataset, members, placed in zip(self.datasets, self.examples, self.groups, strict=True):
            plan.log_plan(dataset, members, placed)
            plan.check_sides(dataset, placed, multiple)

    def held_out(self) -> Loader | None:
        """The images that `validation_split` keeps from training, as an unshared loader; None without any.

        Each image comes once, without augmentation, with the caption that the seed draws: epoch 0 never
        changes.
        """
        if not any(self._held_out):
            return None
        return Loader(
            [plan.without_variation(dataset) for dataset in self.datasets],
            examples=[[replace(example, repeats=1) for example in part] for part in self._held_out],
            seed=self.seed,
            skip_bad_images=self.skip_bad_images,
            workers=self.workers,
        )

    def _plan(self, examples: Sequence[Sequence[Example]]) -> None:
        self.examples: tuple[tuple[Example, ...], ...] = tuple(map(tuple, examples))
        self.groups = tuple(map(plan.place_examples, self.datasets, self.examples))
        self._count = plan.batch_count(self.groups)
        if not self._count:
            raise Refused(
                "no training image is left to make a batch of; give a folder with images that can be read"
            )

    def __len__(self) -> int:
        """Batches per epoch of one process."""
        return -(-self._count // self.world)

    @property
    def placed(self) -> tuple[Placed, ...]:
        """The images in use, over all datasets."""
        return tuple(image for group in self.groups for image in group)

    @property
    def encoded(self) -> bool:
        """Whether batches hold encodings in place of pixels."""
        return self._cache is not None

    def captions(self) -> tuple[str, ...] | None:
        """Every caption that can occur, sorted; None when open-ended, so that none can be cached."""
        captions: set[str] = set()
        for image in self.placed:
            texts = possible_captions(image.example, image.subset.captions)
            if texts is None:
                return None
            captions.update(texts)
        return tuple(sorted(captions))

    def shard(self, rank: int, world: int) -> Loader:
        """The part of process `rank` of `world`: batches rank, rank + world, … of every epoch's list.

        Where the length of the list is no multiple of `world`, the last batches are repeated from its start,
        so that every process has equally many batches.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of {world} processes")
        other = copy.copy(self)
        other.rank, other.world = rank, world
        return other

    def decodable(self) -> Loader:
        """This loader after decoding every image once: broken images are refused, or left out and logged.

        For runs without cached latents; `encode_all` checks this too. The images are read again in each
        epoch, and a batch with an image that has changed since raises `Refused`.
        """
        files = dict.fromkeys((image.example.path, image.example.mask) for image in self.placed)
        bad = undecodable(files, workers=self.workers)
        other = copy.copy(self._without(bad))
        other._content = {path: content_of(path) for image in other.placed for path in files_of(image)}
        return other

    def _without(self, bad: dict[Path, str]) -> Loader:
        if not bad:
            return self
        report_bad(list(bad.values()), skip=self.skip_bad_images)
        other = copy.copy(self)
        other._plan([[item for item in examples if item.path not in bad] for examples in self.examples])
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

        Every image that the cache lacks is encoded now, also mirrored where `flip_aug` is on. Images that
        cannot be decoded are refused, or left out with `skip_bad_images`. With a disk cache, several
        processes (`shard`) share the work when `wait` is a barrier of all of them. Raises `Refused` with
        `color_aug` or `random_crop`.
        """
        for image in self.placed:
            for option in ("color_aug", "random_crop"):
                if getattr(image.subset.augmentation, option):
                    raise Refused(
                        f"{option} of {image.subset.image_dir} changes the image each time, so its latents "
                        f"cannot be cached; remove --{option} or --cache_latents"
                    )
        loader = self
        while True:  # again after leaving images out: regularisation images may have replaced them
            keys, bad = encode_images(
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
        loader._cache, loader._keys = cache, keys
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
            position %= self._count
            return self._batch(batches[position], epoch, position, step, max_train_steps)

        turns = range(start, len(self))
        if self._cache is not None and self._cache.folder is None:
            return map(make, turns)  # from memory: threads would only cost time
        return ahead(make, turns, workers=self.workers)

    def _batch(
        self, members: tuple[Placed, ...], epoch: int, position: int, step: int, max_train_steps: int | None
    ) -> Batch:
        flips: list[bool] = []
        captions: list[str] = []
        rows: list[tuple[Tensor, Tensor | None]] = []  # pixels or latents, and the mask
        for row, image in enumerate(members):

            def stream(purpose: str, row: int = row) -> random.Random:
                return plan.random_stream(self.seed, epoch, position, row, purpose)

            flip = image.subset.augmentation.flip_aug and stream("flip").random() < 0.5
            flips.append(flip)
            captions.append(
                draw_caption(
                    image.example,
                    image.subset.captions,
                    stream("caption"),
                    epoch=epoch,
                    step=step,
                    max_train_steps=max_train_steps,
                )
            )
            if self._cache is None:
                for path in files_of(image):
                    if path in self._content and self._content[path].differs(path):
                        raise Refused(
                            f"image {path} has changed since the run began; put the old one back and "
                            "continue with --resume, or train anew"
                        )
                rows.append(_load_pixels(image, flip, stream("crop"), stream("color")))
            else:
                entry = self._cache.get(self._keys[image, flip])
                rows.append((entry["latents"], entry.get("mask")))
        stacked = torch.stack([tensor for tensor, _ in rows])
        bucket = members[0].where.bucket
        weights = [self.prior_loss_weight if image.example.is_reg else 1.0 for image in members]
        corners = [
            plan.crop_top_left(image.example.size, bucket, flipped=flip)
            for image, flip in zip(members, flips, strict=True)
        ]
        return Batch(
            epoch,
            position,
            tuple(image.example for image in members),
            tuple(captions),
            pixels=None if self.encoded else stacked,
            encoded=stacked if self.encoded else None,
            loss_weights=torch.tensor(weights),
            original_sizes=torch.tensor([image.example.size[::-1] for image in members]),
            crop_top_lefts=torch.tensor(corners),
            target_sizes=torch.tensor([bucket[::-1]] * len(members)),
            masks=_stack_masks([mask for _, mask in rows], stacked.shape[-2:]),
            preserved=_preserved(members),
        )


def _load_pixels(
    image: Placed, flip: bool, crop: random.Random, color: random.Random
) -> tuple[Tensor, Tensor | None]:
    augmentation = image.subset.augmentation
    return images.load_image(
        image.example.path,
        image.where,
        crop_box(image.where, crop if augmentation.random_crop else None),
        interpolation=image.interpolation,
        flip=flip,
        color=color if augmentation.color_aug else None,
        alpha=image.subset.masks.alpha_mask,
        mask_file=image.example.mask,
    )


def _preserved(members: Sequence[Placed]) -> Tensor | None:
    flags = [image.subset.diff_output_preservation for image in members]
    return torch.tensor(flags) if any(flags) else None


def _stack_masks(masks: list[Tensor | None], size: torch.Size) -> Tensor | None:
    if all(mask is None for mask in masks):
        return None
    return torch.stack([torch.ones(1, *size) if mask is None else mask for mask in masks])  # (B, 1, h, w)
