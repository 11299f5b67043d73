"""Hosts without weights for other programs to put an adapter on, and the outputs of the loaded layers.

A host has a layer's name and size and takes no memory (`delta.weightless_host`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.formats.delta import Delta, weightless_host
from lowrank.naming.places import LayerPath


class Checked(NamedTuple):
    """Which program read the file, how many layers, and the worst relative difference of a layer.

    With a `note` it does not read the file right, which is the program's fault; the note has a way out.
    """

    reader: str
    layers: int
    worst: float
    note: str = ""


class Unread(ValueError):
    """A library read other layers from a file than the file has."""


class Tree(nn.Module):
    """A model with only the layers of an adapter, under their dotted names."""

    def put(self, path: str, layer: nn.Module) -> None:
        """Add a layer, and the modules above it."""
        *parents, last = path.split(".")
        parent: nn.Module = self
        for name in parents:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, layer)


def hosts(
    layers: Mapping[LayerPath, Delta], part: str, name: Callable[[LayerPath], str] = lambda place: place.path
) -> Tree:
    """A tree with a host for each layer of one part."""
    tree = Tree()
    for place, layer in layers.items():
        if place.part == part:
            tree.put(name(place), host(layer))
    return tree


def host(layer: Delta) -> nn.Module:
    """A weightless host for a layer: its weight is zero, or with DoRA has rows of the size of ΔW's."""
    width = layer.down.shape[1]
    row = None
    if layer.magnitude is not None:
        row = torch.linspace(-1, 1, width)
        row = row * (layer.norm() / layer.up.shape[0] ** 0.5 + 1e-3) / row.norm()
    return weightless_host(layer.up.shape[0], width // math.prod(layer.kernel), layer.kernel, row)


def outputs(layer: Delta, weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(output of the adapted layer for x, output of the host alone), in float64."""
    if layer.magnitude is None:  # the weightless_host's weight is zero, so that only the change has an output
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
    """Compare the outputs of loaded layers with ΔW, one random input for each."""
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for place, layer, module in pairs:
        width = layer.down.shape[1] // math.prod(layer.kernel)
        x = torch.randn((1, width, 3, 3) if layer.kernel else (2, width), generator=generator)
        with torch.no_grad():
            output = module(x).double()
        base_layer: Any = getattr(module, "base_layer", module)
        expected, base = outputs(layer, base_layer.weight.detach(), x)
        if output.shape != expected.shape:
            raise Unread(f"{reader} gives outputs of {tuple(output.shape)} for {place.path}")
        size = float((expected - base).norm())
        worst = max(worst, float((output - expected).norm()) / max(size, 1e-30))
    return Checked(reader, len(pairs), worst)
