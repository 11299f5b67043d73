"""T-LoRA in any stock pipeline of diffusers: beside the denoiser, its ranks by the step's timestep.

    with timestep_ranks(pipe, "adapter.safetensors"):
        image = pipe("a sks dog riding a surfboard").images[0]

or for as long as the pipeline lives: `ranks = TimestepRanks(pipe, file)`, and `ranks.remove()`. Guidance,
several images per prompt and `torch.compile` (`pipe.unet = torch.compile(pipe.unet)`, before or after) work
as they are; pipelines do not see each other. Nothing is merged into the base, which could not be masked then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.clock import convention, uncompiled
from lowrank.adapters.targets import dense_weight, find
from lowrank.combine.mixture import Mixture, read_for_merge
from lowrank.errors import Refused
from lowrank.naming import keys


class TimestepRanks:
    """A T-LoRA file on a pipeline, or on a bare denoiser, until `remove`.

    `config` is SimpleTuner's `_tlora_config` and goes before what the file says, as does the pipeline's own
    attribute of that name. `strength` multiplies the change. Computes in the denoiser's dtype, or in `dtype`.
    Raises `Refused` for a file without a schedule, a denoiser whose timesteps are not understood, a scheduler
    that does not count them 0..1000, and a file for another model.
    """

    def __init__(
        self,
        pipe: Any,
        file: str | Path,
        config: Mapping[str, Any] | None = None,
        strength: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        denoiser, scheduler = denoiser_of(pipe), getattr(pipe, "scheduler", None)
        convention(denoiser)
        _check_steps(scheduler)
        config = getattr(pipe, "_tlora_config", None) if config is None else config
        adapter = read_for_merge(file, schedule=config, start=_Weights(denoiser))
        if adapter.schedule is None:
            raise Refused(
                f"{file} says no schedule, so it is no T-LoRA that can be masked; load it with "
                'pipe.load_lora_weights, or pass config={"max_rank": …, "min_rank": …, "alpha": …}'
            )
        encoders = [
            getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")
        ]
        model: Any = uncompiled(denoiser)
        computed = dtype or (model.dtype if hasattr(model, "dtype") else next(model.parameters()).dtype)
        mixture = Mixture([adapter])
        present = (
            [encoder for encoder in encoders if isinstance(encoder, nn.Module)] if mixture.adapts_text else []
        )
        self.attached = mixture.attach(denoiser, present, computed)
        for network in self.attached.networks:
            network.clock.steps = lambda: _steps(scheduler)
        self.attached.set((strength,))

    def remove(self) -> None:
        """Take adapter and hook off; the pipeline is what it was, bit for bit."""
        self.attached.restore()


@contextlib.contextmanager
def timestep_ranks(
    pipe: Any,
    file: str | Path,
    config: Mapping[str, Any] | None = None,
    strength: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Iterator[TimestepRanks]:
    """`TimestepRanks` for a block."""
    ranks = TimestepRanks(pipe, file, config, strength, dtype)
    try:
        yield ranks
    finally:
        ranks.remove()


def denoiser_of(pipe: Any) -> nn.Module:
    """The U-Net or transformer of a pipeline; a module is its own."""
    for candidate in (getattr(pipe, "unet", None), getattr(pipe, "transformer", None), pipe):
        if isinstance(candidate, nn.Module):
            return candidate
    raise Refused(f"{type(pipe).__name__} has no unet and no transformer; give a pipeline of diffusers")


class _Weights:
    """W (O, I) of a denoiser's layers by the names of files; hosts are looked up when first asked."""

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser, self._hosts = uncompiled(denoiser), {}

    def __call__(self, module: str) -> Tensor:
        if not self._hosts:
            targets = find("unet", self._denoiser, target=".")
            self._hosts = {spelled: target.module for target in targets for spelled in target.spellings}
        host = self._hosts.get(keys.flat(module))
        if host is None:
            raise Refused(
                f"{module} is not in {type(self._denoiser).__name__}; the adapter is for another model"
            )
        return dense_weight(host)


def _check_steps(scheduler: Any) -> None:
    facts = getattr(scheduler, "config", {})
    odd = facts.get("timestep_type") == "continuous" or type(scheduler).__name__.startswith("EDM")
    if odd or facts.get("num_train_timesteps", 1000) != 1000:
        raise Refused(
            f"{type(scheduler).__name__} does not count timesteps from 0 to 1000, as the schedule of ranks "
            "does; use one that does, such as EulerDiscreteScheduler"
        )


def _steps(scheduler: Any) -> Tensor | None:
    steps = getattr(scheduler, "timesteps", None)
    return steps if isinstance(steps, Tensor) and len(steps) else None
