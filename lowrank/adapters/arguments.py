"""Network arguments that every method understands, and what they give each layer: rank, alpha, learning rate.

Names and meanings up to `loraplus_…` are those of kohya sd-scripts (networks/lora.py).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lowrank.adapters import layer_rules, unet_blocks
from lowrank.adapters.rates import Speed
from lowrank.adapters.targets import Target, host_shape
from lowrank.errors import Refused

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CommonArguments:
    """Network arguments that every method understands."""

    target: str | None = None
    """regular expression over layer paths, replaces the default targets"""
    target_module: str | None = None
    """classes of blocks with commas between (Attention,FeedForward): all their layers, likewise"""
    target_name: str | None = None
    """several regular expressions set apart by semicolons, likewise; each must match"""
    exclude: str | None = None
    """regular expression over layer paths, taken away from the targets"""
    conv_dim: int | None = None
    """rank of k×k convolutions; on a U-Net it adds the layers of its convolutional blocks to the targets;
    0 leaves them out"""
    conv_alpha: float | None = None
    """alpha of k×k convolutions (1 when conv_dim is given)"""
    dropout: float | None = None
    """dropout on the r-wide projection"""
    rank_dropout: float | None = None
    """per sample, the share of ranks left out"""
    module_dropout: float | None = None
    """the share of steps in which a layer is left out"""
    block_dims: str | None = None
    """ranks of the U-Net's blocks with commas between: 25 for SD, 23 for SDXL; 0 leaves a block out"""
    block_alphas: str | None = None
    conv_block_dims: str | None = None
    conv_block_alphas: str | None = None
    down_lr_weight: str | None = None
    """multiples of the learning rate for the downward blocks: numbers, or a curve such as sine+0.25"""
    mid_lr_weight: str | None = None
    up_lr_weight: str | None = None
    block_lr_zero_threshold: float = 0.0
    """a block whose weight is this or less is left out"""
    loraplus_lr_ratio: float | None = None
    """LoRA+: learning rate of the up factor, as a multiple"""
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None
    module_rules: str | None = None
    """rank, alpha and learning rate by layer name: PATTERN -> rank=16 alpha=8 lr=1e-4; PATTERN -> off;
    by class of the block around: class:FeedForward -> rank=8"""
    save_basis: str = "full"
    """frozen tensors in files: full (all), q (what using the file needs), none (found again from the base)"""

    def __post_init__(self) -> None:
        layer_rules.parse_rules(self.module_rules)  # refuse a malformed rule before a model is loaded
        for name in ("dropout", "rank_dropout", "module_dropout"):
            share = getattr(self, name)
            if share is not None and not 0 <= share < 1:
                raise Refused(f"network argument {name}={share:g} is not a share from 0 to below 1; lower it")
        for name in ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"):
            if (getattr(self, name) or 0) < 0:
                raise Refused(f"network argument {name}={getattr(self, name):g} is below 0; give 0 or more")

    @property
    def selection(self) -> dict[str, Any]:
        """What `targets.find` is asked for, where targets are named; else empty."""
        if (self.target, self.target_module, self.target_name) == (None, None, None):
            return {}
        return {
            "target": self.target,
            "modules": _split(self.target_module, ","),
            "names": _split(self.target_name, ";"),
        }

    @property
    def convolutional(self) -> bool:
        """Whether a U-Net's convolutional blocks are targets too."""
        return bool(self.conv_dim) or self.conv_block_dims is not None


def _split(text: str | None, mark: str) -> tuple[str, ...]:
    return tuple(piece.strip() for piece in (text or "").split(mark) if piece.strip())


def layer_sizes(
    layout: CommonArguments, targets: Sequence[Target], rank: int, alpha: float, clamp: bool = False
) -> dict[str, tuple[int, float]]:
    """(rank, alpha) by layer name; a layer that is left out has none. An alpha of 0 is the rank.

    Raises `Refused` for a rank that does not fit its layer, and when no layer is left. With `clamp` such a
    rank is lowered to min(O, I) at the same scale alpha/rank, which is said once.
    """
    conv = (layout.conv_dim, 1.0 if layout.conv_alpha is None else layout.conv_alpha)
    table = _by_block(layout, targets, (rank, alpha), conv)
    weights, by_name = _lr_weights(layout, targets), layer_rules.parse_rules(layout.module_rules)
    layer_rules.check_rules(by_name, targets)
    found: dict[str, tuple[int, float]] = {}
    lowered: dict[str, tuple[int, int]] = {}
    for target in targets:
        kernel = target.module.kernel_size if isinstance(target.module, nn.Conv2d) else (1, 1)
        wide = tuple(kernel) != (1, 1)
        own = conv if wide and layout.conv_dim is not None else (rank, alpha)
        block = unet_blocks.index(target.name)
        if table is not None and block is not None:
            own = table[wide][block]
        if weights is not None and block is not None and weights[block] == 0:
            own = (0, 0.0)
        position = layer_rules.first(by_name, target)
        if position is not None:
            rule = by_name[position]
            own = (
                own[0] if rule.rank is None else rule.rank,
                own[1] if rule.alpha is None else rule.alpha,
            )
        if own[0]:
            found[target.name] = _fitting(target, int(own[0]), float(own[1]) or float(own[0]), clamp)
            if found[target.name][0] < own[0]:
                lowered[target.native or target.name] = (int(own[0]), found[target.name][0])
    if lowered:
        name, (asked, most) = next(iter(lowered.items()))
        logger.warning(
            "rank %d is more than %d layers have, for example %s: there it is min(out, in) = %d, and fewer "
            "ranks open in proportion",
            *(asked, len(lowered), name, most),
        )
    if targets and not found:
        raise Refused("network arguments leave out every layer; give at least one a rank above 0")
    return found


def speeds(layout: CommonArguments, targets: Sequence[Target]) -> dict[str, Speed]:
    """How fast each layer learns, by name; layers that follow their part are left out."""
    weights, by_name = _lr_weights(layout, targets), layer_rules.parse_rules(layout.module_rules)
    found = {}
    for target in targets:
        block, position = unet_blocks.index(target.name), layer_rules.first(by_name, target)
        if position is not None and by_name[position].lr is not None:
            found[target.name] = Speed(f"reg_lr_{position}", rate=by_name[position].lr)
        elif weights is not None and block is not None:
            found[target.name] = Speed(f"unet_block{block}", weights[block])
    return found


def _fitting(target: Target, rank: int, alpha: float, clamp: bool) -> tuple[int, float]:
    outs, ins = host_shape(target.module)
    if clamp and rank > min(outs, ins):
        rank, alpha = min(outs, ins), alpha * min(outs, ins) / rank
    if not 1 <= rank <= min(outs, ins):
        raise Refused(
            f"rank {rank} does not fit {target.native or target.name} (out={outs}, in={ins}); choose "
            f"--network_dim between 1 and {min(outs, ins)}, or leave such layers out with --network_args "
            "exclude=REGEX"
        )
    return rank, alpha


def _plan(targets: Sequence[Target], option: str) -> unet_blocks.Plan:
    found = unet_blocks.plan(target.name for target in targets)
    if found is None:
        raise Refused(
            f"{option} is about the blocks of an SD or SDXL U-Net, and none is adapted here; choose "
            "layers by name with module_rules"
        )
    return found


def _by_block(
    layout: CommonArguments, targets: Sequence[Target], plain: tuple, conv: tuple
) -> tuple[list[tuple], list[tuple]] | None:
    """(rank, alpha) by block, of plain layers and of k×k convolutions, or None where no list is given."""
    lists = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
    given = [name for name in lists if getattr(layout, name) is not None]
    if not given:
        return None
    count = _plan(targets, given[0]).count

    def numbers(name: str, kind: type, default: float | None) -> list:
        text = getattr(layout, name)
        return [default] * count if text is None else unet_blocks.values(name, text, count, kind)

    ranks, alphas = numbers("block_dims", int, plain[0]), numbers("block_alphas", float, plain[1])
    wide, wide_alphas = numbers("conv_block_dims", int, conv[0]), numbers("conv_block_alphas", float, conv[1])
    return list(zip(ranks, alphas, strict=True)), list(zip(wide, wide_alphas, strict=True))


def _lr_weights(layout: CommonArguments, targets: Sequence[Target]) -> list[float] | None:
    given = (layout.down_lr_weight, layout.mid_lr_weight, layout.up_lr_weight)
    if given == (None, None, None):
        return None
    plan = _plan(targets, "a block's lr_weight")
    return unet_blocks.lr_weights(plan, *given, layout.block_lr_zero_threshold)
