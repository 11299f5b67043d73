"""A context file bound to the layers of a network: LaLoRA's penalty as a few batched products.

    (λ/2) Σ_l tr(UᵀGU · DSDᵀ)·s²/c        c = Σ_l tr(G)·tr(S) / Σ_l O·I

c is the mean curvature of a weight over the layers that are held, so that λ means the same for every base
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
from lowrank.adapters.targets import host_shape
from lowrank.errors import Refused
from lowrank.laplace.context_file import LEGACY, Context, Curvature, weight_fingerprint
from lowrank.naming import keys

logger = logging.getLogger(__name__)

SAME_BASE = 0.5  # most that a base's probes may differ from the file's, root mean square; strangers: 1.4


@dataclass
class Group:
    """Layers of one shape and rank with their curvatures, stacked (n, …)."""

    layers: list[AdaptedLayer]
    S: Spectrum
    G: Spectrum

    def value(self, measure: Callable[..., Tensor]) -> Tensor:
        """Σ s²·tr(…) of these layers; the curvatures follow the parameters to their device."""
        pairs = [_thin(layer) for layer in self.layers]
        U, D = torch.stack([up for up, _ in pairs]), torch.stack([down for _, down in pairs])
        dtype = torch.promote_types(U.dtype, torch.float32)
        if self.S.main.device != U.device or self.S.main.dtype != dtype:
            self.S, self.G = _to(self.S, U.device, dtype), _to(self.G, U.device, dtype)
        s = torch.tensor([layer.scale * _strength(layer) for layer in self.layers], dtype=dtype)
        return (measure(U.to(dtype), D.to(dtype), self.S, self.G) * s.square().to(U.device)).sum()


def bind_penalty(network: Any, context: Context, strength: float, source: str) -> Callable[[Any], Tensor]:
    """The penalty of strength λ of this network, `value(network) -> scalar`.

    The layers that are held and those that are not are logged. Raises `Refused` for a context of another base
    model, and for one that fits no layer.
    """
    if context.curvature == LEGACY:
        return _bind_coordinates(network, context, strength, source)
    own = {keys.flat(name): name for name in context.layers}
    found: dict[AdaptedLayer, str] = {}
    for layer in network.layers():
        told = next((own[s] for s in network.targets[layer.name].spellings if s in own), None)
        if told is not None:
            found[layer] = told
            _check_shape(layer, context.layers[told].shape, source)
    names = [layer.name for layer in network.layers()]
    if not found:
        raise Refused(
            f"{source} holds none of the {len(names)} adapted layers: it has "
            f"{', '.join(list(own.values())[:2])} and the network {', '.join(names[:2])}; "
            "make a context of this base model and these targets"
        )
    if not next(iter(found)).host.weight.is_meta:
        _check_base({layer: context.probes[name] for layer, name in found.items()}, source)
        _tell(names, [layer.name for layer in found], len(context.layers), source)
    return _laplace(
        {layer: context.layers[name] for layer, name in found.items()},
        strength,
        penalty.ranks_apart if context.curvature == "lora_diag" else penalty.kronecker,
        source,
    )


def isotropic(network: Any, strength: float) -> Callable[[Any], Tensor]:
    """(λ/2) Σ ‖ΔW‖²_F: every direction counts the same, which needs no context."""
    layers = {}
    for layer in network.layers():
        O, I = host_shape(layer.host)
        layers[layer] = Curvature(*(Spectrum(None, None, torch.ones(n)) for n in (I, O)))
    return _laplace(layers, strength, penalty.kronecker, "isotropic")


def _laplace(
    layers: Mapping[AdaptedLayer, Curvature], strength: float, measure: Callable[..., Tensor], source: str
) -> Callable[[Any], Tensor]:
    total = sum(float(one.G.main.double().sum() * one.S.main.double().sum()) for one in layers.values())
    weights = sum(O * I for O, I in (one.shape for one in layers.values()))
    if not total > 0:
        raise Refused(
            f"{source} has no curvature in any of the {len(layers)} adapted layers, so that nothing would be "
            "held; make it again with more samples"
        )
    groups, factor = _grouped(layers), strength / 2 * weights / total

    def value(network: Any) -> Tensor:
        if not strength:  # a run with λ = 0 is, bit for bit, the run without
            return torch.zeros((), device=next(network.parameters()).device)
        return factor * torch.stack([group.value(measure) for group in groups]).sum()

    return value


def _grouped(layers: Mapping[AdaptedLayer, Curvature]) -> list[Group]:
    alike: dict[Any, list[AdaptedLayer]] = defaultdict(list)
    for layer, one in layers.items():
        parts = (None if part is None else part.shape for side in one for part in side)
        alike[(layer.rank, *parts)].append(layer)
    return [
        Group(members, *(_stacked([layers[layer][side] for layer in members]) for side in (0, 1)))
        for members in alike.values()
    ]


def _stacked(spectra: list[Spectrum]) -> Spectrum:
    columns = zip(*spectra, strict=True)
    return Spectrum(*(None if column[0] is None else torch.stack(column) for column in columns))


def _to(spectrum: Spectrum, device: torch.device, dtype: torch.dtype) -> Spectrum:
    return Spectrum(*(None if part is None else part.to(device, dtype) for part in spectrum))


def _thin(layer: AdaptedLayer) -> tuple[Tensor, Tensor]:
    """U (O, R) and D (R, I·k·k) of a layer; of experts their mean, as if each had the same share."""
    U, D = layer.factors()
    return (U.mean(0) if layer.method.experts else U).flatten(1), D.flatten(1)


def _strength(layer: AdaptedLayer) -> float:
    if isinstance(layer.multiplier, Tensor):
        raise Refused(
            f"{layer.name} has a multiplier for each sample, and so no one ΔW that a penalty could hold; "
            "give one number"
        )
    return layer.multiplier


def _check_shape(layer: AdaptedLayer, shape: tuple[int, int], source: str) -> None:
    if shape != host_shape(layer.host):
        raise Refused(
            f"{layer.name} is {'×'.join(map(str, host_shape(layer.host)))} and {shape[0]}×{shape[1]} in "
            f" {source}, which is of another base model; make a context of this one"
        )


def _check_base(probes: Mapping[AdaptedLayer, Tensor], source: str) -> None:
    differ = torch.cat([weight_fingerprint(layer.host) - told for layer, told in probes.items()])
    distance = float(differ.square().mean().sqrt())
    if not distance < SAME_BASE:
        raise Refused(
            f"{source} is of another base model: the weights of the {len(probes)} layers differ by "
            f"{distance:.0%} (limit {SAME_BASE:.0%}); make a context of this one"
        )


def _tell(names: list[str], held: list[str], known: int, source: str) -> None:
    logger.info("%s: %d of %d adapted layers are held", source, len(held), len(names))
    if free := [name for name in names if name not in set(held)]:
        logger.warning("%s: %d adapted layers are not in it and stay free: %s, …", source, len(free), free[0])
    if known > len(held):
        logger.info("%s: %d of its %d layers are not adapted", source, known - len(held), known)


# ------------------------------------------------------------------ the fork's files


class Core(NamedTuple):
    """A trained core whose coordinates a legacy file knows."""

    layer: AdaptedLayer
    role: str
    mean: Tensor
    precision: Tensor


def _bind_coordinates(
    network: Any, context: Context, strength: float, source: str
) -> Callable[[Any], Tensor]:
    """(λ/2) Σ p·(α − mean)²/c over trained cores of exactly the file's shapes; c is the mean precision."""
    own = {keys.flat(name): pair for name, pair in context.coordinates.items()}
    held = []
    for layer in network.layers():
        told = next((own[s] for s in network.targets[layer.name].spellings if s in own), None)
        if told is not None:
            cores = {role for chain in layer.factor.chains for role in (*chain.up[1:], *chain.down[:-1])}
            held += [Core(layer, role, *told) for role in layer.roles() if role in cores]
    for layer, role, mean, _ in held:
        if layer.roles()[role].shape != mean.shape:
            raise Refused(
                f"{layer.name}.{role} is {tuple(layer.roles()[role].shape)} and {tuple(mean.shape)} in "
                f"{source}, which is of another basis; make a context with calc_lalora_context.py"
            )
    if not held:
        raise Refused(
            f"{source} holds precisions of a universal network's coordinates, and no layer of "
            f"{network.method.name} has those; make a context of the weights with calc_lalora_context.py"
        )
    c = float(torch.cat([core.precision.flatten() for core in held]).mean())
    if not c > 0:
        raise Refused(f"{source} has no precision above 0, so that nothing would be held; make it again")
    _tell([layer.name for layer in network.layers()], [core.layer.name for core in held], len(own), source)

    def value(network: Any) -> Tensor:
        cores = [core.layer.roles()[core.role] for core in held]
        if not strength:
            return torch.zeros((), device=cores[0].device)
        means = [core.mean.to(cores[0]) for core in held]
        return strength / c * penalty.quadratic(cores, means, [core.precision.to(cores[0]) for core in held])

    return value
