"""Rank gates: how many leading ranks are open at a timestep, at least one.

Source: T-LoRA, arXiv 2507.05964, eq. 3, 6.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from lowrank.errors import Refused


def open_ranks(timestep: Tensor, rank: int, min_rank: int, alpha: float = 1.0, horizon: int = 1000) -> Tensor:
    """Return r(t) = ⌊((T − t)/T)^α (R − R_min)⌋ + R_min, integers (B,) from `min_rank` to `rank`.

    `timestep` (B,) is clamped to 0..`horizon`; 0 is the clean image. For α = 1 the floor is taken on
    integers, so that the result does not depend on floating-point rounding. Raises `Refused` unless
    1 ≤ min_rank ≤ rank and alpha > 0.
    """
    if not 1 <= min_rank <= rank:
        _refuse(min_rank, rank)
    if not alpha > 0:
        raise Refused(f"tlora_alpha {alpha} is not above 0; give 1.0 for the linear schedule")
    t = timestep.reshape(-1).clamp(0, horizon)
    if alpha == 1.0:
        return torch.div((horizon - t) * (rank - min_rank), horizon, rounding_mode="floor").long() + min_rank
    fraction = ((horizon - t.double()) / horizon).pow(alpha)
    return (fraction * (rank - min_rank)).floor().long() + min_rank


def _refuse(min_rank: int | None, rank: int) -> NoReturn:
    raise Refused(f"tlora_min_rank {min_rank} is not between 1 and rank {rank}; give a value between both")


def prefix(open_: Tensor, rank: int) -> Tensor:
    """Return the mask (B, R) whose first `open_[b]` ranks are 1 and the others 0."""
    return (torch.arange(rank, device=open_.device) < open_.reshape(-1, 1)).to(torch.float32)


def mask_per_sample(mask: Tensor, batch: int) -> Tensor:
    """Repeat a mask (B, R) to `batch` = n·B rows, each row n times in sequence."""
    if mask.shape[0] == 1:
        return mask.expand(batch, -1)
    if batch % mask.shape[0]:
        raise ValueError(f"a gate for {mask.shape[0]} timesteps does not fit a batch of {batch}")
    return mask.repeat_interleave(batch // mask.shape[0], dim=0)


@dataclass(frozen=True)
class Schedule:
    """The number of open ranks by timestep, in groups of `group` neighbouring ranks.

    A layer whose rank differs from `max_rank` (it is too small) has `min_rank` in proportion. Raises
    `Refused` unless 1 ≤ min_rank ≤ max_rank.
    """

    min_rank: int | None = None  # open groups at pure noise; None: half of the groups
    alpha: float = 1.0
    horizon: int = 1000
    group: int = 1
    max_rank: int | None = None  # the rank that min_rank refers to; None: the rank of each layer

    def __post_init__(self) -> None:
        if self.max_rank is not None and not 1 <= (self.min_rank or 1) <= self.max_rank:
            _refuse(self.min_rank, self.max_rank)

    def for_rank(self, rank: int) -> Schedule:
        """Return the schedule of a network of this rank; layers of lower rank follow it in proportion."""
        return replace(
            self, min_rank=max(1, rank // 2) if self.min_rank is None else self.min_rank, max_rank=rank
        )

    def open(self, timestep: Tensor, rank: int) -> Tensor:
        """Return the open ranks (B,) of a layer of `rank` at timesteps (B,); see `open_ranks`."""
        return self.group * open_ranks(
            timestep, rank // self.group, self.least(rank), self.alpha, self.horizon
        )

    def least(self, rank: int) -> int:
        """Return R_min of a layer of this rank, in groups: ⌊min_rank·rank/max_rank⌋, at least 1."""
        rank //= self.group
        if self.min_rank is None:
            return max(1, rank // 2)
        return self.min_rank if self.max_rank is None else max(1, self.min_rank * rank // self.max_rank)

    def metadata(self, rank: int | None) -> dict[str, str]:
        """Return the metadata of a file; rank=None (layers differ) omits entries that depend on it."""
        metadata = {
            "tlora_alpha": f"{self.alpha:g}",
            "tlora_T": str(self.horizon),
            "tlora_group": str(self.group),
        }
        most = rank // self.group if self.max_rank is None and rank is not None else self.max_rank
        least = self.least(rank) if self.min_rank is None and rank is not None else self.min_rank
        metadata |= {} if most is None else {"tlora_max_rank": str(most)}
        return metadata | ({} if least is None else {"tlora_min_rank": str(least)})
