"""The directions that a weight uses least: its null space, completed by its smallest singular vectors.

A weight with more inputs than outputs has an exact right null space, one with more outputs an exact left one;
a thin SVD returns neither. A square weight of full rank has none, so its smallest singular directions are
used. `least_used` computes h directions of each side in float64, from the QR factors of W (of Wᵀ where it is
wide): random orthonormal vectors outside the frame are the null space, and the top singular vectors of the
inverse of the triangle, found by block Krylov iteration, are the smallest of W.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.adapters.penalty import Spectrum
from lowrank.bases.krylov import full_precision, top_subspace
from lowrank.bases.qr_basis import cached_pairs
from lowrank.errors import Refused
from lowrank.files import cache_folder
from lowrank.laplace.context_file import read_context
from lowrank.naming import keys

VERSION = "null-2"  # part of the keys of the cache: change it if `least_used` returns other numbers
# largest condition of a triangle that is inverted; above it, full factorisations replace the inverse
SQUARE = 1e10  # its largest singular vectors have a relative error of 1e-6
TALL = 1e6  # a projection with it has an error of 1e-4 in each of three passes


class Null(NamedTuple):
    """Orthonormal directions that a weight W (O, I) uses least; eigenvectors have the least used first."""

    up: Tensor  # (O, h) columns, ‖upᵀ W‖ small: outputs that W hardly produces
    down: Tensor  # (h, I) rows, ‖W downᵀ‖ small: inputs that W hardly responds to


def least_used(weight: Tensor, width: int) -> Null:
    """Return the `width` = h least used output and input directions of W (O, I), fp32 on W's device."""
    outs, ins = weight.shape
    with full_precision(weight.device):
        tall = weight.double() if outs >= ins else weight.double().mT
        triangle = tall if outs == ins else torch.linalg.qr(tall, mode="r").R  # (short, short)
        inverse = _inverse(triangle, SQUARE if outs == ins else TALL)
        left, right = _smallest(triangle, inverse, width)  # both (short, h)
        long = left if outs == ins else _longer_side(tall, inverse, left)
        up, down = (long, right) if outs >= ins else (right, long)
        return Null(up.float(), down.mT.contiguous().float())


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
    `calc_lalora_context.py --curvature kfac` makes. Raises `Refused` if the file lacks a layer, has it in
    another shape, or has only its largest eigenpairs, from which the least active directions do not follow.
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
        up, down = (_last_eigenvectors(side, width, path, name) for side in (layer.G, layer.S))
        spaces[name] = Null(up.to(weight.device), down.mT.contiguous().to(weight.device))
    return spaces


def _last_eigenvectors(moment: Spectrum, width: int, path: str | Path, name: str) -> Tensor:
    """Return the eigenvectors (n, h) of the h smallest eigenvalues of a moment that has all eigenpairs."""
    vectors, values, size = moment.vectors, moment.values, len(moment.main)
    if vectors is None or values is None or vectors.shape[1] < size:
        count = 0 if vectors is None else vectors.shape[1]
        raise Refused(
            f"{path} has {count} of {size} eigenpairs of {name}, and null_source=activation needs the last "
            "ones; make it again with --curvature kfac (fewer layers with --target need less memory)"
        )
    return vectors[:, values.argsort()[:width]]


def _inverse(triangle: Tensor, limit: float) -> Tensor | None:
    """Return the inverse, or None if the condition of the matrix is not below `limit`."""
    inverse, failed = torch.linalg.inv_ex(triangle)
    condition = torch.linalg.matrix_norm(triangle) * torch.linalg.matrix_norm(inverse)
    return inverse if not failed and condition < limit else None


def _smallest(triangle: Tensor, inverse: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """Return left and right singular vectors (n, h) of the h smallest singular values, least first."""
    if inverse is None:
        U, _, Vh = torch.linalg.svd(triangle)
        return U[:, -width:].flip(1), Vh[-width:].mT.flip(1)
    largest = top_subspace(inverse, width)  # of V Σ⁻¹ Uᵀ
    return largest.vh.mT, largest.u


def _longer_side(tall: Tensor, inverse: Tensor | None, left: Tensor) -> Tensor:
    """Return orthonormal (long, h): directions outside the columns of `tall` (long, short) = frame·triangle.

    They are fixed random numbers, projected; if there are fewer than h, frame·`left` completes them.
    """
    width = left.shape[1]
    frame = torch.linalg.qr(tall).Q if inverse is None else tall
    generator = torch.Generator().manual_seed(0)
    spare = min(width, tall.shape[0] - tall.shape[1])
    free = torch.randn(len(tall), spare, generator=generator, dtype=tall.dtype).to(tall)
    for _ in range(3):  # later passes remove the rounding that the first one and normalising magnified
        if inverse is None:
            inside = frame @ (frame.mT @ free)
        else:
            inside = tall @ (inverse @ (inverse.mT @ (tall.mT @ free)))
        free = torch.linalg.qr(free - inside)[0]
    used = left[:, : width - spare]
    return torch.cat([free, frame @ used if inverse is None else tall @ (inverse @ used)], dim=1)


def null_spaces(
    weights: Mapping[str, Tensor], widths: Mapping[str, int], cache: str | Path | None
) -> dict[str, Null]:
    """Return `least_used` of every weight, from the folder `cache` (None: the default folder) or computed.

    The folder has a file for each weight and h, named by a hash of both. Raises `Refused` if it is a file.
    """
    folder = Path(cache or cache_folder("null"))
    if folder.is_file():
        raise Refused(
            f"svd_cache_path {folder} is a file, but null spaces are cached in a folder; name a folder, or "
            "leave the argument out"
        )
    pairs = cached_pairs(weights, widths, folder, least_used, VERSION, "null space")
    return {name: Null(*pair) for name, pair in pairs.items()}
