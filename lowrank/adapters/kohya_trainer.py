"""Support of methods in kohya's trainers, which know only the loss of the task.

A gate reads timesteps from the denoiser and rates are optimizer groups; both work in any trainer. A penalty
is added as its gradient. Warm-up stages and updates of only some layers are not supported and refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowrank.adapters.method import Method
from lowrank.errors import Refused


def check_trainer(method: Method, args: Any) -> None:
    """Raise `Refused` if kohya's trainer does not support the method; `args` are the trainer's options."""
    if method.warmup and not getattr(args, "network_weights", None):
        raise Refused(
            f"{method.name} needs a warm-up stage before step 0, which this trainer does not support; "
            "run lowrank's own training script and give its file to --network_weights"
        )
    arguments = [word.partition("=")[0] for word in getattr(args, "network_args", None) or ()]
    abm_arguments = [name for name in arguments if name.startswith("abm_") and name not in method.options]
    if abm_arguments:
        raise Refused(
            f"network argument {abm_arguments[0]} needs the ABM stage before step 0, which this trainer does "
            "not support; run lowrank's own training script with --abm_enabled and give its file to "
            "--network_weights"
        )
    if method.penalty and getattr(args, "mixed_precision", None) == "fp16":
        names = ", ".join(penalty.name for penalty in method.penalty)
        raise Refused(
            f"{method.name} adds the gradient of a penalty ({names}), which this trainer would scale wrongly "
            "under --mixed_precision fp16; train with bf16 or no"
        )
    if method.updates:
        raise Refused(
            f"{method.name} updates a fraction of {method.updates.share:g} of its layers in a step, but this "
            "trainer updates all; give effi_update_ratio=1, or run lowrank's own training script"
        )


def pull(args: Any) -> Callable[[nn.Module], None]:
    """Return `add(network)`, which adds the gradient of the penalties to the parameters' gradients.

    Call it before each backward. With gradient accumulation each of n calls adds 1/n of the gradient, as the
    trainer divides the loss.
    """
    fraction = 1 / (getattr(args, "gradient_accumulation_steps", None) or 1)

    def add(network: Any) -> None:
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        with torch.enable_grad():
            value = fraction * torch.stack([term.float() for term in network.penalties().values()]).sum()
            if not value.requires_grad:  # a penalty of strength 0
                return
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                previous = parameter.grad
                parameter.grad = gradient if previous is None else previous + gradient

    return add


def limit_norms(network: Any, value: float) -> tuple[int, float, float]:
    """Scale trained factors so that each ‖s·U·D‖_F ≤ value; return (number scaled, mean, max norm)."""
    factor = network.factor
    if factor.copy or network.method.experts or (factor.share and not factor.joined):
        raise Refused(f"--scale_weight_norms is not defined for {network.method.name}; leave it out")
    wholes: dict[int, list[Any]] = {}  # the parts of one joined layer share D
    for layer in network.layers():
        wholes.setdefault(id(layer.roles().get(factor.shared, layer)), []).append(layer)
    norms, scaled = [], 0
    with torch.no_grad():
        for parts in wholes.values():
            of_parts = []
            for layer in parts:
                U, D = (factor.flatten(1) for factor in layer.factors())
                of_parts.append(layer.scale * ((U.T @ U) * (D @ D.T).T).sum().clamp_min(0).sqrt())
            norm = of_parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(of_parts))
            ratio = norm.clamp(max=value) / norm.clamp_min(value / 2)
            if ratio < 1 and norm > value:
                scaled += 1
                trained = [layer.roles()[role] for layer in parts for role in factor.trained]
                for parameter in {id(parameter): parameter for parameter in trained}.values():
                    parameter.mul_(ratio ** (1 / len(factor.trained)))
            norms.append(norm.clamp(max=value))
    stacked = torch.stack(norms)
    return scaled, stacked.mean().item(), stacked.max().item()
