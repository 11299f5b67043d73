"""What a method needs of a trainer that knows only the task's loss, which is kohya's.

A gate hears its timesteps from the denoiser and rates are optimizer groups: both are the same everywhere. A
penalty is added as its gradient; a stage before step 0 and a choice of layers cannot be added, and say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowrank.adapters.method import Method
from lowrank.errors import Refused


def check_trainer(method: Method, args: Any) -> None:
    """Raise `Refused` for what kohya's trainer cannot do for a method; `args` are the trainer's options."""
    if method.warmup and not getattr(args, "network_weights", None):
        raise Refused(
            f"{method.name} begins with a stage on data before step 0, which this trainer has no "
            "place for; run lowrank's own training script and give its file to --network_weights"
        )
    given = [word.partition("=")[0] for word in getattr(args, "network_args", None) or ()]
    stage = [name for name in given if name.startswith("abm_") and name not in method.options]
    if stage:
        raise Refused(
            f"network argument {stage[0]} asks for the ABM stage before step 0, which this trainer has no "
            "place for; run lowrank's own training script with --abm_enabled and give its file to "
            "--network_weights"
        )
    if method.penalty and getattr(args, "mixed_precision", None) == "fp16":
        names = ", ".join(penalty.name for penalty in method.penalty)
        raise Refused(
            f"{method.name} pulls parameters ({names}) by gradients this trainer does not see, and under "
            "--mixed_precision fp16 it multiplies its own by a scale; train with bf16 or no"
        )
    if method.updates:
        raise Refused(
            f"{method.name} lets {method.updates.share:g} of its layers learn in a step, and this trainer "
            "has all of them learn; give effi_update_ratio=1, or run lowrank's own training script"
        )


def pull(args: Any) -> Callable[[nn.Module], None]:
    """`add(network)`, called before each backward, adds the penalties' gradient to the parameters' own.

    Of several backwards in one step each adds its share, as the trainer divides the loss.
    """
    share = 1 / (getattr(args, "gradient_accumulation_steps", None) or 1)

    def add(network: Any) -> None:
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        with torch.enable_grad():
            value = share * torch.stack([term.float() for term in network.penalties().values()]).sum()
            if not value.requires_grad:  # of strength 0
                return
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                before = parameter.grad
                parameter.grad = gradient if before is None else before + gradient

    return add
