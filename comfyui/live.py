"""An adapter beside the layers of ComfyUI's denoiser, attached only while the denoiser runs.

ComfyUI calls its denoiser with noise levels σ, one for each sample, through wrappers that nodes add
(comfy.patcher_extension, APPLY_MODEL). The wrapper turns σ into timesteps in 0..1000, puts a hook on each
layer, runs the denoiser and removes the hooks, so that they do not affect other workflows of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
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

    A rectified flow's σ is the timestep / 1000. Raises `Refused` for other samplings.
    """
    if isinstance(sampling, comfy.model_sampling.CONST):
        return 1000 * sigma.double()
    unsupported = ("ModelSamplingDiscreteEDM", "StableCascadeSampling")
    kinds = [kind.__name__ for kind in type(sampling).__mro__]
    if not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete) or set(unsupported) & set(kinds):
        raise Refused(
            f"the timesteps of {kinds[min(1, len(kinds) - 1)]} are not known; T-LoRA works with "
            "discrete and rectified-flow models"
        )
    return sampling.timestep(sigma).double()


class Beside:
    """A network of layers without hosts, and the places in ComfyUI's model where they add their change."""

    def __init__(
        self,
        network: AdapterNetwork,
        places: Mapping[str, LayerRows],
        strength: float,
        follow: Callable[[Tensor], None] | None = None,
    ) -> None:
        """`follow` is called with the timesteps (B,) of each step, before the denoiser runs."""
        self.network, self.places, self._follow = network, places, follow
        for layer in network.layers():
            layer.requires_grad_(False).eval()
        network.set_multiplier(strength)
        self._timed = network.method.gate is not None or follow is not None

    def install(self, patcher: Any) -> None:
        """Add the adapter to a clone of the model."""
        patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "lowrank", self)

    def __call__(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        model = executor.class_obj
        timesteps = timestep(model.model_sampling, t) if self._timed else None
        if self._follow is not None:
            assert timesteps is not None  # it is timed
            self._follow(timesteps)
        with self.network.denoise_at(timesteps), self._hooked(model):
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
        out = (
            out.clone() if torch.is_grad_enabled() else out
        )  # without gradients the output can be changed in place
        out.narrow(-1, *place.rows).add_(change)
        return out

    return add
