"""kohya's names of samplers, and diffusers' schedulers by them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from lowrank.errors import Refused, nearest

SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}
DEFAULT = "ddim"


def scheduler_from(kind: Any, facts: Mapping[str, Any]) -> Any:
    """A scheduler of a class of diffusers, with the facts that its constructor accepts."""
    known = inspect.signature(kind.__init__).parameters
    return kind(**{key: value for key, value in facts.items() if key in known})


def build_sampler(name: str | None, schedule: Mapping[str, Any]) -> Any:
    """A scheduler of diffusers for a `--sample_sampler` name, on the model's own noise schedule.

    A prefix `k_` has no effect. Raises `Refused` for an unknown name, and for a scheduler whose
    library is not installed.
    """
    given = name or DEFAULT
    if (plain := given.removeprefix("k_")) not in SAMPLERS:
        raise Refused(f"sampler {given!r} is unknown{nearest(given, SAMPLERS)}; give {', '.join(SAMPLERS)}")
    name, more = SAMPLERS[plain]
    # as every pipeline of diffusers sets them for SD; the last makes sampling end in the first timestep
    facts = {**schedule, "clip_sample": False, "steps_offset": 1, **more}
    if schedule.get("rescale_betas_zero_snr"):
        facts["timestep_spacing"] = "trailing"  # must begin at the step without signal (arXiv 2305.08891)
    if plain == "dpmsolver":
        facts["final_sigmas_type"] = "sigma_min"  # dpmsolver cannot end at zero
    try:
        return scheduler_from(getattr(diffusers, name), facts)
    except ImportError as error:
        raise Refused(f"sampler {given} needs another library ({error}); use ddim or euler_a") from error
