"""Encode every image of a plan once with the VAE, and keep the latents in a cache."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from tqdm import tqdm

from lowrank.data import images
from lowrank.data.buckets import crop_box
from lowrank.data.cache import Cache, key
from lowrank.data.plan import Placed
from lowrank.data.prefetch import ahead
from lowrank.errors import Refused
from lowrank.files import sha256

log = logging.getLogger(__name__)

Item = tuple[Placed, bool]  # an image and whether it is flipped


def encode_images(
    placed: Sequence[Placed],
    encode: Callable[[Tensor], Tensor],
    *,
    model_hash: str,
    cache: Cache,
    batch_size: int,
    workers: int,
    progress: bool,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] | None = None,
) -> tuple[dict[Item, str], dict[Path, str]]:
    """Encode the images that the cache lacks.

    `encode`: pixels (B, 3, H, W) in [-1, 1] to (B, …). Returns the cache key of each item, and for each image
    that cannot be decoded the reason. A cache entry has `latents`, and `mask` (1, h, w) of the latents' size
    where the image has one. With `share` (p, n) and a disk cache, process p of n first makes every n-th
    entry, calls `wait`, and then finds the entries of the other processes. Raises `Refused` when an encoding
    is not finite.
    """
    paths = sorted({path for image in placed for path in files_of(image)})
    digests: dict[Path, str] = {}
    unreadable: dict[Path, str] = {}
    for path, (digest, problem) in zip(paths, ahead(_digest, paths, workers=workers), strict=True):
        (unreadable if problem else digests)[path] = problem or digest
    bad = {
        image.example.path: unreadable[path]
        for image in placed
        for path in files_of(image)
        if path in unreadable
    }
    readable = sorted(
        (image for image in placed if image.example.path not in bad), key=lambda image: image.where
    )
    keys = {item: _key(item, model_hash, digests) for image in readable for item in _variants(image)}
    items = {name: item for item, name in keys.items()}
    fill = functools.partial(_fill, encode=encode, cache=cache, batch_size=batch_size, workers=workers)
    rank, world = share
    if wait is not None and cache.folder is not None and world > 1:
        fill(dict(itertools.islice(items.items(), rank, None, world)), progress=progress)
        wait()  # every process finds the images that cannot be decoded again below
    return keys, bad | fill(items, progress=progress)


def undecodable(files: Iterable[tuple[Path, Path | None]], *, workers: int = 2) -> dict[Path, str]:
    """Every image whose pixels, or those of its mask, cannot be decoded to the end, with the reason.

    `files` are pairs of image and mask; all are decoded.
    """

    def problem(pair: tuple[Path, Path | None]) -> tuple[Path, str | None]:
        try:
            for path in filter(None, pair):
                images.read_image(path)
        except Refused as error:
            return pair[0], str(error)
        return pair[0], None

    return {path: reason for path, reason in ahead(problem, files, workers=workers) if reason}


def files_of(image: Placed) -> list[Path]:
    """The image's file, and that of its mask if it has one."""
    return [image.example.path, *filter(None, [image.example.mask])]


def _variants(image: Placed) -> list[Item]:
    return [(image, False), (image, True)] if image.subset.augmentation.flip_aug else [(image, False)]


def _digest(path: Path) -> tuple[str, str | None]:
    try:
        return sha256(path), None
    except OSError as error:
        return "", f"image {path} cannot be read ({error.strerror}); restore it, or give --skip_bad_images"


def _key(item: Item, model_hash: str, digests: Mapping[Path, str]) -> str:
    """The cache key of an image: everything that its encoding depends on."""
    image, flip = item
    mask = image.example.mask
    return key(
        "latents",
        model_hash,
        digests[image.example.path],
        image.where,
        flip,
        image.interpolation,
        digests[mask] if mask else image.subset.masks.alpha_mask,
    )


def _fill(
    items: Mapping[str, Item],
    *,
    encode: Callable[[Tensor], Tensor],
    cache: Cache,
    batch_size: int,
    workers: int,
    progress: bool,
) -> dict[Path, str]:
    """Store the missing entries; returns the images that cannot be decoded, with the reason."""
    missing = cache.missing(items)
    batches = list(_batches(missing, items, batch_size))
    decoded = ahead(lambda names: [_decode(items[name]) for name in names], batches, workers=workers)
    bad: dict[Path, str] = {}
    count = 0
    bar = tqdm(decoded, "caching latents", len(batches), disable=not progress or not batches)
    for names, results in zip(batches, bar, strict=True):
        sound = {}
        for name, result in zip(names, results, strict=True):
            if isinstance(result, Refused):
                bad[items[name][0].example.path] = str(result)
            else:
                sound[name] = result
        if sound:
            _store(sound, items, encode, cache)
        count += len(sound)
    log.info("latents: %d encoded, %d found in the cache", count, len(items) - len(missing))
    return bad


def _batches(missing: Sequence[str], items: Mapping[str, Item], batch_size: int) -> Iterator[list[str]]:
    """The missing keys, in batches of one bucket."""
    for _, group in itertools.groupby(missing, lambda name: items[name][0].where.bucket):
        names = list(group)
        for start in range(0, len(names), batch_size):
            yield names[start : start + batch_size]


def _decode(item: Item) -> tuple[Tensor, Tensor | None] | Refused:
    """The pixels and the mask, or the error, which must not stop the images around this one."""
    image, flip = item
    try:
        return images.load_image(
            image.example.path,
            image.where,
            crop_box(image.where),
            flip=flip,
            alpha=image.subset.masks.alpha_mask,
            mask_file=image.example.mask,
            interpolation=image.interpolation,
        )
    except Refused as error:
        return error


@torch.no_grad()
def _store(
    sound: Mapping[str, tuple[Tensor, Tensor | None]],
    items: Mapping[str, Item],
    encode: Callable[[Tensor], Tensor],
    cache: Cache,
) -> None:
    latents = encode(torch.stack([pixels for pixels, _ in sound.values()])).cpu()  # (B, …)
    finite = torch.isfinite(latents).flatten(1).all(1).tolist()
    for (name, (_, mask)), latent, is_finite in zip(sound.items(), latents, finite, strict=True):
        if not is_finite:
            raise Refused(
                f"the VAE gives NaN or infinity for image {items[name][0].example.path}; "
                "run it in float32 (--no_half_vae), or remove the image"
            )
        entry = {"latents": latent}
        if mask is not None:
            height, width = latent.shape[-2:]
            entry["mask"] = adaptive_avg_pool2d(mask, (height, width))  # (1, h, w): the area average
        cache.put(name, entry)
