"""Hosts without weights for other programs to put an adapter on, and what each layer answers there.

A host has the right name and size and takes no memory (`static.phantom`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.formats.delta import Delta, phantom
from lowrank.naming.places import LayerPath


class Checked(NamedTuple):
    """Who read the file, how many layers it found, and the worst relative difference of a layer."""

    reader: str
    layers: int
    worst: float


class Unread(ValueError):
    """A library found other layers in the file than it holds."""


class Tree(nn.Module):
    """A model of nothing but the layers that an adapter is for, under their own dotted names."""

    def put(self, path: str, layer: nn.Module) -> None:
        """Hang a layer in, making what it hangs on."""
        *parents, last = path.split(".")
        at: nn.Module = self
        for name in parents:
            if name not in at._modules:
                at.add_module(name, nn.Module())
            at = at.get_submodule(name)
        at.add_module(last, layer)


def hosts(
    layers: Mapping[LayerPath, Delta], part: str, name: Callable[[LayerPath], str] = lambda place: place.path
) -> Tree:
    """The layers of one part on a tree; with DoRA their rows are as long as the change is."""
    tree = Tree()
    for place, layer in layers.items():
        if place.part == part:
            tree.put(name(place), host(layer))
    return tree


def host(layer: Delta) -> nn.Module:
    """A phantom host for a layer."""
    ins = layer.down.shape[1] // _area(layer)
    row = None
    if layer.magnitude is not None:
        row = torch.linspace(-1, 1, layer.down.shape[1])
        row = row * (layer.norm() / layer.up.shape[0] ** 0.5 + 1e-3) / row.norm()
    return phantom(layer.up.shape[0], ins, layer.kernel, row)


def _area(layer: Delta) -> int:
    return int(torch.tensor(layer.kernel).prod()) if layer.kernel else 1


def answers(layer: Delta, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(what the layer with W′ answers to x, what the host alone does), in float64."""
    if layer.magnitude is None:  # the phantom's weight is zero, so that only the change answers
        h = apply_thin(layer, x.double())
        return h, torch.zeros_like(h)

    def apply(matrix: Tensor) -> Tensor:
        if not layer.kernel:
            return F.linear(x.double(), matrix)
        kernel = matrix.reshape(len(matrix), -1, *layer.kernel)
        return F.conv2d(x.double(), kernel, padding=[k // 2 for k in layer.kernel])

    W = weight.double().flatten(1)
    wide = layer._replace(up=layer.up.double(), down=layer.down.double())
    return apply(wide.changed(W)), apply(W)


def apply_thin(layer: Delta, x: Tensor) -> Tensor:
    """scale · U D x, for a linear layer or a convolution, in x's dtype."""
    up, down = layer.up.to(x), layer.down.to(x)
    if not layer.kernel:
        return layer.scale * F.linear(F.linear(x, down), up)
    h = F.conv2d(x, layer.joined_kernel(down, rows=True), padding=[k // 2 for k in layer.kernel])
    return layer.scale * F.conv2d(h, up[:, :, None, None])


def compared(pairs: Sequence[tuple[LayerPath, Delta, nn.Module]], reader: str) -> Checked:
    """Ask each loaded layer one question and compare with ΔW."""
    worst = 0.0
    made = torch.Generator().manual_seed(0)
    for place, layer, module in pairs:
        ins = layer.down.shape[1] // _area(layer)
        x = torch.randn((1, ins, 3, 3) if layer.kernel else (2, ins), generator=made)
        with torch.no_grad():
            told = module(x).double()
        want, base = answers(layer, _weight(module), x)
        size = float((want - base).norm())
        worst = max(worst, float((told - want).norm()) / max(size, 1e-30))
        if told.shape != want.shape:
            raise Unread(f"{reader} answers {tuple(told.shape)} for {place.path}")
    return Checked(reader, len(pairs), worst)


def _weight(module: nn.Module) -> Tensor:
    inner: Any = getattr(module, "base_layer", module)
    return inner.weight.detach()
