"""A script of kohya sd-scripts on tiny models, which writes down what reaches the layers.

    SD_SCRIPTS=… python tests/support/kohya_spy.py OUT.jsonl train_network.py …

Lines of OUT, in the order of the calls: `{"timesteps": [t, …]}` where a denoiser of the checkout begins, and
`{"layer": name, "open": [n, …]}` where a layer of ours has projected, with the ranks that are not zero in
each sample; `grad` is torch's mode. `pull` is the norm of the gradient that a penalty
adds in front of a step, and `rates` are the learning rates of the optimizer's groups.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DENOISERS = {
    "library.original_unet": ("UNet2DConditionModel", "InferUNet2DConditionModel"),
    "library.sdxl_original_unet": ("SdxlUNet2DConditionModel", "InferSdxlUNet2DConditionModel"),
    "library.flux_models": ("Flux",),
}


def watch(write: Any) -> None:
    """Have denoisers, layers and penalties tell `write` (a function of facts)."""
    for module, kinds in DENOISERS.items():
        for kind in kinds:
            _watch_denoiser(getattr(importlib.import_module(module), kind), write)
    layers: Any = importlib.import_module("lowrank.adapters.layer")
    project = layers.AdaptedLayer._project

    def projected(layer: Any, x: Tensor, D: Tensor) -> Tensor:
        h = project(layer, x, D)
        per_rank = h.detach().movedim(1, -1) if layer.conv else h.detach()
        alive = (per_rank != 0).reshape(h.shape[0], -1, h.shape[1 if layer.conv else -1]).any(1)
        ranks = alive.reshape(h.shape[0], -1, layer.rank).any(1)  # of an initial copy too
        write(layer=layer.name, open=ranks.sum(1).tolist())
        return h

    layers.AdaptedLayer._project = projected
    network: Any = importlib.import_module("lowrank.adapters.network")
    on_step_start = network.AdapterNetwork.on_step_start

    def started(net: Any, *args: Any) -> None:
        before = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        on_step_start(net, *args)
        if net._penalties:
            after = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
            added = [a if b is None else a - b for a, b in zip(after, before, strict=True)]
            write(
                pull=float(torch.cat([gradient.flatten() for gradient in added]).norm()),
                penalties={name: float(value) for name, value in net.penalties().items()},
            )

    network.AdapterNetwork.on_step_start = started
    groups = network.AdapterNetwork.prepare_optimizer_params_with_multiple_te_lrs

    def grouped(net: Any, *args: Any) -> Any:
        parameters, names = groups(net, *args)
        write(rates={name: group["lr"] for name, group in zip(names, parameters, strict=True)})
        return parameters, names

    network.AdapterNetwork.prepare_optimizer_params_with_multiple_te_lrs = grouped


def _watch_denoiser(kind: Any, write: Any) -> None:
    forward, scale = kind.forward, 1000 if kind.__name__ == "Flux" else 1

    @functools.wraps(forward)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        argument = kwargs.get("timesteps", kwargs.get("timestep", args[1] if len(args) > 1 else None))
        times = torch.as_tensor(argument).double().reshape(-1) * scale
        write(timesteps=times.round(decimals=3).tolist(), grad=torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    kind.forward = watched


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    tiny_kohya: Any = importlib.import_module("tools.tiny_kohya")
    tiny_kohya.shrink()
    with open(sys.argv[1], "w") as out:
        watch(lambda **facts: out.write(json.dumps(facts) + "\n"))
        tiny_kohya.call(sys.argv[2:])
