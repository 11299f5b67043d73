"""Layers that are no pair of factors (LoKr, OFT, norm layers …) beside a model, which is not changed.

Linear layers, convolutions and norm layers are linear in their weight and bias, so that the layer with W′ and
b′ gives y + op(x; W′ − W, b′ − b). The differences are computed once, from the base's weights, and take as
much memory as the layers themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.clock import uncompiled
from lowrank.adapters.targets import dense_weight
from lowrank.errors import Refused
from lowrank.formats.foreign import ForeignLayer
from lowrank.formats.read import Adapter
from lowrank.naming.places import LayerPath


class WholeLayers:
    """An adapter's layers of other kinds on a model until `restore`; `set(strength)` is 0 at first.

    `share` gives the strength of each layer. Computed in `dtype`, or in the dtype of each layer. Raises
    `Refused` for a layer that the model does not have, or that is of another size.
    """

    def __init__(
        self,
        adapter: Adapter,
        denoiser: nn.Module,
        text_encoders: Sequence[nn.Module],
        dtype: torch.dtype | None = None,
        share: Callable[[LayerPath], float] = lambda _: 1.0,
    ) -> None:
        self._strength = 0.0
        self._handles: list[Any] = []
        roots = {"unet": uncompiled(denoiser)}
        roots |= {f"te{i + 1}": encoder for i, encoder in enumerate(text_encoders)}
        for place, layer in adapter.foreign.items():
            host = _host(roots, place, adapter.source)
            change, bias = (
                None if value is None else share(place) * value.to(host.weight.device, dtype or value.dtype)
                for value in _difference(host, layer)
            )
            self._handles.append(host.register_forward_hook(self._adding(change, bias)))

    def set(self, strength: float) -> None:
        """Multiply all changes by a strength; at 0 the model is the base, bit for bit."""
        self._strength = strength

    def restore(self) -> None:
        """Take the layers off."""
        while self._handles:
            self._handles.pop().remove()

    def _adding(self, change: Tensor | None, bias: Tensor | None) -> Callable[..., Tensor | None]:
        def add(host: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._strength:
                return None
            added = _applied(host, inputs[0], change, bias)
            return output + (self._strength * added).to(output.dtype)

        return add


def _host(roots: Mapping[str, nn.Module], place: LayerPath, source: str) -> Any:
    """The layer of a model at a path; transformers 5 has no level `text_model`."""
    root = roots.get(place.part)
    for path in (place.path, place.path.removeprefix("text_model.")):
        try:
            host = root.get_submodule(path) if root is not None else None
        except AttributeError:
            continue
        if isinstance(getattr(host, "weight", None), Tensor):
            return host
    models = " or ".join(type(root).__name__ for root in roots.values())
    raise Refused(f"{place.path} of {source} is not in {models}; the adapter is for another model")


def _difference(host: Any, layer: ForeignLayer) -> tuple[Tensor | None, Tensor | None]:
    """W′ − W in the host's own shape and b′ − b, in the dtype of the computation with them."""
    known = isinstance(host, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm) or _is_rms(host)
    if not known:
        raise Refused(
            f"{layer.module} in {layer.source} is for a {type(host).__name__}, which can only be merged: "
            "tools/export_lora.py --to merged"
        )
    shape = host.weight.shape if host.weight.dim() != 2 else None
    W = dense_weight(host) if isinstance(host, nn.Linear | nn.Conv2d) else host.weight.detach()
    W = W.detach().float().reshape(shape or W.shape)
    with torch.no_grad():
        change, bias = layer.change(W.cpu()), layer.bias()
    if bias is not None and len(bias) != len(W):
        raise Refused(
            f"{layer.module} in {layer.source} changes {len(bias)} numbers of a bias and the layer has "
            f"{len(W)}; the adapter is for another base"
        )
    stored = host.weight.dtype if host.weight.is_floating_point() else torch.float32
    return (None if change is None else change.to(stored), None if bias is None else bias.to(stored))


def _is_rms(host: nn.Module) -> bool:
    return type(host).__name__ == "RMSNorm"  # torch's, and diffusers' own


def _applied(host: Any, x: Tensor, change: Tensor | None, bias: Tensor | None) -> Tensor:
    """op(x; change, bias) of a layer, in the dtype of the change."""
    some = bias if change is None else change
    assert some is not None  # a layer changes one of them
    x = x.to(some.dtype)
    across = (1, -1, *(1,) * (x.dim() - 2)) if isinstance(host, nn.Conv2d | nn.GroupNorm) else (-1,)
    if change is None:
        assert bias is not None
        return bias.reshape(across)
    if isinstance(host, nn.Linear):
        return F.linear(x, change, bias)
    if isinstance(host, nn.Conv2d):
        return F.conv2d(x, change, bias, host.stride, host.padding, host.dilation, host.groups)
    if isinstance(host, nn.GroupNorm):
        return F.group_norm(x, host.num_groups, change, bias, host.eps)
    if isinstance(host, nn.LayerNorm):
        return F.layer_norm(x, host.normalized_shape, change, bias, host.eps)
    out = F.rms_norm(x, change.shape, change, host.eps)
    return out if bias is None else out + bias
