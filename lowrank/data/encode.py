"""Every image of a plan through the VAE once: what is not yet in the cache is decoded, encoded and stored."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Encoded:
    """Where the encoded images are: `digests` is path, of image or mask, to SHA-256 of the file's bytes."""

    cache: Cache
    model_hash: str
    digests: Mapping[Path, str]

    def key(self, item: Item) -> str:
        """The cache key of an image: all that its encoding depends on."""
        placed, flip = item
        mask = placed.example.mask
        return key(
            "latents",
            self.model_hash,
            self.digests[placed.example.path],
            placed.where,
            flip,
            placed.interpolation,
            self.digests[mask] if mask else placed.subset.alpha_mask,
        )

    def get(self, item: Item) -> dict[str, Tensor]:
        """`latents`, and `mask` (1, h, w) of the latents' size where the image has one."""
        return self.cache.get(self.key(item))


def encode_all(
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
) -> tuple[Encoded, dict[Path, str]]:
    """Encode what the cache lacks; returns where it is, and why some images cannot be decoded.

    `encode`: pixels (B, 3, H, W) in [-1, 1] to (B, …). With `share` (p, n) and a disk cache, process p of n
    first makes every n-th entry, calls `wait`, and then finds the others'. Raises `Refused` when an encoding
    is not finite.
    """
    paths = sorted({path for one in placed for path in _files(one)})
    digests: dict[Path, str] = {}
    gone: dict[Path, str] = {}
    for path, (digest, problem) in zip(paths, ahead(_digest, paths, workers=workers), strict=True):
        (gone if problem else digests)[path] = problem or digest
    bad = {one.example.path: gone[path] for one in placed for path in _files(one) if path in gone}
    encoded = Encoded(cache, model_hash, digests)
    readable = sorted((one for one in placed if one.example.path not in bad), key=lambda one: one.where)
    items = {encoded.key(item): item for one in readable for item in _variants(one)}
    fill = functools.partial(_fill, encode=encode, cache=cache, batch_size=batch_size, workers=workers)
    rank, world = share
    if wait is not None and cache.folder is not None and world > 1:
        fill(dict(itertools.islice(items.items(), rank, None, world)), progress=progress)
        wait()  # what cannot be decoded is found again below, by every process
    return encoded, bad | fill(items, progress=progress)


def _files(one: Placed) -> list[Path]:
    return [one.example.path, *filter(None, [one.example.mask])]


def _digest(path: Path) -> tuple[str, str | None]:
    try:
        return sha256(path), None
    except OSError as error:
        return "", f"image {path} cannot be read ({error.strerror}); restore it, or give --skip_bad_images"


def _variants(one: Placed) -> list[Item]:
    return [(one, False), (one, True)] if one.subset.flip_aug else [(one, False)]


def _fill(
    items: Mapping[str, Item],
    *,
    encode: Callable[[Tensor], Tensor],
    cache: Cache,
    batch_size: int,
    workers: int,
    progress: bool,
) -> dict[Path, str]:
    absent = cache.missing(items)
    runs = list(_runs(absent, items, batch_size))
    decoded = ahead(lambda names: [_decoded(items[name]) for name in names], runs, workers=workers)
    bad: dict[Path, str] = {}
    made = 0
    bar = tqdm(decoded, "caching latents", len(runs), disable=not progress or not runs)
    for names, results in zip(runs, bar, strict=True):
        sound = {}
        for name, result in zip(names, results, strict=True):
            if isinstance(result, Refused):
                bad[items[name][0].example.path] = str(result)
            else:
                sound[name] = result
        if sound:
            _store(sound, items, encode, cache)
        made += len(sound)
    log.info("latents: %d made, %d found in the cache", made, len(items) - len(absent))
    return bad


def _runs(absent: Sequence[str], items: Mapping[str, Item], batch_size: int) -> Iterator[list[str]]:
    """The absent keys, in batches of one bucket."""
    for _, group in itertools.groupby(absent, lambda name: items[name][0].where.bucket):
        names = list(group)
        for start in range(0, len(names), batch_size):
            yield names[start : start + batch_size]


def _decoded(item: Item) -> tuple[Tensor, Tensor | None] | Refused:
    one, flip = item
    try:
        return images.load_image(
            one.example.path,
            one.where,
            crop_box(one.where),
            flip=flip,
            alpha=one.subset.alpha_mask,
            mask_file=one.example.mask,
            interpolation=one.interpolation,
        )
    except Refused as refused:
        return refused


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
