"""Rules that turn the changes of several adapters in one layer into one change.

Shapes: ΔWᵢ (O, I) of rank rᵢ, weights wᵢ. A rule returns a pair of factors, up (O, R) and down (R, I). The
rules `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` are those that PEFT's `add_weighted_adapter`
names `ties_svd` and so on: they act on ΔW itself, and an SVD brings the result to a low rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lowrank.formats.delta import Delta
from lowrank.formats.resize import RankRule, cut_matrix, cut_pair

Pair: TypeAlias = tuple[Tensor, Tensor]  # up (O, R), down (R, I)


class Part(NamedTuple):
    """One adapter's change of a layer, and its weight."""

    weight: float
    layer: Delta


@dataclass(frozen=True)
class RuleOptions:
    """Numbers of the rules; a rule uses those that it names."""

    rank: int | None = None  # of an SVD; None: the largest rank of the parts
    density: float = 0.5  # share of ΔW's elements that are kept
    sign: str = "total"  # sign of an element that wins: "total" of the values, or by "frequency"
    seed: int = 0
    projection: float = 1.0  # share of the overlap that is removed
    top: int | None = None  # K largest elements; None: the product of the ranks
    alpha: float = 1.5
    beta: float = 0.5
    steps: int = 100
    rate: float = 0.01
    penalty: float = 0.01


def concat(parts: Sequence[Part], options: RuleOptions, name: str) -> Pair:
    """Σ wᵢ·ΔWᵢ as [U₁ | U₂ …]·[w₁s₁D₁ ; w₂s₂D₂ …]: exact, of rank Σ rᵢ."""
    ups = [part.layer.up.float() for part in parts]
    downs = [part.weight * part.layer.scale * part.layer.down.float() for part in parts]
    return torch.cat(ups, 1), torch.cat(downs)


def svd(parts: Sequence[Part], options: RuleOptions, name: str) -> Pair:
    """The nearest matrix of rank R to Σ wᵢ·ΔWᵢ (PEFT's `svd`)."""
    up, down = concat(parts, options, name)
    cut = cut_pair(Delta(up, down, 1.0), RankRule(most=_rank(parts, options))).layer
    return cut.up * cut.scale, cut.down


def magnitude_prune(parts: Sequence[Part], options: RuleOptions, name: str) -> Pair:
    """Σ wᵢ·top(ΔWᵢ), where `top` keeps the `density` of elements of largest magnitude; then an SVD."""
    kept = [_largest(part.layer.delta(), options.density) for part in parts]
    return _low_rank(_weighted(kept, parts), parts, options)


def dare_linear(parts: Sequence[Part], options: RuleOptions, name: str) -> Pair:
    """Σ wᵢ·Bᵢ ⊙ ΔWᵢ/density, Bᵢ Bernoulli(density) (DARE, arXiv 2311.03099); then an SVD."""
    kept = _dropped(parts, options, name)
    return _low_rank(_weighted(kept, parts), parts, options)


def ties(parts: Sequence[Part], options: RuleOptions, name: str) -> Pair:
    """Trim, elect a sign, merge what agrees with it (TIES, arXiv 2306.01708); then an SVD.

    Each element is the mean of wᵢ·top(ΔWᵢ) over the parts with the elected sign.
    """
    kept = [_largest(part.layer.delta(), options.density) for part in parts]
    return _low_rank(_agreed(kept, parts, options.sign), parts, options)


def dare_ties(parts: Sequence[Part], options: RuleOptions, name: str) -> Pair:
    """As `ties`, with DARE's random elements in place of the largest ones."""
    kept = _dropped(parts, options, name)
    return _low_rank(_agreed(kept, parts, options.sign), parts, options)


def orthogonal(parts: Sequence[Part], options: RuleOptions, name: str) -> Pair:
    """w₁ΔW₁ + w₂ΔW₂(I − μ·V₁V₁ᵀ): V₁ spans the input directions of ΔW₁ (NP-LoRA, arXiv 2511.11051).

    The first adapter (the style) is unchanged; each further one loses the share μ = `projection` of what it
    does to the input directions of those before it. Exact, of rank Σ rᵢ.
    """
    up, _ = concat(parts, options, name)
    downs, taken = [], parts[0].layer.down.new_zeros(0, parts[0].layer.down.shape[1], dtype=torch.float64)
    for part in parts:
        down = part.weight * part.layer.scale * part.layer.down.double()
        downs.append(down - options.projection * (down @ taken.T) @ taken)
        taken = _row_space(torch.cat([taken, _row_space(part.layer.delta().double())]))
    return up, torch.cat(downs).float()


def _rank(parts: Sequence[Part], options: RuleOptions) -> int:
    """The rank of a result: the one that is asked for, or the largest of the parts; at most min(O, I)."""
    most = options.rank or max(part.layer.rank for part in parts)
    return min(most, parts[0].layer.up.shape[0], parts[0].layer.down.shape[1])


def _low_rank(matrix: Tensor, parts: Sequence[Part], options: RuleOptions) -> Pair:
    cut = cut_matrix(matrix, RankRule(most=_rank(parts, options))).layer
    return cut.up, cut.down


def _weighted(matrices: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    return torch.stack([part.weight * m for part, m in zip(parts, matrices, strict=True)]).sum(0)


def _largest(matrix: Tensor, density: float) -> Tensor:
    """A matrix with only its ⌊density·n⌋ elements of largest magnitude."""
    count = int(density * matrix.numel())
    kept = torch.zeros_like(matrix).flatten()
    at = matrix.abs().flatten().topk(count).indices
    kept[at] = matrix.flatten()[at]
    return kept.reshape(matrix.shape)


def _dropped(parts: Sequence[Part], options: RuleOptions, name: str) -> list[Tensor]:
    """Each ΔW with random elements set to 0 and the others divided by the density, seeded by the layer."""
    digest = hashlib.sha256(f"{options.seed} {name}".encode()).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    changes = [part.layer.delta().cpu() for part in parts]
    return [m * torch.bernoulli(torch.full_like(m, options.density), generator=draw) / options.density
            for m in changes]  # fmt: skip


def _agreed(matrices: Sequence[Tensor], parts: Sequence[Part], sign: str) -> Tensor:
    """The mean of the weighted elements that have the elected sign; 0 counts for no sign."""
    stacked = torch.stack(list(matrices))
    votes = (stacked if sign == "total" else stacked.sign()).sum(0)
    agrees = stacked.sign() == torch.where(votes >= 0, 1, -1)
    weights = torch.tensor([part.weight for part in parts]).to(stacked)[:, None, None]
    return (weights * stacked * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def _row_space(matrix: Tensor) -> Tensor:
    """Orthonormal rows (k, I) that span the rows of a matrix, in float64."""
    _, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    floor = torch.finfo(torch.float32).eps * max(matrix.shape) * (s[0] if len(s) else 0)
    return vh[s > floor]


@dataclass(frozen=True)
class Rule:
    """A rule of merging.

    `pair` computes one layer; without it the layers are added as `PairSum` adds them. `blocks` are the parts
    of the denoiser that the style and the content adapter change. `by_step`: each step chooses one adapter
    for each layer. `learned`: coefficients for the columns of each ΔW are trained on the model.
    """

    name: str
    pair: Callable[[Sequence[Part], RuleOptions, str], Pair] | None = None
    same_basis: bool = False
    blocks: tuple[str, str] | None = None
    by_step: bool = False
    learned: bool = False

    @property
    def two(self) -> bool:
        """Whether the rule is for a style and a content alone."""
        return self.blocks is not None or self.by_step or self.learned


SUM = Rule("sum")
_RULES = (
    SUM,
    Rule("delta_r", same_basis=True),
    Rule("concat", concat),
    Rule("svd", svd),
    Rule("magnitude_prune", magnitude_prune),
    Rule("dare_linear", dare_linear),
    Rule("ties", ties),
    Rule("dare_ties", dare_ties),
    Rule("orthogonal", orthogonal),
    # B-LoRA (arXiv 2403.14572): the two blocks of SDXL's decoder that its authors train
    Rule("blora", blocks=("up_blocks.0.attentions.1.", "up_blocks.0.attentions.0.")),
    Rule("klora", by_step=True),
    Rule("ziplora", concat, learned=True),
)
RULES: Mapping[str, Rule] = MappingProxyType({rule.name: rule for rule in _RULES})


class Merging(NamedTuple):
    """A rule and its numbers."""

    rule: Rule = SUM
    options: RuleOptions = RuleOptions()


PLAIN = Merging()
