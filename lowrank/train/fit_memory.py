"""`--vram`: the fastest settings of memory that are predicted to fit.

A setting is a kind of storage, gradient checkpointing or not, and a number of swapped blocks. What the
command line sets stays. A plan of the unstored base gives what activations need; from it and the sizes of the
stored weights follows which settings can fit. They are tried from the fastest on: the first whose own plan
fits is chosen.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from lowrank.config.train import TrainOptions
from lowrank.data.loader import Loader
from lowrank.errors import Refused
from lowrank.models import blocks
from lowrank.models.family import DTYPES, Models
from lowrank.plan.cost import Work, seconds
from lowrank.plan.live import GIB, Phase
from lowrank.train import plan_memory
from lowrank.train.job import RunningJob

logger = logging.getLogger(__name__)

USABLE = 11 / 12  # share of a card's memory that a run may fill; the screen and other programs have the rest
STORAGES = (None, "fp8_scaled", "nf4")  # from the most exact on
STEP = "training step"
TEXT = "text encoding"


class Setting(NamedTuple):
    """Options that trade time for memory."""

    base_storage: str | None
    gradient_checkpointing: bool
    blocks_to_swap: int
    text_encoders_on_cpu: bool = False


@dataclass(frozen=True)
class _Planner:
    """Plans of one run with other settings."""

    job: RunningJob
    models: Models
    loader: Loader
    denoiser: nn.Module  # shapes

    def phases(self, setting: Setting) -> list[Phase]:
        job = replace(self.job, options=with_setting(self.job.options, setting))
        return plan_memory.plan_memory(job, self.models, self.loader)

    def base_bytes(self, setting: Setting) -> tuple[int, int]:
        """Bytes of the denoiser (on the device, in host memory)."""
        dtype = DTYPES[plan_memory.precision(self.job)]
        return blocks.base_bytes(self.denoiser, dtype, setting.base_storage, setting.blocks_to_swap)


def with_setting(options: TrainOptions, setting: Setting) -> TrainOptions:
    """The options of a run with a setting."""
    train = replace(options.train, gradient_checkpointing=setting.gradient_checkpointing)
    memory = replace(
        options.memory,
        base_storage=setting.base_storage,
        blocks_to_swap=setting.blocks_to_swap,
        text_encoders_on_cpu=setting.text_encoders_on_cpu,
    )
    return replace(options, train=train, memory=memory)


def flags(setting: Setting) -> str:
    """A setting as flags."""
    words = [f"--base_storage {setting.base_storage}"] if setting.base_storage else []
    words += ["--gradient_checkpointing"] * setting.gradient_checkpointing
    words += [f"--blocks_to_swap {setting.blocks_to_swap}"] if setting.blocks_to_swap else []
    return " ".join(words + ["--text_encoders_on_cpu"] * setting.text_encoders_on_cpu) or "no flags"


def fitted(
    job: RunningJob, models: Models, loader: Loader, denoiser: nn.Module | None
) -> tuple[RunningJob, list[Phase]]:
    """The job with the fastest settings that fit `--vram`, which are printed, and its plan.

    Raises `Refused` if none fits.
    `denoiser` has shapes; None, as with network modules of other programs, is refused.
    """
    if denoiser is None:
        raise Refused("--vram predicts memory with our own network modules only; give the flags yourself")
    asked = job.options.memory.vram
    assert asked is not None
    size = _free() if asked == "auto" else float(asked) * GIB
    setting, phases = _fastest(_Planner(job, models, loader, denoiser), size)
    most = max(phases, key=plan_memory.total)
    if job.accelerator.is_main_process:
        print(
            f"--vram {asked}: {flags(setting)} (predicted: {plan_memory.total(most) / GIB:.2f} of "
            f"{size / GIB:.2f} GiB, in the phase {most.name})",
            flush=True,
        )
    return replace(job, options=with_setting(job.options, setting)), phases


def _free() -> float:
    if not torch.cuda.is_available():
        raise Refused("--vram auto reads the free memory of a GPU, and torch finds none; give it in GB")
    return torch.cuda.mem_get_info()[0]


def _fastest(planner: _Planner, size: float) -> tuple[Setting, list[Phase]]:
    room = size * USABLE
    for setting in _in_order(planner, room):
        if (plan := _checked(planner, setting, room)) is not None:
            return plan
    smallest = _smallest(planner)
    phases = planner.phases(smallest)
    asked = planner.job.options.memory.vram
    needed = math.ceil(10 * max(map(plan_memory.total, phases)) / USABLE / GIB) / 10
    raise Refused(
        f"--vram {asked} cannot be met: this run needs {needed:g} GB at least, with {flags(smallest)}; lower "
        "--resolution, --train_batch_size or --network_dim"
    )


def _in_order(planner: _Planner, room: float) -> Iterator[Setting]:
    """The settings that can fit by their sizes, the fastest first; of each kind the one that swaps least."""
    timed: list[tuple[float, Setting]] = []
    dtype = DTYPES[plan_memory.precision(planner.job)]
    weights = sum(p.numel() for p in planner.denoiser.parameters())
    for checkpointing in _checkpointing(planner.job.options):
        plain = Setting(None, checkpointing, 0)
        if planner.base_bytes(_smallest(planner))[0] > room:
            continue
        phases = planner.phases(plain)
        step, options = _step(phases), planner.job.options
        given = options.memory.text_encoders_on_cpu
        on_cpu = given or (_total(phases, TEXT) > room and not options.trains_text)
        others = plan_memory.total(step) - planner.base_bytes(plain)[0]
        for storage in _storages(options, dtype):
            for swap in _swaps(planner):
                setting = Setting(storage, checkpointing, swap, on_cpu)
                device, host = planner.base_bytes(setting)
                if others + device <= room:
                    work = Work(step.flops, 3 if checkpointing else 2, weights, host)
                    timed.append((seconds(work, storage), setting))
                    break
    yield from (setting for _, setting in sorted(timed, key=lambda pair: pair[0]))


def _checked(planner: _Planner, setting: Setting, room: float) -> tuple[Setting, list[Phase]] | None:
    """The setting with its plan, if that fits; swaps a few more blocks where the estimate was too low."""
    for swap in (swap for swap in _swaps(planner) if swap >= setting.blocks_to_swap):
        setting = setting._replace(blocks_to_swap=swap)
        phases = planner.phases(setting)
        if max(map(plan_memory.total, phases)) <= room:
            return setting, phases
        over = _total(phases, STEP) - room
        if over <= 0 or over > 0.05 * room:
            return None
    return None


def _total(phases: list[Phase], name: str) -> int:
    return next(plan_memory.total(phase) for phase in phases if phase.name == name)


def _step(phases: list[Phase]) -> Phase:
    return next(phase for phase in phases if phase.name == STEP)


# ---------- what the command line leaves open


def _checkpointing(options: TrainOptions) -> tuple[bool, ...]:
    return (True,) if options.train.gradient_checkpointing else (False, True)


def _storages(options: TrainOptions, dtype: torch.dtype) -> tuple[str | None, ...]:
    if options.memory.storage:
        return (options.memory.storage,)
    return STORAGES if dtype.itemsize == 2 else (None,)


def _swaps(planner: _Planner) -> range:
    given = planner.job.options.memory.blocks_to_swap
    return range(given, given + 1) if given else range(blocks.most_swapped(planner.denoiser) + 1)


def _smallest(planner: _Planner) -> Setting:
    options = planner.job.options
    storage = _storages(options, DTYPES[plan_memory.precision(planner.job)])[-1]
    return Setting(storage, True, _swaps(planner)[-1], not options.trains_text)
