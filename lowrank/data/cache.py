"""A small cache of tensors: in memory, or one safetensors file per entry.

The name of an entry (`key`) is a hash of everything that it depends on: the content of the image or caption,
size, flip, model, and the version of this format. So a changed image, caption or model has another entry. A
file has its key and a checksum inside; a file where one of them does not match is made again.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lowrank.errors import Refused
from lowrank.files import atomic, remove_leftovers

log = logging.getLogger(__name__)
T = TypeVar("T")

FORMAT = 1  # raise it when what is stored, or how images are scaled and cropped, changes


def key(kind: str, *parts: object) -> str:
    """`<kind>-<sha256>` of all parts as text; e.g. `key("text", caption, model_hash)`."""
    digest = hashlib.sha256()
    for part in (FORMAT, kind, *parts):
        text = str(part).encode()
        digest.update(len(text).to_bytes(8, "big") + text)  # with lengths, ("ab", "c") is not ("a", "bc")
    return f"{kind}-{digest.hexdigest()}"


class Cache:
    """Entries are dicts of CPU tensors: in memory with `folder` None, otherwise files, read at each `get`."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        if folder is not None:
            remove_leftovers(folder)
        self._memory: dict[str, dict[str, Tensor]] = {}

    def get(self, key: str) -> dict[str, Tensor]:
        """One entry, not to be changed in place. Raises `Refused` when it is missing or damaged."""
        entry = self._find(key)
        if entry is None:
            raise Refused(
                f"cache entry {key} in {self.folder or 'memory'} is missing or damaged; "
                "run again, which makes it again"
            )
        return entry

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys without a sound entry; a damaged file or a file of another key is logged."""
        return [key for key in keys if self._find(key) is None]

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store an entry. Raises `Refused` when the disk is full or not writable."""
        if self.folder is None:  # a copy: a row of a batch would keep the whole batch in memory
            self._memory[key] = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
            return
        entry = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with atomic(_path(self.folder, key)) as part:  # two runs may make one entry at the same time
            save_file(entry, part, metadata={"key": key, "checksum": _checksum(entry)})

    def fill(
        self,
        items: Mapping[str, T],
        compute: Callable[[list[T]], Sequence[Mapping[str, Tensor]]],
        *,
        batch_size: int = 1,
        title: str = "caching",
        progress: bool = False,
    ) -> int:
        """Make what is missing of `items` (key to source), `batch_size` at a time; returns how many."""
        missing = self.missing(items)
        quiet = not progress or not missing
        for start in tqdm(range(0, len(missing), batch_size), desc=title, disable=quiet):
            keys = missing[start : start + batch_size]
            for key, tensors in zip(keys, compute([items[key] for key in keys]), strict=True):
                self.put(key, tensors)
        log.info("%s: %d made, %d found in the cache", title, len(missing), len(items) - len(missing))
        return len(missing)

    def _find(self, key: str) -> dict[str, Tensor] | None:
        return self._memory.get(key) if self.folder is None else _read(_path(self.folder, key), key)


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """The entry in a file, or None where the file is missing, damaged or of another key."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            entry = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        log.warning("cache file %s is damaged (%s) and is made again", path, error)
        return None
    if metadata.get("key") != key:
        log.warning("cache file %s belongs to another model or image and is made again", path)
        return None
    if metadata.get("checksum") != _checksum(entry):
        log.warning("cache file %s is damaged (its checksum differs) and is made again", path)
        return None
    return entry


def _checksum(entry: Mapping[str, Tensor]) -> str:
    """CRC-32 of all bytes, tensors in order of their names."""
    value = 0
    for name in sorted(entry):
        if entry[name].numel():
            value = zlib.crc32(entry[name].reshape(-1).view(torch.uint8).numpy().tobytes(), value)
    return f"{value:08x}"
