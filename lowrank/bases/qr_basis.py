"""QR bases: the QR factors of the top-r part of a layer's weight, computed once and cached on disk.

Two runs share Q only if they start from equal numbers, so a cache entry is named by a hash of the weight's
bytes, shape and dtype, the rank, and the version of the algorithm. Its file contains `q` and `r` in fp32 and
a checksum of both. `cached_pairs` keeps other pairs of factors, (O, r) and (r, I), in the same way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lowrank.bases.krylov import check_rank, thin_qr, top_subspace
from lowrank.errors import Refused
from lowrank.files import atomic, cache_folder, parse_json

VERSION = "krylov-1"  # part of every key: change it if decompose() returns other numbers
HASHED = 2**22  # elements of a weight copied to the CPU at a time for hashing

logger = logging.getLogger(__name__)


class QrBasis(NamedTuple):
    """QR factors of the top-r part of W (O, I), which is q @ r."""

    q: Tensor  # (O, r) fp32, orthonormal columns; r in a shape is the rank
    r: Tensor  # (r, I) fp32, upper trapezoidal, positive diagonal


class _Layer(NamedTuple):
    key: str
    shape: tuple[int, ...]
    rank: int
    device: torch.device


class _Damaged(Exception):
    """A cache file does not match its name or its checksum."""


def decompose(weight: Tensor, rank: int, *, seed: int = 0, name: str = "the weight") -> QrBasis:
    """Compute Q and R of the top-`rank` part of W (O, I), on W's device, without a full SVD.

    Raises `Refused`, with the layer `name`, for NaN or infinite values and for rank > min(O, I).
    """
    u, s, vh, report = top_subspace(weight, rank, seed=seed, name=name)
    if report.method == "fallback":
        logger.info(
            "%s: block Krylov did not converge at rank %d, solved as a full eigenvalue problem", name, rank
        )
    q, r = thin_qr(u, s, vh)
    return QrBasis(q.float(), r.float())


def weight_key(weight: Tensor, rank: int, version: str | None = None) -> str:
    """Return a cache key: SHA-256 of the weight's bytes, shape, dtype, the rank and the version."""
    digest = hashlib.sha256(
        json.dumps([version or VERSION, rank, str(weight.dtype), list(weight.shape)]).encode()
    )
    for rows in weight.detach().split(max(1, HASHED // weight.shape[1])):
        digest.update(rows.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def basis_hash(weights: Mapping[str, Tensor], ranks: int | Mapping[str, int]) -> str:
    """Return one hash for the bases of all layers: adapters with equal hashes share Q."""
    by_name = dict.fromkeys(weights, ranks) if isinstance(ranks, int) else ranks
    return _combined({name: weight_key(weights[name], by_name[name]) for name in weights})


def bases(
    weights: Mapping[str, Tensor],
    rank: int,
    *,
    cache: str | Path | None,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> dict[str, QrBasis]:
    """Return the basis of every weight (O, I), read from the folder `cache` or computed and written to it.

    If several processes use one cache, one computes and the others wait. A killed run keeps the layers it
    finished. Weights are read one at a time, so a mapping that unpacks on access needs memory for one dense
    layer. `device`: where to compute (default: the weight's device); the basis is returned on the weight's
    device. `cache=None`: no cache. Raises `Refused`, before computing, if a layer is smaller than the rank.
    """
    layers = _survey(weights, dict.fromkeys(weights, rank))
    return _load_or_compute(weights, layers, cache, progress, _decompose_on(device))


def start_basis(
    weights: Mapping[str, Tensor], ranks: Mapping[str, int], cache: str | Path | None, progress: bool = True
) -> tuple[dict[str, QrBasis], dict[str, str]]:
    """Return `bases` with a rank for each layer, and their metadata; `cache=None` is the default folder."""
    layers = _survey(weights, ranks)
    folder = cache or cache_folder("basis")
    by_name = _load_or_compute(weights, layers, folder, progress, _decompose_on(None))
    return by_name, {"basis_hash": _combined({name: layer.key for name, layer in layers.items()})}


def cached_pairs(
    weights: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    cache: str | Path,
    compute: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    version: str,
    title: str,
) -> dict[str, QrBasis]:
    """Return `compute(weight, rank)`, fp32 (O, r) and (r, I), of every weight, read from or added to a cache.

    `version` names the function and is part of the cache keys; `title` is that of the progress bar.
    """
    layers = _survey(weights, ranks, version)
    return _load_or_compute(
        weights, layers, cache, True, lambda weight, rank, _: QrBasis(*compute(weight, rank)), title
    )


def _decompose_on(device: torch.device | str | None) -> Callable[[Tensor, int, str], QrBasis]:
    """Return a function that computes the basis of a named weight on `device` (None: the weight's)."""
    return lambda weight, rank, name: decompose(weight.to(device or weight.device), rank, name=name)


def _combined(keys: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(sorted(keys.items())).encode()).hexdigest()


def _survey(
    weights: Mapping[str, Tensor], ranks: Mapping[str, int], version: str | None = None
) -> dict[str, _Layer]:
    layers = {}
    for name in weights:
        weight, rank = weights[name], ranks[name]
        check_rank(weight, rank, name)
        layers[name] = _Layer(weight_key(weight, rank, version), tuple(weight.shape), rank, weight.device)
    return layers


def _load_or_compute(
    weights: Mapping[str, Tensor],
    layers: Mapping[str, _Layer],
    cache: str | Path | None,
    progress: bool,
    compute: Callable[[Tensor, int, str], QrBasis],
    title: str = "basis",
) -> dict[str, QrBasis]:
    def compute_layer(name: str) -> QrBasis:
        return compute(weights[name], layers[name].rank, name)

    def bar(names: list[str]) -> Iterable[str]:
        return tqdm(names, desc=title, unit="layer", file=sys.stderr, disable=not (progress and names))

    by_name: dict[str, QrBasis] = {}
    if cache is None:
        by_name = {name: compute_layer(name) for name in bar(list(layers))}
    else:
        folder = Path(cache)
        for name, layer in layers.items():  # a complete cache needs no lock, and may be read-only
            with contextlib.suppress(FileNotFoundError, _Damaged):
                by_name[name] = _read(folder, layer)
        missing = [name for name in layers if name not in by_name]
        with _locked(folder) if missing else contextlib.nullcontext():
            for name in bar(missing):
                cached = _read_or_none(folder, layers[name])
                by_name[name] = cached or _write(folder, layers[name], compute_layer(name))
    return {name: QrBasis(*(x.to(layer.device) for x in by_name[name])) for name, layer in layers.items()}


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Lock a cache folder for this process; the system releases the lock when the process ends or dies."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / ".lock")
        try:
            locked = lock.acquire(timeout=0)
        except Timeout:
            logger.warning("another process computes bases in %s; waiting for it", cache)
            locked = lock.acquire()
    except OSError as error:
        raise Refused(
            f"the basis cache {cache} cannot be locked ({error}); give a writable folder on a local disk "
            "with --basis_cache_dir or LOWRANK_CACHE"
        ) from error
    with locked:
        for partial in cache.glob(".*.part"):  # from a killed run: a running one would hold the lock
            partial.unlink()
        yield


def _checksum(basis: QrBasis) -> str:
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in basis)).hexdigest()


def _path(cache: Path, layer: _Layer) -> Path:
    return cache / f"{layer.key}.safetensors"


def _read(cache: Path, layer: _Layer) -> QrBasis:
    """Read the basis of a layer. Raises FileNotFoundError, or _Damaged if the file does not match."""
    path = _path(cache, layer)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            facts = parse_json((file.metadata() or {}).get("lowrank.basis", "{}"), "lowrank.basis")
            basis = QrBasis(*(file.get_tensor(name).clone() for name in QrBasis._fields))
    except (SafetensorError, Refused) as error:
        raise _Damaged(f"{path} is damaged ({error})") from error
    expected = [((layer.shape[0], layer.rank), torch.float32), ((layer.rank, layer.shape[1]), torch.float32)]
    if (actual := [(tuple(x.shape), x.dtype) for x in basis]) != expected:
        raise _Damaged(f"{path} is damaged (it has {actual} instead of {expected})")
    if not all(x.isfinite().all() for x in basis):
        raise _Damaged(f"{path} is damaged (values are not finite)")
    if facts != {"key": layer.key, "sha256": _checksum(basis)}:
        raise _Damaged(f"{path} is damaged (its content does not match its name and checksum)")
    return basis


def _read_or_none(cache: Path, layer: _Layer) -> QrBasis | None:
    try:
        return _read(cache, layer)
    except FileNotFoundError:
        return None
    except _Damaged as error:
        logger.warning("%s; computing it again", error)
        return None


def _write(cache: Path, layer: _Layer, basis: QrBasis) -> QrBasis:
    """Write a layer's file and return `basis`.

    The metadata has one entry, because safetensors shuffles several; so equal bases give equal bytes.
    """
    on_cpu = QrBasis(*(x.cpu().contiguous() for x in basis))
    facts = json.dumps({"key": layer.key, "sha256": _checksum(on_cpu)}, sort_keys=True)
    with atomic(_path(cache, layer)) as part:
        save_file(on_cpu._asdict(), part, {"lowrank.basis": facts})
    return basis
