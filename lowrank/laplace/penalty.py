"""LaLoRA's penalty for the layers of a network, from a context file, as a few batched products.

    (λ/2) Σ_l tr(UᵀGU · DSDᵀ)·s²/c        c = Σ_l tr(G)·tr(S) / Σ_l O·I

A `lora_diag` context penalises U alone: (λ/2) Σ_l Σ_r (UᵀGU)_rr (D₀SD₀ᵀ)_rr·s²/c, D₀ as training starts.
c is the mean curvature per weight over the penalised layers, so that λ has the same meaning for every base
model, loss and number of samples. Layers of one shape are computed together.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank.adapters import penalty
from lowrank.adapters.layer import AdaptedLayer
from lowrank.adapters.penalty import Spectrum
from lowrank.adapters.targets import host_shape, stored_weight
from lowrank.errors import Refused
from lowrank.laplace.context_file import GAUSS_NEWTON, LEGACY, Context, Curvature, weight_fingerprint
from lowrank.naming import keys
from lowrank.tensors import has_values

logger = logging.getLogger(__name__)

SAME_BASE = 0.5  # largest RMS difference of fingerprints of one base model; of unrelated models it is 1.4


@dataclass
class Group:
    """n layers of one shape and rank with their curvatures, stacked (n, …)."""

    layers: list[AdaptedLayer]
    S: Spectrum
    G: Spectrum
    h: Tensor | None = None  # (n, R), E[(D₀x)²]: the penalty is of U alone

    def value(self) -> Tensor:
        """Return Σ s²·tr(UᵀGU · DSDᵀ) over the layers; curvatures are moved to the parameters' device."""
        pairs = [_thin(layer) for layer in self.layers]
        U, D = torch.stack([up for up, _ in pairs]), torch.stack([down for _, down in pairs])
        dtype = torch.promote_types(U.dtype, torch.float32)
        if self.S.main.device != U.device or self.S.main.dtype != dtype:
            self.S, self.G = _to(self.S, U.device, dtype), _to(self.G, U.device, dtype)
            self.h = None if self.h is None else self.h.to(U.device, dtype)
        s = torch.tensor([layer.scale * _strength(layer) for layer in self.layers], dtype=dtype)
        if self.h is None:
            sizes = penalty.kronecker(U.to(dtype), D.to(dtype), self.S, self.G)
        else:
            sizes = penalty.ranks_apart(U.to(dtype), self.h, self.G)
        return (sizes * s.square().to(U.device)).sum()

    def at_start(self) -> Group:
        """Return a group that penalises U alone, with the present D as D₀."""
        D = torch.stack([_thin(layer)[1].detach() for layer in self.layers]).float()
        S = _to(self.S, D.device, D.dtype)
        return Group(self.layers, self.S, self.G, torch.diagonal(S.form(D.mT), dim1=-2, dim2=-1))


def bind_penalty(network: Any, context: Context, strength: float, source: str) -> Callable[[Any], Tensor]:
    """Return the penalty of strength λ for this network, `value(network) -> scalar`.

    Logs how many layers it applies to. Raises `Refused` for a context of another base model, and for one that
    has none of the layers.
    """
    if context.curvature == LEGACY:
        return _bind_coordinates(network, context, strength, source)
    if context.metadata.get("lowrank.fisher") != GAUSS_NEWTON:
        logger.warning(
            "%s holds the empirical Fisher matrix, which weighs a timestep by the base model's error there; "
            "calc_lalora_context.py of this version measures the Gauss-Newton matrix: make the file again",
            source,
        )
    by_key = {keys.flat(name): name for name in context.layers}
    matches: dict[AdaptedLayer, str] = {}
    for layer in network.layers():
        name = next((by_key[s] for s in network.targets[layer.name].spellings if s in by_key), None)
        if name is not None:
            matches[layer] = name
            _check_shape(layer, context.layers[name].shape, source)
    names = [layer.name for layer in network.layers()]
    if not matches:
        raise Refused(
            f"{source} has none of the {len(names)} adapted layers: it has "
            f"{', '.join(list(by_key.values())[:2])} and the network {', '.join(names[:2])}; "
            "make a context of this base model and these targets"
        )
    if has_values(stored_weight(next(iter(matches)).host)):
        _check_base({layer: context.probes[name] for layer, name in matches.items()}, source)
        _log_coverage(names, [layer.name for layer in matches], len(context.layers), source)
    return _laplace(
        {layer: context.layers[name] for layer, name in matches.items()},
        strength,
        source,
        up_alone=context.curvature == "lora_diag",
    )


def isotropic(network: Any, strength: float) -> Callable[[Any], Tensor]:
    """Return the penalty (λ/2) Σ ‖ΔW‖²_F, equal in every direction, which needs no context."""
    layers = {}
    for layer in network.layers():
        O, I = host_shape(layer.host)
        layers[layer] = Curvature(*(Spectrum(None, None, torch.ones(n)) for n in (I, O)))
    return _laplace(layers, strength, "isotropic")


def _laplace(
    layers: Mapping[AdaptedLayer, Curvature], strength: float, source: str, up_alone: bool = False
) -> Callable[[Any], Tensor]:
    total = sum(
        float(curvature.G.main.double().sum() * curvature.S.main.double().sum())
        for curvature in layers.values()
    )
    weights = sum(O * I for O, I in (curvature.shape for curvature in layers.values()))
    if not total > 0:
        raise Refused(
            f"{source} has no curvature in any of the {len(layers)} adapted layers, the penalty would be 0; "
            "make it again with more samples"
        )
    groups, factor = _grouped(layers), strength / 2 * weights / total
    if up_alone:
        groups = [group.at_start() for group in groups]

    def value(network: Any) -> Tensor:
        if not strength:  # with λ = 0 the run equals, bit for bit, one without
            return torch.zeros((), device=next(network.parameters()).device)
        return factor * torch.stack([group.value() for group in groups]).sum()

    return value


def _grouped(layers: Mapping[AdaptedLayer, Curvature]) -> list[Group]:
    by_shape: dict[Any, list[AdaptedLayer]] = defaultdict(list)
    for layer, curvature in layers.items():
        shapes = (None if part is None else part.shape for side in curvature for part in side)
        by_shape[(layer.rank, *shapes)].append(layer)
    return [
        Group(
            members,
            _stacked([layers[layer].S for layer in members]),
            _stacked([layers[layer].G for layer in members]),
        )
        for members in by_shape.values()
    ]


def _stacked(spectra: list[Spectrum]) -> Spectrum:
    columns = zip(*spectra, strict=True)
    return Spectrum(*(None if column[0] is None else torch.stack(column) for column in columns))


def _to(spectrum: Spectrum, device: torch.device, dtype: torch.dtype) -> Spectrum:
    return Spectrum(*(None if part is None else part.to(device, dtype) for part in spectrum))


def _thin(layer: AdaptedLayer) -> tuple[Tensor, Tensor]:
    """Return U (O, R) and D (R, I·k·k) of a layer; for experts the mean of their U."""
    U, D = layer.factors()
    return (U.mean(0) if layer.method.experts else U).flatten(1), D.flatten(1)


def _strength(layer: AdaptedLayer) -> float:
    if isinstance(layer.multiplier, Tensor):
        raise Refused(
            f"{layer.name} has one multiplier per sample, but a penalty needs a single ΔW; give one number"
        )
    return layer.multiplier


def _check_shape(layer: AdaptedLayer, shape: tuple[int, int], source: str) -> None:
    if shape != host_shape(layer.host):
        raise Refused(
            f"{layer.name} is {'×'.join(map(str, host_shape(layer.host)))} and {shape[0]}×{shape[1]} in "
            f"{source}, which was made on another base model; make a context of this base model"
        )


def _check_base(probes: Mapping[AdaptedLayer, Tensor], source: str) -> None:
    differences = [weight_fingerprint(layer.host) - probe for layer, probe in probes.items()]
    distance = float(torch.cat(differences).square().mean().sqrt())
    if not distance < SAME_BASE:
        raise Refused(
            f"{source} was made on another base model: the weights of {len(probes)} layers differ by "
            f"{distance:.0%} (limit {SAME_BASE:.0%}); make a context of this base model"
        )


def _log_coverage(names: list[str], penalised: list[str], known: int, source: str) -> None:
    logger.info("%s: the penalty applies to %d of %d adapted layers", source, len(penalised), len(names))
    if free := [name for name in names if name not in set(penalised)]:
        logger.warning(
            "%s lacks %d adapted layers, which have no penalty, for example %s", source, len(free), free[0]
        )
    if known > len(penalised):
        logger.info("%s: %d of its %d layers are not adapted", source, known - len(penalised), known)


# ------------------------------------------------------------------ the fork's files


class Core(NamedTuple):
    """A trained core with the mean and precision of its coordinates in a legacy file."""

    layer: AdaptedLayer
    role: str
    mean: Tensor
    precision: Tensor


def _bind_coordinates(
    network: Any, context: Context, strength: float, source: str
) -> Callable[[Any], Tensor]:
    """Return the penalty (λ/2) Σ p·(α − mean)²/c over trained cores; c is the mean precision.

    Raises `Refused` for cores of another shape than in the file.
    """
    by_key = {keys.flat(name): pair for name, pair in context.coordinates.items()}
    cores: list[Core] = []
    for layer in network.layers():
        pair = next((by_key[s] for s in network.targets[layer.name].spellings if s in by_key), None)
        if pair is not None:
            cores += [Core(layer, role, *pair) for role in layer.roles() if role in layer.factor.cores()]
    for layer, role, mean, _ in cores:
        if layer.roles()[role].shape != mean.shape:
            raise Refused(
                f"{layer.name}.{role} is {tuple(layer.roles()[role].shape)} and {tuple(mean.shape)} in "
                f"{source}, which was made with another basis; make a context with calc_lalora_context.py"
            )
    if not cores:
        raise Refused(
            f"{source} has precisions of a universal network's coordinates, which no layer of "
            f"{network.method.name} has; make a context of the weights with calc_lalora_context.py"
        )
    c = float(torch.cat([core.precision.flatten() for core in cores]).mean())
    if not c > 0:
        raise Refused(f"{source} has no precision above 0, the penalty would be 0; make it again")
    names = [layer.name for layer in network.layers()]
    _log_coverage(names, [core.layer.name for core in cores], len(by_key), source)

    def value(network: Any) -> Tensor:
        parameters = [core.layer.roles()[core.role] for core in cores]
        if not strength:
            return torch.zeros((), device=parameters[0].device)
        means = [core.mean.to(parameters[0]) for core in cores]
        precisions = [core.precision.to(parameters[0]) for core in cores]
        return strength / c * penalty.quadratic(parameters, means, precisions)

    return value
