"""Which ranks are open at a timestep: nested prefixes, never empty (T-LoRA, arXiv 2507.05964, eq. 3, 6)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from lowrank.errors import Refused


def open_ranks(timestep: Tensor, rank: int, min_rank: int, alpha: float = 1.0, horizon: int = 1000) -> Tensor:
    """r(t) = ⌊((T − t)/T)^α (R − R_min)⌋ + R_min, in integers (B,) between `min_rank` and `rank`.

    `timestep` is (B,) in 0..`horizon`, 0 = clean picture; values outside are clamped. For α = 1 the floor is
    taken on integers, so that no (R, R_min, t) depends on floating-point rounding. Raises `Refused` unless
    1 ≤ min_rank ≤ rank and alpha > 0.
    """
    if not 1 <= min_rank <= rank:
        _refuse(min_rank, rank)
    if not alpha > 0:
        raise Refused(f"tlora_alpha {alpha} must be above 0; 1.0 is the linear schedule")
    t = timestep.reshape(-1).clamp(0, horizon)
    if alpha == 1.0:
        return torch.div((horizon - t) * (rank - min_rank), horizon, rounding_mode="floor").long() + min_rank
    left = ((horizon - t.double()) / horizon).pow(alpha)
    return (left * (rank - min_rank)).floor().long() + min_rank


def _refuse(min_rank: int | None, rank: int) -> NoReturn:
    raise Refused(f"tlora_min_rank {min_rank} is not between 1 and rank {rank}; choose one that is")


def prefix(open_: Tensor, rank: int) -> Tensor:
    """Mask (B, R): the first `open_[b]` ranks are 1, the others 0."""
    return (torch.arange(rank, device=open_.device) < open_.reshape(-1, 1)).to(torch.float32)


def mask_per_sample(mask: Tensor, batch: int) -> Tensor:
    """Mask (B, R) repeated to `batch` = n·B rows: guidance and several images per prompt keep their order."""
    if mask.shape[0] == 1:
        return mask.expand(batch, -1)
    if batch % mask.shape[0]:
        raise ValueError(f"a gate for {mask.shape[0]} timesteps cannot serve a batch of {batch}")
    return mask.repeat_interleave(batch // mask.shape[0], dim=0)


@dataclass(frozen=True)
class Schedule:
    """How many ranks a layer has open at a timestep; of `group` neighbours, all or none.

    A layer of another rank than `max_rank`, as one that is too small for it, has its share of `min_rank`.
    Raises `Refused` where the one is not between 1 and the other.
    """

    min_rank: int | None = None  # open at pure noise, counted in groups; None is half of them
    alpha: float = 1.0
    horizon: int = 1000
    group: int = 1
    max_rank: int | None = None  # what min_rank is of; None: of every layer's own rank, whatever it is

    def __post_init__(self) -> None:
        if self.max_rank is not None and not 1 <= (self.min_rank or 1) <= self.max_rank:
            _refuse(self.min_rank, self.max_rank)

    def of(self, rank: int) -> Schedule:
        """The schedule of a network of this rank, which all its layers follow in proportion."""
        return replace(
            self, min_rank=max(1, rank // 2) if self.min_rank is None else self.min_rank, max_rank=rank
        )

    def open(self, timestep: Tensor, rank: int) -> Tensor:
        """Open ranks (B,) of a layer of `rank` at timesteps (B,); see `open_ranks`."""
        return self.group * open_ranks(
            timestep, rank // self.group, self.least(rank), self.alpha, self.horizon
        )

    def least(self, rank: int) -> int:
        """R_min of a layer of this rank, in groups: ⌊min_rank·rank/max_rank⌋, at least 1."""
        rank //= self.group
        if self.min_rank is None:
            return max(1, rank // 2)
        return self.min_rank if self.max_rank is None else max(1, self.min_rank * rank // self.max_rank)

    def metadata(self, rank: int | None) -> dict[str, str]:
        """What a file's metadata says; a rank of None, where layers differ, leaves out what depends on it."""
        told = {
            "tlora_alpha": f"{self.alpha:g}",
            "tlora_T": str(self.horizon),
            "tlora_group": str(self.group),
        }
        most = rank // self.group if self.max_rank is None and rank is not None else self.max_rank
        least = self.least(rank) if self.min_rank is None and rank is not None else self.min_rank
        told |= {} if most is None else {"tlora_max_rank": str(most)}
        return told | ({} if least is None else {"tlora_min_rank": str(least)})
