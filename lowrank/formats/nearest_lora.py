"""A routed adapter as one ΔW for other programs: the least-squares up over calibration data, and its error.

A layer with experts adds s·B·u′ with the ups side by side, B = [B₁ | … | B_E], and u′ = w ⊗ u, the experts'
shares of u = D x. Of all static ups B̄ the one with the least Σ‖B u′ − B̄ u‖² over the data is

    B̄ = Σₑ Bₑ·E[wₑ u uᵀ]·E[u uᵀ]⁻¹

Since Σₑ wₑ = 1, u = S u′ with S = [I | … | I], so that M = E[u′ u′ᵀ] (E·R, E·R) is all that has to be
gathered: it gives B̄ and the error. In directions of u that no data had, B̄ is the experts' mean.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.adapters.experts import stacked_ups
from lowrank.adapters.layer import AdaptedLayer
from lowrank.adapters.magnitude import in_peft_shape
from lowrank.adapters.network import AdapterNetwork
from lowrank.errors import Refused
from lowrank.naming import keys


class Lost(NamedTuple):
    """What a static up leaves out over the data: √Σ‖B u′ − B̄ u‖², and √Σ‖B u′‖² to compare it with."""

    lost: float
    whole: float

    @property
    def share(self) -> float:
        """The relative error, 0 where the layer added nothing."""
        return self.lost / self.whole if self.whole else 0.0

    def scaled(self, by: float) -> Lost:
        return Lost(by * self.lost, by * self.whole)


def together(errors: Iterable[Lost]) -> Lost:
    """The error of many layers as one."""
    lost, whole = zip(*errors, strict=True)
    return Lost(math.hypot(*lost), math.hypot(*whole))


def least_squares(ups: Tensor, moments: Tensor) -> tuple[Tensor, Lost]:
    """B̄ (O, R) and its error.

    ups (E, O, R), moments M (E·R, E·R) as a sum or mean of u′ u′ᵀ; computed in float64.
    """
    E, _, R = ups.shape
    B, M = stacked_ups(ups).double(), moments.double()  # (O, E·R), (E·R, E·R)
    S = torch.eye(R, dtype=M.dtype, device=M.device).repeat(1, E)  # (R, E·R)
    mean, C = ups.double().mean(0), S @ M @ S.T
    rest = B - mean @ S  # what the mean does not explain: B̄ = mean + rest·M Sᵀ·C⁺
    static = mean + rest @ M @ S.T @ torch.linalg.pinv(C, hermitian=True, rtol=1e-12)
    left = B - static @ S
    lost, whole = (((part @ M) * part).sum().clamp_min(0) for part in (left, B))
    return static, Lost(float(lost.sqrt()), float(whole.sqrt()))


def unrouted(
    network: AdapterNetwork, calibrate: Callable[[], object]
) -> tuple[dict[str, Tensor], dict[str, Lost]]:
    """(tensors of a LoRA under native keys, what each layer loses of its output) of a network with experts.

    `calibrate` runs the model, network attached, on data like that of its use. The lengths of a DoRA are
    rescaled so that the gain of each row stays what it was. Raises `Refused` for a network without experts,
    for one with a timestep gate, and for a layer that `calibrate` never reached.
    """
    method = network.method
    if method.experts is None:
        raise Refused(
            f"{method.name} has one ΔW and needs no calibration; use tools/export_lora.py without --calibrate"
        )
    if method.gate is not None:
        raise Refused(
            f"{method.name} has another ΔW at every timestep as well as for every input; use it where it was "
            "made"
        )
    with _gathered(network) as gathered, torch.no_grad():
        calibrate()
    state, errors = {}, {}
    for layer in network.layers():
        if layer.name not in gathered:
            raise Refused(
                f"the calibration data never reached {layer.name}, so that no static up can stand for its "
                "experts; run the whole model on it"
            )
        roles, errors[layer.name] = _static(layer, gathered[layer.name])
        native = network.targets[layer.name].native
        if native and "magnitude" in roles:
            roles["magnitude"] = in_peft_shape(roles["magnitude"])
        table = keys.PEFT if native else keys.KOHYA
        state |= {f"{native or layer.name}.{table[role]}": value for role, value in roles.items()}
    return state, errors


@torch.no_grad()
def _static(layer: AdaptedLayer, moments: Tensor) -> tuple[dict[str, Tensor], Lost]:
    """The layer's tensors with one up, and the error of what it adds to the host's output."""
    U, D = layer.factors()  # (E, O, R[, 1, 1]), (R, I[, k, k])
    gain = torch.ones(U.shape[1], dtype=torch.float64, device=U.device)
    before = layer.row_norm(U, D) if layer.method.magnitude else gain
    if layer.method.magnitude:
        gain = (layer.magnitude.flatten() / before.masked_fill(before == 0, 1)).double()
    static, error = least_squares(gain[:, None] * U.reshape(U.shape[:3]).double(), moments)
    up = (static / gain.masked_fill(gain == 0, 1)[:, None]).to(U.dtype).reshape(U.shape[1:])
    roles = {"down": D.clone(), "up": up, "alpha": torch.tensor(layer.scale * D.shape[0])}
    if layer.method.magnitude:
        after = layer.row_norm(up[None], D)
        kept = torch.where(before == 0, torch.ones_like(before), after / before)
        roles["magnitude"] = layer.magnitude.detach() * kept.reshape(layer.magnitude.shape).to(D.dtype)
    return roles, error.scaled(abs(layer.scale))


@contextlib.contextmanager
def _gathered(network: AdapterNetwork) -> Iterator[dict[str, Tensor]]:
    """Σ u′ u′ᵀ by layer name, of all that goes through the hosts within the block, without dropout."""
    tensors: dict[str, Tensor] = {}

    def watch(layer: AdaptedLayer):
        def before(_host, inputs):
            with torch.autocast(inputs[0].device.type, enabled=False):
                _, D = layer.factors()
                wide = layer.hidden(inputs[0].to(D.dtype), D)
            wide = (wide.movedim(1, -1) if layer.conv else wide).flatten(0, -2).double()  # (N, E·R)
            tensors[layer.name] = tensors.get(layer.name, 0) + wide.T @ wide

        return before

    handles = [layer.host.register_forward_pre_hook(watch(layer)) for layer in network.layers()]
    training = network.training
    network.eval()
    try:
        yield tensors
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()
