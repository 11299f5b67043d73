"""Similarity of two adapters by layer, computed from their low-rank factors without any O×I matrix.

A layer's update is ΔW = U·D with U (O, k) "up" and D (k, I) "down"; every number comes from k×k products:
    ⟨U₁D₁, U₂D₂⟩ = ⟨U₁ᵀU₂, D₁D₂ᵀ⟩        ‖X + Y‖² / (‖X‖² + ‖Y‖²) = 1 + 2⟨X, Y⟩ / (‖X‖² + ‖Y‖²)
The matrices are named as in QR-LoRA (arXiv 2507.04599): Q, deltaR, baseR; A and B are the trained factors of
a LoRA or QR-LoRA file. deltaW is the whole update, the only matrix that can be compared across methods, ranks
and bases. Official QR-LoRA files have no initial copy, so their deltaW is that of Q′R′, not of the update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean, median, pstdev
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.errors import Refused
from lowrank.formats.delta import Delta, check_shapes, delta_of, method_for, missing_roles
from lowrank.formats.read import Adapter
from lowrank.naming import keys
from lowrank.naming.flux_join import strength

MATRICES = (*keys.MATRICES, "deltaW")  # order of every report
UPDATES = ("deltaR", "deltaW")  # the matrices that a merge adds
_THRESHOLDS = {"Q": (0.99, 0.95), "baseR": (0.99, 0.95), "deltaR": (0.10, 0.50), "deltaW": (0.10, 0.50)}
OUTSIDE = 0.05  # share of layers outside of the null band up to which two updates count as separate
_FLOOR = 1e-13  # an energy below this share of its summed terms is float64 rounding and counts as zero
_DEGENERATE = 1e-12  # Gram eigenvalues: directions below 1e-6 of the largest are float32 rounding

Roles = Mapping[str, Tensor]  # role -> tensor of one layer
Names = tuple[str, str]  # names of the two files in reports


class RowOverlap(NamedTuple):
    """cos² of the principal angles between two row spaces, and each matrix's energy in the other's space."""

    mean: float  # Σcos² / min(k₁, k₂); 1 if the larger space contains the smaller
    random: float  # `mean` of independent random row spaces, max(k₁, k₂) / I
    largest: float
    first_in_second: float
    second_in_first: float


@dataclass(frozen=True)
class LayerSimilarity:
    """One layer of one matrix; `similarity` is None if it is undefined, for the reason in `reason`."""

    layer_name: str
    similarity: float | None
    lora1_norm: float
    lora2_norm: float
    dimension: tuple[int, ...]  # shape in the first file
    measure: str = "cosine"  # "principal angles": overlap of two bases of different rank
    reason: str | None = None  # "zero in …" or "shapes differ: …"
    null_band: float | None = None  # three standard deviations of the cosine of independent matrices
    basis_overlap: float | None = None  # Q: mean cos² of the principal angles of the column spaces
    interference: float | None = None  # updates: ‖X + Y‖² / (‖X‖² + ‖Y‖²), scaled by alpha/rank
    row_overlap: RowOverlap | None = None  # updates


# ---------- algebra of one layer


def cosine(first: Tensor, second: Tensor) -> float | None:
    """⟨a, b⟩ / (‖a‖‖b‖) of two tensors of one shape, in float64; None when either is zero."""
    a, b = first.double().flatten(), second.double().flatten()
    lengths = a.norm() * b.norm()
    return _unit((a @ b / lengths).item()) if lengths > 0 else None


def update(module: str, roles: Roles) -> Delta | None:
    """ΔW in float64 at scale 1, or None if the file lacks a factor that it needs.

    Computed by the layer of the file's method, so QR-LoRA's Q′R′ − QR of an untrained layer is exactly 0.
    """
    if missing_roles(roles, method_for(roles, None)):
        return None
    return unscaled(delta_of(module, roles, precision=torch.float64))


def unscaled(delta: Delta) -> Delta:
    """ΔW in float64 with its scale multiplied into `down`."""
    return Delta(delta.up.double(), delta.down.double() * delta.scale, 1.0)


def inner(first: Delta, second: Delta) -> float:
    """⟨U₁D₁, U₂D₂⟩ = Σ (U₁ᵀU₂) ∘ (D₁D₂ᵀ)."""
    return ((first.up.T @ second.up) * (first.down @ second.down.T)).sum().item()


def energy(of: Delta) -> float:
    """‖U·D‖²; exactly 0 if only the rounding of cancelling terms remains."""
    terms = (of.up.T @ of.up) * (of.down @ of.down.T)  # (k, k)
    total = terms.sum().item()
    return total if total > _FLOOR * terms.abs().sum().item() else 0.0


def rows(of: Delta) -> Tensor:
    """(UᵀU)^½·D (k, I), which has the row space and row energies of U·D; D itself for orthonormal U."""
    values, vectors = torch.linalg.eigh(of.up.T @ of.up)
    return (vectors * values.clamp_min(0).sqrt()) @ (vectors.T @ of.down)


def row_overlap(first: Tensor, second: Tensor) -> RowOverlap:
    """Principal angles between the row spaces of nonzero (k₁, I) and (k₂, I), from their Gram matrices."""
    a, b = first.double(), second.double()
    cross = a @ b.T  # (k₁, k₂)
    (white_a, energy_a), (white_b, energy_b) = _whiten(a @ a.T), _whiten(b @ b.T)
    squares = torch.linalg.svdvals(white_a.T @ cross @ white_b).clamp(0, 1).square()  # (min(k₁, k₂),)
    return RowOverlap(
        mean=squares.mean().item(),
        random=max(white_a.shape[1], white_b.shape[1]) / a.shape[1],
        largest=squares[0].item(),
        first_in_second=min(1.0, (cross @ white_b).square().sum().item() / energy_a),
        second_in_first=min(1.0, (white_a.T @ cross).square().sum().item() / energy_b),
    )


def interference(product: float, first: float, second: float) -> float:
    """‖X + Y‖² / (‖X‖² + ‖Y‖²) from ⟨X, Y⟩ and the two energies: 0 cancelling, 1 orthogonal, 2 equal."""
    return 1 + 2 * product / (first + second)


def _whiten(gram: Tensor) -> tuple[Tensor, float]:
    """Map E·Λ^-½ (k, rank) that orthonormalises the rows of a Gram matrix, and the energy of these rows."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > _DEGENERATE * values[-1]
    return vectors[:, kept] / values[kept].sqrt(), gram.trace().item()


def _unit(value: float) -> float:
    return max(-1.0, min(1.0, value))  # float64 rounding leaves 1 + 2e-16


# ---------- whole files


def compare(
    first: Mapping[str, Roles], second: Mapping[str, Roles], names: Names = ("style", "content")
) -> dict[str, list[LayerSimilarity]]:
    """For each matrix, one `LayerSimilarity` per layer of both files, in the order of the first file.

    `first`, `second`: module -> role -> finite tensor from `comparable`, in any dialects. A matrix that no
    common layer has in both files is left out. Raises `Refused` for files without a common layer or matrix,
    for factors that do not multiply and for layers of different models.
    """
    pairs = [(module, first[module], second[other]) for module, other in common(first, second)]
    if not pairs:
        raise Refused(
            f"{names[0]} and {names[1]} have no layer in common ({names[0]}: {_examples(first)}; "
            f"{names[1]}: {_examples(second)}); compare adapters of the same model and targets"
        )
    by_matrix: dict[str, list[LayerSimilarity]] = {matrix: [] for matrix in MATRICES}
    for module, first_roles, second_roles in pairs:
        _refuse_other_model(module, first_roles, second_roles, names)
        for matrix, role in keys.MATRICES.items():
            if role in first_roles and role in second_roles:
                by_matrix[matrix].append(_compare_matrix(matrix, module, first_roles, second_roles, names))
        whole = update(module, first_roles), update(module, second_roles)
        if whole[0] is not None and whole[1] is not None:
            rank = min(_rank(first_roles), _rank(second_roles))
            by_matrix["deltaW"].append(_compare_updates(module, whole[0], whole[1], rank, names))
    by_matrix = {matrix: layers for matrix, layers in by_matrix.items() if layers}
    if not by_matrix:
        raise Refused(
            f"no matrix in common: {names[0]} has {_role_names(first)}, {names[1]} has "
            f"{_role_names(second)}; compare two files of one kind, "
            "both with their basis or both without"
        )
    return by_matrix


def comparable(adapter: Adapter) -> dict[str, Roles]:
    """The adapter's layers by name: the file's tensors, or one pair of factors for methods with cores."""
    layers: dict[str, Roles] = {}
    for place, roles in adapter.raw.items():
        delta = adapter.layers.get(place)
        if delta is not None and not roles.keys() <= keys.KOHYA.keys():
            pair = {"up": delta.up, "down": delta.down, "alpha": torch.tensor(delta.scale * delta.rank)}
            roles = pair if delta.magnitude is None else {**pair, "magnitude": delta.magnitude}
        layers[adapter.name(place)] = roles
    return layers


def common(first: Mapping[str, Roles], second: Mapping[str, Roles]) -> list[tuple[str, str]]:
    """The modules in both files, in each file's spelling, in the order of the first file."""
    spelled = {keys.flat(module): module for module in second}
    return [(module, spelled[keys.flat(module)]) for module in first if keys.flat(module) in spelled]


def layer_name(module: str) -> str:
    """The name printed for a module: with the `transformer.` prefix of diffusers' files."""
    complete = keys.is_text_encoder(module) or module.startswith("lora_")  # kohya's names have no prefix
    return module if complete else f"transformer.{module}"


def _compare_matrix(matrix: str, module: str, first: Roles, second: Roles, names: Names) -> LayerSimilarity:
    a, b = (roles[keys.MATRICES[matrix]].double().flatten(1) for roles in (first, second))
    alike, zero = a.shape == b.shape, _zero(a.norm().item(), b.norm().item(), names)
    layer = LayerSimilarity(
        layer_name(module),
        cosine(a, b) if alike else None,
        a.norm().item(),
        b.norm().item(),
        tuple(a.shape),
        reason=zero or (None if alike else f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"),
        null_band=3 / math.sqrt(a.numel()) if alike else None,
    )
    if matrix == "Q" and not zero:
        overlap = row_overlap(a.T, b.T).mean
        layer = replace(layer, basis_overlap=overlap)
        if not alike:
            layer = replace(layer, similarity=overlap, measure="principal angles", reason=None)
    if matrix == "deltaR" and not zero:
        layer = replace(layer, row_overlap=row_overlap(a, b))
        if alike:
            a, b = a * strength(first, a.shape[0]), b * strength(second, b.shape[0])
            product, energies = (a * b).sum().item(), (a.square().sum().item(), b.square().sum().item())
            layer = replace(layer, interference=interference(product, *energies))
    return layer


def _compare_updates(module: str, first: Delta, second: Delta, rank: int, names: Names) -> LayerSimilarity:
    energies = energy(first), energy(second)
    norms = math.sqrt(energies[0]), math.sqrt(energies[1])
    out, inputs = first.up.shape[0], first.down.shape[1]
    layer = LayerSimilarity(
        layer_name(module),
        None,
        *norms,
        (out, inputs),
        reason=_zero(*norms, names),
        # the widest case: two updates on one frozen Q; independent ups lie within ±3/√(O·I)
        null_band=3 / math.sqrt(rank * inputs),
    )
    if layer.reason:
        return layer
    product = inner(first, second)
    return replace(
        layer,
        similarity=_unit(product / (norms[0] * norms[1])),
        interference=interference(product, *energies),
        row_overlap=row_overlap(rows(first), rows(second)),
    )


def _rank(roles: Roles) -> int:
    return check_shapes("the layer", roles, "the file")["rank"]


def _zero(first: float, second: float, names: Names) -> str | None:
    zero = [name for name, norm in zip(names, (first, second), strict=True) if norm == 0]
    return f"zero in {' and '.join(zero)}" if zero else None


def _refuse_other_model(module: str, first: Roles, second: Roles, names: Names) -> None:
    full = layer_name(module)
    ours, theirs = (
        check_shapes(full, roles, name) for roles, name in zip((first, second), names, strict=True)
    )
    for side in ("outputs", "inputs"):
        if ours.get(side) and theirs.get(side) and ours[side] != theirs[side]:
            raise Refused(
                f"{full} has {ours[side]} {side} in {names[0]} and {theirs[side]} in "
                f"{names[1]}; they adapt different models and cannot be compared"
            )


def _examples(layers: Mapping[str, Roles]) -> str:
    shown = ", ".join(layer_name(module) for module in list(layers)[:2]) or "no layers"
    return f"{shown}, … {len(layers)} in all" if len(layers) > 2 else shown


def _role_names(layers: Mapping[str, Roles]) -> str:
    return ", ".join(sorted({role for roles in layers.values() for role in roles})) or "nothing"


# ---------- statistics


def statistics(layers: list[LayerSimilarity]) -> dict[str, float | int | None]:
    """Statistics of the layers that have a value; undefined layers are only counted.

    Std is that of the population. `outside_null_band` is a share of the layers that have a value and a band.
    """
    values = [layer.similarity for layer in layers if layer.similarity is not None]
    pairs = [(layer.similarity, layer.null_band) for layer in layers]
    banded = [(abs(value), band) for value, band in pairs if value is not None and band is not None]
    disturbed = [layer.interference for layer in layers if layer.interference is not None]
    overlaps = [layer.row_overlap for layer in layers if layer.row_overlap is not None]

    def over(function, numbers: list) -> float | None:
        return float(function(numbers)) if numbers else None

    return {
        "mean": over(fmean, values),
        "median": over(median, values),
        "std": over(pstdev, values),
        "min": over(min, values),
        "max": over(max, values),
        "abs_mean": over(fmean, [abs(value) for value in values]),
        "abs_max": over(max, [abs(value) for value in values]),
        "layers": len(layers),
        "undefined": len(layers) - len(values),
        "undefined_zero": sum((layer.reason or "").startswith("zero") for layer in layers),
        "by_principal_angles": sum(layer.measure != "cosine" for layer in layers),
        "null_band_min": over(min, [band for _, band in banded]),
        "null_band_max": over(max, [band for _, band in banded]),
        "outside_null_band": over(fmean, [value > band for value, band in banded]),
        "lora1_norm_mean": over(fmean, [layer.lora1_norm for layer in layers]),
        "lora2_norm_mean": over(fmean, [layer.lora2_norm for layer in layers]),
        "basis_overlap_mean": over(fmean, [x.basis_overlap for x in layers if x.basis_overlap is not None]),
        "interference_mean": over(fmean, disturbed),
        "interference_min": over(min, disturbed),
        "interference_max": over(max, disturbed),
        "row_overlap_mean": over(fmean, [overlap.mean for overlap in overlaps]),
        "row_overlap_random": over(fmean, [overlap.random for overlap in overlaps]),
        "energy_1_in_2_mean": over(fmean, [overlap.first_in_second for overlap in overlaps]),
        "energy_2_in_1_mean": over(fmean, [overlap.second_in_first for overlap in overlaps]),
    }


def judge(matrix: str, mean: float | None, outside: float | None = None) -> str | None:
    """ "ideal", "warn" or "problem" by the thresholds of the QR-LoRA demo guide; None where it has none.

    Q and baseR count as shared above 0.99 and as not shared below 0.95. deltaR and deltaW count as entangled
    above 0.50, by absolute value, because opposed updates interfere as well. They count as separate below
    0.10 if the share `outside` of layers outside of the null band is at most 5 %: layers of both signs can
    have a mean near 0, and independent matrices are outside in 0.3 % of the layers.
    """
    if mean is None or matrix not in _THRESHOLDS:
        return None
    ideal, problem = _THRESHOLDS[matrix]
    if matrix in UPDATES:
        if abs(mean) > problem:
            return "problem"
        return "ideal" if abs(mean) < ideal and (outside or 0.0) <= OUTSIDE else "warn"
    return "ideal" if mean > ideal else "problem" if mean < problem else "warn"
