"""Frozen layers: a linear layer and a convolution that keep nothing for the backward pass.

The base's weights get no gradient, so the backward of `y = W x + b` needs W alone. A frozen layer fetches W
in the forward and again in the backward, and autograd keeps no copy in between. That frees two choices for
each layer: how its weight is stored (`storage.Format`) and where it is (`place.Stream`, or the device).
Outputs and gradients are those of torch's own layers with the widened weight, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.models.place import Stream
from lowrank.models.storage import Format, plain_kind, row_pieces


class _Frozen:
    """What both kinds of layers share: the stored weight, and W as a new dense tensor.

    `weight` is not a parameter here: reading it widens the stored weight, for what measures a base or starts
    from it. Setting it is not possible.
    """

    format: Format
    packed: Tensor | None  # the flat tensor, if the weight is on the device
    original: Callable[[], Tensor] | None  # reads W as it was before it was stored, if the file is at hand
    row_norms: Tensor | None  # ‖w‖² of each row (O,) fp32 before it was quantised, for DoRA
    stream: Stream | None
    number: int  # of the layer in the stream

    @property
    def weight(self) -> Tensor:
        """W in its shape and in the dtype that computes, as a tensor of its own."""
        dense = self.fetch()
        return dense.clone() if self.stream is not None and self.format.exact else dense

    @property
    def stored(self) -> Tensor:
        """The flat tensor, on the device or in host memory."""
        flat = self.packed if self.stream is None else self.stream.weights[self.number]
        assert flat is not None
        return flat

    def fetch(self) -> Tensor:
        """W, which may be a view of memory that the next `fetch` of another layer overwrites."""
        flat = self.packed if self.stream is None else self.stream.fetch(self.number)
        assert flat is not None
        return self.format.dense(flat)


class Linear(_Frozen, nn.Linear):
    """A frozen nn.Linear. The name is torch's, because other programs look for layers by class name."""

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.bias, self)


class Conv2d(_Frozen, nn.Conv2d):
    """A frozen nn.Conv2d. The name is torch's, because other programs look for layers by class name."""

    def forward(self, x: Tensor) -> Tensor:
        return _Convolution.apply(x, self.bias, self)


class _Product(torch.autograd.Function):
    """y = W x + b, and ∂L/∂x = (∂L/∂y) W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.fetch(), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.fetch().to(gradient.dtype), None, None


class _Convolution(torch.autograd.Function):
    """A convolution, and the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Conv2d) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return F.conv2d(x, layer.fetch(), bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), layer = gradients, ctx.layer
        x = gradient.new_empty(1).expand(ctx.shape)  # only its shape is used
        return (
            torch.ops.aten.convolution_backward(
                *(gradient, x, layer.fetch().to(gradient.dtype), None),
                *(layer.stride, layer.padding, layer.dilation, False, [0, 0], layer.groups),
                [True, False, False],
            )[0],
            None,
            None,
        )


def can_freeze(module: nn.Module) -> bool:
    """Whether a layer can be frozen: an ordinary Linear or Conv2d that pads with zeros."""
    if type(module) is nn.Conv2d:
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def is_frozen(module: nn.Module) -> bool:
    """Whether a module is a frozen layer."""
    return isinstance(module, (Linear, Conv2d))


def freeze(module: nn.Module) -> None:
    """Turn an nn.Linear or nn.Conv2d into its frozen kind, in place, with its weight unchanged."""
    if not can_freeze(module):
        raise TypeError(f"{type(module).__name__} cannot be frozen")
    weight = module._parameters.pop("weight")
    assert weight is not None
    layer: Any = module
    layer.__class__ = Linear if isinstance(module, nn.Linear) else Conv2d
    layer.stream, layer.number, layer.original, layer.row_norms = None, -1, None, None
    layer.format = Format(plain_kind(weight.dtype), tuple(weight.shape), weight.dtype)
    values = weight.detach().contiguous()
    layer.register_buffer("packed", values.view(-1).view(torch.uint8), persistent=False)


def store(layer: Any, kind: str | None) -> None:
    """Store a frozen layer's weight in another kind (None: leave it); row lengths are measured before."""
    if kind is None or kind == layer.format.kind:
        return
    pack(layer, layer.weight, kind, layer.format.dtype)


def pack(layer: Any, weight: Tensor, kind: str, dtype: torch.dtype) -> None:
    """Give a frozen layer a weight, stored in a kind, that computes in `dtype`."""
    lengths = [torch.linalg.vector_norm(rows.flatten(1).float(), dim=1) for rows in row_pieces(weight)]
    layer.row_norms = torch.cat(lengths).square()
    layer.format = Format(kind, tuple(weight.shape), dtype)
    layer.packed = layer.format.store(weight)


def stream(layer: Any, place: Stream) -> None:
    """Move a frozen layer's weight to host memory; `place` copies it to the device ahead of each use."""
    layer.stream, layer.number = place, place.add(layer.packed)
    layer.packed = None


def frozen_layers(modules: nn.Module | Iterable[nn.Module]) -> Iterator[Linear | Conv2d]:
    """The frozen layers of a model or of some of its blocks."""
    for module in [modules] if isinstance(modules, nn.Module) else modules:
        yield from (layer for layer in module.modules() if isinstance(layer, (Linear, Conv2d)))


def stored_bytes(model: nn.Module) -> int:
    """Bytes that a model's weights take, wherever they are."""
    layers = sum(layer.format.bytes for layer in frozen_layers(model))
    return layers + sum(p.numel() * p.element_size() for p in model.parameters())
