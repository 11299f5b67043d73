"""Context files: the curvature of the base model's loss on source data, for each layer's weight.

For a layer y = W x of a sample n with T positions, x (T, I) is its input and g = ∂qₙ/∂y (T, O), where qₙ is a
random combination of the model's prediction (`lowrank.laplace.fisher.gauss_newton_draw`):

    S = E_n[ Σ_t x xᵀ / T ]        G = E_n[ Σ_t g gᵀ ]        ½ vec(ΔW)ᵀ(S ⊗ G)vec(ΔW) ≈ the rise of the loss

This is the Kronecker-factored Gauss–Newton matrix ("expand", arXiv 2311.00636) of the base model's weights,
which for a squared error is the Fisher matrix. It does not depend on the adapter, so one file serves every
method and rank. Files without `lowrank.fisher` in their metadata hold the empirical Fisher matrix, from
gradients of the loss itself: it weighs a sample by its squared error.

A file has `<kohya name>.S_vec` (I, K), `.S_val` (K,), `.S_diag` (I,), S = V·diag(v)·Vᵀ + diag(d), and the
same keys for G. `kfac`: all eigenpairs, no diagonal; `kfac_lr`: the largest K and a diagonal; `diag`: a
diagonal only; `lora_diag`: S as in `kfac_lr`, G as in `diag`. `.W_probe` (8,) is a fingerprint of the base's
weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.adapters.penalty import Spectrum
from lowrank.adapters.targets import Layer, original_weight
from lowrank.errors import Refused
from lowrank.tensors import is_plain, read_tensors, write_tensors

KIND = "lalora_context"
CURVATURES = ("kfac", "kfac_lr", "diag", "lora_diag")
GAUSS_NEWTON = "gauss-newton"  # value of lowrank.fisher in the metadata
LEGACY = "coordinates"  # file of the fork's script: precisions of a universal network's coordinates
PROBED = 8  # rows of a weight that its fingerprint uses
# by curvature: whether S and G have vectors, and a diagonal
_PARTS = {
    "kfac": ((True, False), (True, False)),
    "kfac_lr": ((True, True), (True, True)),
    "diag": ((False, True), (False, True)),
    "lora_diag": ((True, True), (False, True)),
}
_AGAIN = "make it again with calc_lalora_context.py"


class Curvature(NamedTuple):
    """S (I×I) and G (O×O) of one layer."""

    S: Spectrum
    G: Spectrum

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.G.main.shape[0], self.S.main.shape[0]


@dataclass(frozen=True)
class Context:
    """The content of a context file; only legacy files have `coordinates`, (mean, precision) by layer."""

    curvature: str
    layers: Mapping[str, Curvature]
    probes: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    coordinates: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def weight_fingerprint(host: Layer) -> Tensor:
    """Return (8,) numbers, about N(0, 1): evenly spaced rows of W, normalised, times one fixed vector.

    If two weights differ by ε relative to their norm, their fingerprints differ by about ε, in any dtype.
    """
    W = original_weight(host)
    rows = torch.linspace(0, len(W) - 1, PROBED, dtype=torch.float64).round().long()
    W = W[rows.to(W.device)].double().cpu()
    W = W / torch.linalg.vector_norm(W, dim=1, keepdim=True).clamp_min(1e-30)
    chirp = torch.cos(0.7 * torch.arange(W.shape[1], dtype=torch.float64).square())  # fixed, without a period
    return (math.sqrt(2) * W @ chirp).float()


def write_context(path: str | Path, context: Context) -> None:
    """Write a context file; an interrupted write leaves no partial file."""
    tensors = {f"{name}.W_probe": value for name, value in context.probes.items()}
    for name, layer in context.layers.items():
        for side, spectrum in layer._asdict().items():
            for part, value in zip(("vec", "val", "diag"), spectrum, strict=True):
                if value is not None:
                    tensors[f"{name}.{side}_{part}"] = value
    facts = {"lowrank.kind": KIND, "lowrank.curvature": context.curvature, **context.metadata}
    write_tensors(path, tensors, facts)


def read_context(path: str | Path) -> Context:
    """Read and check a context file.

    Raises `Refused` for a file of another kind, a damaged file, and values that are not finite.
    """
    tensors, metadata = read_tensors(path)
    if any(key.endswith(".alpha_precision") for key in tensors):
        return Context(LEGACY, {}, metadata=metadata, coordinates=_coordinates(path, tensors))
    kind = metadata.get("lowrank.curvature", "")
    if metadata.get("lowrank.kind") != KIND or kind not in CURVATURES:
        raise Refused(
            f"{path} is no LaLoRA context: its tensors are {', '.join(list(tensors)[:2]) or 'none'}; "
            "make one with calc_lalora_context.py"
        )
    for key, value in tensors.items():
        _check_values(path, key, value, signed=key.endswith(("_vec", "W_probe")))
    names = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
    layers = {}
    for name in names:
        sides = zip("SG", _PARTS[kind], strict=True)
        layers[name] = Curvature(*(_spectrum(path, tensors, f"{name}.{side}_", *has) for side, has in sides))
    probes = {name: tensors[f"{name}.W_probe"] for name in names if f"{name}.W_probe" in tensors}
    if len(probes) < len(names) or any(value.shape != (PROBED,) for value in probes.values()):
        raise Refused(f"{path} has no fingerprint of its base model's weights (W_probe); {_AGAIN}")
    return Context(kind, layers, probes, metadata)


def _check_values(path: str | Path, key: str, value: Tensor, signed: bool) -> None:
    if not is_plain(value):
        raise Refused(f"{key} in {path} has NaN or infinite values; {_AGAIN}")
    if not signed and (value < 0).any():
        raise Refused(f"{key} in {path} is below 0, a curvature cannot be; {_AGAIN}")


def _spectrum(
    path: str | Path, tensors: Mapping[str, Tensor], key: str, low: bool, diagonal: bool
) -> Spectrum:
    parts = (("vec", low), ("val", low), ("diag", diagonal))
    absent = [key + part for part, required in parts if required and key + part not in tensors]
    if absent:
        raise Refused(f"{path} lacks {absent[0]}; {_AGAIN}")
    vec, val, diag = (tensors[key + part].float() if required else None for part, required in parts)
    if vec is None or val is None:
        fits = diag is not None and diag.dim() == 1
    else:
        fits = vec.dim() == 2 and val.shape == vec.shape[1:] and vec.shape[1] <= vec.shape[0]
        fits = fits and (diag is None or diag.shape == vec.shape[:1])
    if not fits:
        shapes = {part: tuple(tensors[key + part].shape) for part, required in parts if required}
        raise Refused(f"{path} has {key.rstrip('_')} in shapes that do not fit together {shapes}; {_AGAIN}")
    return Spectrum(vec, val, diag)


def _coordinates(path: str | Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    coordinates = {}
    for key in tensors:
        name, dot, part = key.rpartition(".alpha_")
        if not dot or part not in ("mean", "precision"):
            raise Refused(
                f"{path} has {key} beside precisions of coordinates, a mixture of two formats; {_AGAIN}"
            )
        pair = [tensors.get(f"{name}.alpha_{part}") for part in ("mean", "precision")]
        if pair[0] is None or pair[1] is None or pair[0].shape != pair[1].shape:
            raise Refused(f"{path} has no alpha_mean in the shape of {name}.alpha_precision; {_AGAIN}")
        _check_values(path, f"{name}.alpha_mean", pair[0], signed=True)
        _check_values(path, f"{name}.alpha_precision", pair[1], signed=False)
        coordinates["lora_" + name.removeprefix("lora_")] = (pair[0].float(), pair[1].float())
    return coordinates
