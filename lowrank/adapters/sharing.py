"""Tensors that several layers share: one trained down of an input space, frozen roles of one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank.adapters.layer import AdaptedLayer
from lowrank.adapters.method import Factor
from lowrank.adapters.targets import Target
from lowrank.errors import Refused


def share_trained(
    layers: Mapping[str, AdaptedLayer], targets: Mapping[str, Target], factor: Factor
) -> dict[str, str]:
    """Give layers of one input space one tensor of the shared role; return each layer's owner of it."""
    owner_of: dict[Any, str] = {}  # by input space and shape
    owners, role = {}, factor.shared
    if factor.share is None or role is None:
        return {}
    for name, layer in layers.items():
        target, shape = targets[name], layer.roles()[role].shape
        key = (factor.share(target.part, target.path, tuple(shape[1:])), shape)
        owners[name] = owner_of.setdefault(key, name)
        layer.register_parameter(role, layers[owners[name]].roles()[role])
    return owners


def share_frozen(layers: Iterable[AdaptedLayer], factor: Factor) -> None:
    """Give layers of equal shapes one buffer of each role in `factor.common`."""
    first: dict[tuple[str, torch.Size], Tensor] = {}
    for layer in layers:
        for role in factor.common:
            value = layer.get_buffer(role)
            setattr(layer, role, first.setdefault((role, value.shape), value))


def once(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return `fn` with one result per tensor, so that tensors shared before are shared afterwards."""
    results: dict[int, tuple[Tensor, Tensor]] = {}  # with the argument, so that its id is not reused

    def apply_once(value: Tensor) -> Tensor:
        if id(value) not in results:
            results[id(value)] = value, fn(value)
        return results[id(value)][1]

    return apply_once


def check_equal(
    factor: Factor, name: str, owner: str, layers: Mapping[str, Mapping[str, Tensor]], source: str
) -> None:
    """Raise `Refused` if a file has different tensors for layers that share one."""
    pairs = [(factor.shared, owner)] if factor.shared else []
    for role in layers[name].keys() & set(factor.common):
        shape = layers[name][role].shape
        pairs.append(
            (role, next(n for n, roles in layers.items() if role in roles and roles[role].shape == shape))
        )
    for role, other in pairs:
        values = [layers.get(layer, {}).get(role) for layer in (name, other)]
        if values[0] is not None and values[1] is not None and not torch.equal(values[0], values[1]):
            raise Refused(
                f"{source} has different {role} tensors for {name} and {other}, which share one; "
                "use the file as it was saved"
            )
