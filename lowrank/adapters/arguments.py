"""Network arguments common to all methods, and the rank, alpha and learning rate that they give each layer.

Names and meanings up to `loraplus_…` are those of kohya sd-scripts (networks/lora.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lowrank.adapters import layer_rules, unet_blocks
from lowrank.adapters.rates import Speed
from lowrank.adapters.targets import Target, host_shape
from lowrank.errors import Refused

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CommonArguments:
    """The network arguments common to all methods."""

    target: str | None = None
    """regular expression; layers whose path matches are adapted instead of the default targets"""
    target_module: str | None = None
    """block classes separated by commas (Attention,FeedForward); their layers replace the default targets"""
    target_name: str | None = None
    """regular expressions separated by semicolons, as in `target`; each must match a layer"""
    exclude: str | None = None
    """regular expression; layers whose path matches are not adapted"""
    conv_dim: int | None = None
    """rank of k×k convolutions; above 0 it adds the layers of a U-Net's convolutional blocks to the targets,
    0 excludes k×k convolutions"""
    conv_alpha: float | None = None
    """alpha of k×k convolutions (default 1 if conv_dim is given)"""
    dropout: float | None = None
    """probability of dropping each element of the rank-wide projection D x"""
    rank_dropout: float | None = None
    """probability of dropping each rank, drawn per sample"""
    module_dropout: float | None = None
    """probability of skipping the adapter of a layer in a step"""
    block_dims: str | None = None
    """rank of each U-Net block, separated by commas: 25 for SD, 23 for SDXL; 0 excludes a block"""
    block_alphas: str | None = None
    """alpha of each U-Net block, separated by commas"""
    conv_block_dims: str | None = None
    """rank of the k×k convolutions of each U-Net block, separated by commas"""
    conv_block_alphas: str | None = None
    """alpha of the k×k convolutions of each U-Net block, separated by commas"""
    down_lr_weight: str | None = None
    """learning rate multiples of the U-Net's down blocks: numbers, or a curve such as sine+0.25"""
    mid_lr_weight: str | None = None
    """learning rate multiple of the U-Net's mid block, on SDXL three numbers"""
    up_lr_weight: str | None = None
    """learning rate multiples of the U-Net's up blocks: numbers, or a curve such as sine+0.25"""
    block_lr_zero_threshold: float = 0.0
    """U-Net blocks whose learning rate multiple is at most this are excluded"""
    loraplus_lr_ratio: float | None = None
    """LoRA+: factor by which the learning rate of the up factor is multiplied"""
    loraplus_unet_lr_ratio: float | None = None
    """loraplus_lr_ratio for the denoiser (U-Net or transformer)"""
    loraplus_text_encoder_lr_ratio: float | None = None
    """loraplus_lr_ratio for the text encoders"""
    module_rules: str | None = None
    """rank, alpha and learning rate by layer name: PATTERN -> rank=16 alpha=8 lr=1e-4; PATTERN -> off;
    or by the class of the surrounding block: class:FeedForward -> rank=8"""
    save_basis: str = "full"
    """frozen tensors to save: full (all), q (those needed for inference), none (recomputed from the base)"""

    def __post_init__(self) -> None:
        _ = self.rules  # refuse a malformed rule before a model is loaded
        for name in ("dropout", "rank_dropout", "module_dropout"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                raise Refused(f"network argument {name}={rate:g} is not from 0 to below 1; lower it")
        for name in ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"):
            if (getattr(self, name) or 0) < 0:
                raise Refused(f"network argument {name}={getattr(self, name):g} is below 0; give 0 or more")

    @property
    def rules(self) -> tuple[layer_rules.Rule, ...]:
        """The rules of `module_rules`."""
        return layer_rules.parse_rules(self.module_rules) if self.module_rules else ()

    @property
    def selection(self) -> dict[str, Any]:
        """The arguments of `targets.find` that choose layers; empty if the default targets apply."""
        if (self.target, self.target_module, self.target_name) == (None, None, None):
            return {}
        return {
            "target": self.target,
            "modules": _split(self.target_module, ","),
            "names": _split(self.target_name, ";"),
        }

    @property
    def convolutional(self) -> bool:
        """Whether the layers of a U-Net's convolutional blocks are targets."""
        return bool(self.conv_dim) or self.conv_block_dims is not None


@dataclass(frozen=True)
class Chosen:
    """The layers to adapt, and the rank and learning rate of those that do not have the network's."""

    targets: list[Target]
    ranks: Mapping[str, int] = field(default_factory=dict)  # by the layer's name; 0 leaves it out
    speeds: Mapping[str, Speed] = field(default_factory=dict)


def _split(text: str | None, separator: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in (text or "").split(separator) if item.strip())


def layer_sizes(
    common: CommonArguments,
    targets: Sequence[Target],
    rank: int,
    alpha: float,
    *,
    ranks: Mapping[str, int],
    clamp: bool = False,
) -> dict[str, tuple[int, float]]:
    """Return (rank, alpha) by layer name, without excluded layers; an alpha of 0 means the rank.

    `ranks` are the ranks of layers that do not have `rank`, by name; the common arguments replace both.
    Raises `Refused` for a rank above min(O, I) of its layer, and if no layer is left. With `clamp` such a
    rank is lowered to min(O, I) at unchanged alpha/rank, with one warning.
    """
    conv = (common.conv_dim, 1.0 if common.conv_alpha is None else common.conv_alpha)
    table = _by_block(common, targets, (rank, alpha), conv)
    weights, rules = _lr_weights(common, targets), common.rules
    layer_rules.check_rules(rules, targets)
    sizes: dict[str, tuple[int, float]] = {}
    lowered: dict[str, tuple[int, int]] = {}
    for target in targets:
        kernel = target.module.kernel_size if isinstance(target.module, nn.Conv2d) else (1, 1)
        wide = tuple(kernel) != (1, 1)
        plain = (ranks.get(target.name, rank), alpha)
        size = conv if wide and common.conv_dim is not None else plain
        block = unet_blocks.index(target.name)
        if table is not None and block is not None:
            size = table[wide][block]
        if weights is not None and block is not None and weights[block] == 0:
            size = (0, 0.0)
        position = layer_rules.first(rules, target)
        if position is not None:
            rule = rules[position]
            size = (
                size[0] if rule.rank is None else rule.rank,
                size[1] if rule.alpha is None else rule.alpha,
            )
        if size[0]:
            sizes[target.name] = _fitting(target, int(size[0]), float(size[1]) or float(size[0]), clamp)
            if sizes[target.name][0] < size[0]:
                lowered[target.native or target.name] = (int(size[0]), sizes[target.name][0])
    if lowered:
        name, (requested, limit) = next(iter(lowered.items()))
        logger.warning(
            "rank %d exceeds min(out, in) of %d layers, for example %s: its rank is %d, with open ranks in "
            "proportion",
            *(requested, len(lowered), name, limit),
        )
    if targets and not sizes:
        raise Refused("network arguments exclude every layer; give at least one layer a rank above 0")
    return sizes


def speeds(common: CommonArguments, targets: Sequence[Target]) -> dict[str, Speed]:
    """Return the learning rate of each layer that does not have the rate of its component, by name."""
    weights, rules, rates = _lr_weights(common, targets), common.rules, {}
    if weights is None and not rules:
        return {}
    for target in targets:
        block, position = unet_blocks.index(target.name), layer_rules.first(rules, target)
        if position is not None and rules[position].lr is not None:
            rates[target.name] = Speed(f"reg_lr_{position}", rate=rules[position].lr)
        elif weights is not None and block is not None:
            rates[target.name] = Speed(f"unet_block{block}", weights[block])
    return rates


def _fitting(target: Target, rank: int, alpha: float, clamp: bool) -> tuple[int, float]:
    outs, ins = host_shape(target.module)
    if clamp and rank > min(outs, ins):
        rank, alpha = min(outs, ins), alpha * min(outs, ins) / rank
    if not 1 <= rank <= min(outs, ins):
        raise Refused(
            f"rank {rank} does not fit {target.native or target.name} (out={outs}, in={ins}); choose "
            f"--network_dim between 1 and {min(outs, ins)}, or exclude the layer with --network_args "
            "exclude=REGEX"
        )
    return rank, alpha


def _plan(targets: Sequence[Target], option: str) -> unet_blocks.Plan:
    plan = unet_blocks.plan(target.name for target in targets)
    if plan is None:
        raise Refused(
            f"{option} needs adapted layers of an SD or SDXL U-Net, but there are none; choose layers "
            "by name with module_rules"
        )
    return plan


def _by_block(
    common: CommonArguments, targets: Sequence[Target], plain: tuple, conv: tuple
) -> tuple[list[tuple], list[tuple]] | None:
    """Return (rank, alpha) by block, of plain layers and k×k convolutions, or None if no list is given."""
    lists = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
    present = [name for name in lists if getattr(common, name) is not None]
    if not present:
        return None
    count = _plan(targets, present[0]).count

    def numbers(name: str, kind: type, default: float | None) -> list:
        text = getattr(common, name)
        return [default] * count if text is None else unet_blocks.values(name, text, count, kind)

    ranks, alphas = numbers("block_dims", int, plain[0]), numbers("block_alphas", float, plain[1])
    wide, wide_alphas = numbers("conv_block_dims", int, conv[0]), numbers("conv_block_alphas", float, conv[1])
    return list(zip(ranks, alphas, strict=True)), list(zip(wide, wide_alphas, strict=True))


def _lr_weights(common: CommonArguments, targets: Sequence[Target]) -> list[float] | None:
    texts = (common.down_lr_weight, common.mid_lr_weight, common.up_lr_weight)
    if texts == (None, None, None):
        return None
    plan = _plan(targets, "a block's lr_weight")
    return unet_blocks.lr_weights(plan, *texts, common.block_lr_zero_threshold)
