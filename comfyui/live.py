"""An adapter beside the layers of ComfyUI's denoiser, there only while it runs.

ComfyUI calls its denoiser with noise levels σ, one for each sample, through wrappers that nodes add
(comfy.patcher_extension, APPLY_MODEL). The wrapper turns σ into timesteps in 0..1000, puts a hook on each
layer, lets the denoiser run, and takes the hooks off again, so that other workflows of the same model never
meet them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import comfy.model_sampling
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from lowrank.adapters.layer import AdaptedLayer
from lowrank.adapters.network import AdapterNetwork
from lowrank.errors import Refused


class LayerRows(NamedTuple):
    """A layer of ComfyUI's model, and the rows (start, length) of its output that a change is added to."""

    module: str
    rows: tuple[int, int] | None


def timestep(sampling: Any, sigma: Tensor) -> Tensor:
    """Timesteps (B,) in 0..1000 from noise levels (B,), by the model's own sampling.

    A rectified flow's σ is the timestep / 1000. Raises `Refused` for a sampling that counts otherwise.
    """
    if isinstance(sampling, comfy.model_sampling.CONST):
        return 1000 * sigma.double()
    odd = ("ModelSamplingDiscreteEDM", "StableCascadeSampling")
    kinds = [kind.__name__ for kind in type(sampling).__mro__]
    if not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete) or set(odd) & set(kinds):
        raise Refused(
            f"it is not known how {kinds[min(1, len(kinds) - 1)]} counts timesteps; T-LoRA works with "
            "discrete and rectified-flow models"
        )
    return sampling.timestep(sigma).double()


class Beside:
    """A network of layers without hosts, and the places in ComfyUI's model where they add their change."""

    def __init__(self, network: AdapterNetwork, places: Mapping[str, LayerRows], strength: float) -> None:
        self.network, self.places = network, places
        for layer in network.layers():
            layer.requires_grad_(False).eval()
        network.set_multiplier(strength)
        self._gated = network.method.gate is not None

    def install(self, patcher: Any) -> None:
        """Let the model's clone run with this adapter."""
        patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "lowrank", self)

    def __call__(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        model = executor.class_obj
        told = timestep(model.model_sampling, t) if self._gated else None
        with self.network.denoise_at(told), self._hooked(model):
            return executor(x, t, *args, **kwargs)

    @contextlib.contextmanager
    def _hooked(self, model: nn.Module) -> Iterator[None]:
        handles = []
        try:
            for layer in self.network.layers():
                place = self.places[layer.name]
                host = model.get_submodule(place.module)
                handles.append(host.register_forward_hook(_adding(layer, place)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _adding(layer: AdaptedLayer, place: LayerRows) -> Any:
    def add(_host: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = args[0]
        for value in (*layer.parameters(), *layer.buffers()):
            if value.device != x.device or value.dtype != x.dtype:
                layer.to(x.device, x.dtype)
                break
        change = layer.delta(x).to(out.dtype)
        if place.rows is None:
            return out + change
        out = out.clone() if torch.is_grad_enabled() else out  # a layer's output is its own: add in place
        out.narrow(-1, *place.rows).add_(change)
        return out

    return add
