"""The directions that a weight uses least: its null space, completed by its smallest singular vectors.

A weight with more inputs than outputs has an exact right null space, one with more outputs an exact left one;
a thin SVD returns neither. A square weight of full rank has none, so its smallest singular directions are
used. `least_used` computes h directions of each side in float64. If the shape alone gives the null space at
least h dimensions: h random orthonormal vectors in it. Otherwise: the eigenvectors of the Gram matrix with
the h smallest eigenvalues.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from lowrank.adapters.penalty import Spectrum
from lowrank.bases.krylov import full_precision
from lowrank.bases.qr_basis import weight_key
from lowrank.errors import Refused
from lowrank.files import parse_json
from lowrank.laplace.context_file import read_context
from lowrank.naming import keys
from lowrank.tensors import is_plain, read_tensors, write_tensors

logger = logging.getLogger(__name__)

VERSION = "null-1"  # stored in caches: change it if `least_used` returns other numbers


class Null(NamedTuple):
    """Orthonormal directions that a weight W (O, I) uses least; eigenvectors have the least used first."""

    up: Tensor  # (O, h) columns, ‖upᵀ W‖ small: outputs that W hardly produces
    down: Tensor  # (h, I) rows, ‖W downᵀ‖ small: inputs that W hardly responds to


def least_used(weight: Tensor, width: int) -> Null:
    """Return the `width` = h least used output and input directions of W (O, I), fp32 on W's device."""
    with full_precision(weight.device):
        wide = weight.double()
        return Null(_least(wide.mT, width).float(), _least(wide, width).mT.contiguous().float())


def nullity(weight: Tensor, threshold: float = 1e-3) -> int:
    """Return O + I − 2·(number of σ > threshold·σ₁): null input directions plus null output directions."""
    outs, ins = weight.shape
    with full_precision(weight.device):
        wide = weight.double()
        squares = torch.linalg.eigvalsh(wide @ wide.mT if outs <= ins else wide.mT @ wide)
    return outs + ins - 2 * int((squares > threshold**2 * squares[-1]).sum())


def least_active(
    path: str | Path, weights: Mapping[str, Tensor], widths: Mapping[str, int]
) -> dict[str, Null]:
    """Return the output directions of least gradient and the input directions of least activity, by layer.

    They are the last eigenvectors of G = E[g gᵀ] and S = E[x xᵀ] in the context file `path`, which
    calc_lalora_context.py makes. Raises `Refused` if the file lacks a layer or has it in another shape.
    """
    context = read_context(path)
    layers = {keys.flat(name): layer for name, layer in context.layers.items()}
    spaces = {}
    for name, width in widths.items():
        layer, weight = layers.get(keys.flat(name)), weights[name]
        if layer is None or layer.shape != tuple(weight.shape):
            content = "nothing" if layer is None else f"a layer of shape {layer.shape}"
            raise Refused(
                f"{path} has {content} for {name}, whose weight is {tuple(weight.shape)}; make it again with "
                "calc_lalora_context.py for this base model and these targets"
            )
        up, down = (_last_eigenvectors(side, width, weight.device) for side in (layer.G, layer.S))
        spaces[name] = Null(up, down.mT.contiguous())
    return spaces


def _last_eigenvectors(moment: Spectrum, width: int, device: torch.device) -> Tensor:
    """Return the h eigenvectors (n, h) of V·diag(v)·Vᵀ + diag(d) with the smallest eigenvalues."""
    vectors, values, diagonal = (None if part is None else part.to(device, torch.float64) for part in moment)
    dense = torch.zeros((), device=device) if diagonal is None else diagonal.diag()
    if vectors is not None and values is not None:
        dense = dense + (vectors * values) @ vectors.mT
    return torch.linalg.eigh(dense)[1][:, :width].float()


def _least(matrix: Tensor, width: int) -> Tensor:
    """Return orthonormal (n, h): the directions of R^n with the smallest image under an (m, n) matrix."""
    rows, n = matrix.shape
    if n - rows < width:
        return torch.linalg.eigh(matrix.mT @ matrix)[1][:, :width]
    used = torch.linalg.qr(matrix.mT)[0]  # (n, m)
    generator = torch.Generator().manual_seed(0)
    free = torch.randn(n, width, generator=generator, dtype=matrix.dtype).to(matrix)
    for _ in range(2):  # the second pass removes the rounding that normalising magnified
        free = torch.linalg.qr(free - used @ (used.mT @ free))[0]
    return free


def null_spaces(
    weights: Mapping[str, Tensor], widths: Mapping[str, int], cache: str | Path | None
) -> dict[str, Null]:
    """Return `least_used` of every weight, cached in the file `cache`; computed ones are added to it.

    The file (safetensors, fp32) has `<layer>.null_up` (O, h), `<layer>.null_down` (h, I), and in its metadata
    a key for each layer, a hash of the weight's bytes and h. Raises `Refused` for a file of other weights.
    """
    path = Path(cache) if cache else None
    keys = {name: weight_key(weights[name], widths[name]) for name in weights} if path else {}
    spaces = _read_cache(path, keys) if path and path.is_file() else {}
    missing = [name for name in weights if name not in spaces]
    for name in tqdm(missing, desc="null space", unit="layer", file=sys.stderr, disable=not missing):
        spaces[name] = least_used(weights[name], widths[name])
    if path and missing:
        tensors = {
            f"{name}.null_{side}": value
            for name, null in spaces.items()
            for side, value in null._asdict().items()
        }
        write_tensors(path, tensors, {"lowrank.null": json.dumps({"version": VERSION, "keys": keys})})
        logger.info("wrote the null spaces of %d layers to %s", len(spaces), path)
    return {name: Null(*(side.to(weights[name].device) for side in spaces[name])) for name in weights}


def _read_cache(path: Path, keys: Mapping[str, str]) -> dict[str, Null]:
    tensors, metadata = read_tensors(path)
    facts = parse_json(metadata.get("lowrank.null", "{}"), f"the metadata of {path}")
    known = facts.get("keys") if isinstance(facts, dict) and facts.get("version") == VERSION else None
    if not isinstance(known, dict):
        raise Refused(
            f"svd_cache_path {path} was not written by this version of lowrank; give the name of a new file, "
            "which is then created"
        )
    spaces = {}
    for name in keys.keys() & known.keys():
        if known[name] != keys[name]:
            raise Refused(
                f"svd_cache_path {path} was made from another weight or rank of {name}; give another file "
                "for this base model and --network_dim"
            )
        sides = [tensors.get(f"{name}.null_{side}", torch.empty(())) for side in Null._fields]
        if not all(is_plain(side) and side.dim() == 2 for side in sides):
            raise Refused(f"svd_cache_path {path} is damaged in {name}; delete it, and it is made again")
        spaces[name] = Null(*sides)
    return spaces
