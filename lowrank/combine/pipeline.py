"""Run a T-LoRA in any diffusers pipeline; its active ranks follow the timestep of each denoising step.

    with timestep_ranks(pipe, "adapter.safetensors"):
        image = pipe("a sks dog riding a surfboard").images[0]

Without a block: `ranks = TimestepRanks(pipe, file)`, and `ranks.remove()` at the end. Guidance, several
images per prompt and `torch.compile` (`pipe.unet = torch.compile(pipe.unet)`, before or after) are
supported, and pipelines are independent. The adapter is not merged, because a merged adapter has fixed ranks.
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
    """A T-LoRA file attached to a pipeline, or to a denoiser alone, until `remove`.

    `config` is SimpleTuner's `_tlora_config`; it, or the pipeline's attribute of that name, overrides the
    schedule of the file. `strength` multiplies ΔW. Computes in the denoiser's dtype, or in `dtype`. Raises
    `Refused` for a file without a schedule, a denoiser or scheduler whose timesteps do not run from 0 to
    1000, and a file for another model.
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
                f"{file} has no rank schedule, so it is not a T-LoRA with active ranks; load it with "
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
        """Detach the adapter and its hook; the pipeline then computes what it did before, bit for bit."""
        self.attached.restore()


@contextlib.contextmanager
def timestep_ranks(
    pipe: Any,
    file: str | Path,
    config: Mapping[str, Any] | None = None,
    strength: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Iterator[TimestepRanks]:
    """Attach a `TimestepRanks` for a block."""
    ranks = TimestepRanks(pipe, file, config, strength, dtype)
    try:
        yield ranks
    finally:
        ranks.remove()


def denoiser_of(pipe: Any) -> nn.Module:
    """The U-Net or transformer of a pipeline, or the module itself."""
    for candidate in (getattr(pipe, "unet", None), getattr(pipe, "transformer", None), pipe):
        if isinstance(candidate, nn.Module):
            return candidate
    raise Refused(f"{type(pipe).__name__} has neither unet nor transformer; give a diffusers pipeline")


class _Weights:
    """W (O, I) of a denoiser's layers by their names in files; the layers are listed at the first lookup."""

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
    continuous = facts.get("timestep_type") == "continuous" or type(scheduler).__name__.startswith("EDM")
    if continuous or facts.get("num_train_timesteps", 1000) != 1000:
        raise Refused(
            f"{type(scheduler).__name__} does not count timesteps from 0 to 1000, as the rank schedule does; "
            "use another scheduler, such as EulerDiscreteScheduler"
        )


def _steps(scheduler: Any) -> Tensor | None:
    steps = getattr(scheduler, "timesteps", None)
    return steps if isinstance(steps, Tensor) and len(steps) else None
