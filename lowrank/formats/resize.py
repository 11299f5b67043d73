"""The nearest layers of a smaller rank, by singular values: of pairs, of other kinds, and of any matrix.

Ranks that depend on the singular values S are those of kohya's `networks/resize_lora.py`. Shapes: O out, I
in with a convolution's kernel flattened into it, R rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.bases.krylov import top_subspace
from lowrank.errors import Refused
from lowrank.formats.base_checkpoint import BaseCheckpoint
from lowrank.formats.delta import Delta
from lowrank.formats.foreign import ForeignLayer
from lowrank.formats.read import Adapter
from lowrank.naming.places import LayerPath

ZERO = 1e-6  # kohya: a layer whose largest singular value is not above this gets rank 1
FEW = 6  # a top subspace is cheaper than a whole SVD where the rank is below 1/FEW of the smaller side
EXACT = 2048  # the smaller side up to which the whole SVD is in float64
_KERNEL = re.compile(r"resnets\.|samplers\.|conv_(in|out)$|proj_(in|out)$")  # convolutions of a U-Net


class RankRule(NamedTuple):
    """How many singular values are kept: `most`, or by `method` and `target`, `most` at most."""

    method: str = "fixed"  # or a key of `METHODS`
    target: float = 0.0
    most: int | None = None

    def rank(self, S: Tensor, energy: float | None = None) -> int:
        """The number of kept singular values; S (n,) is in descending order.

        S may be without its smallest values for the rules of `FROM_TOP`, with `energy` = ‖ΔW‖².
        """
        if self.method == "fixed":
            count = len(S)
        elif self.method == "sv_fro":
            count = sv_fro(S, self.target, energy)
        else:
            count = METHODS[self.method](S, self.target)
        if self.method != "fixed" and float(S[0]) <= ZERO:
            count = 1
        return max(1, min(count, len(S), self.most or len(S)))


def sv_ratio(S: Tensor, target: float) -> int:
    """The number of singular values above S₁/target."""
    return int((S[0] / target < S).sum())


def sv_fro(S: Tensor, target: float, energy: float | None = None) -> int:
    """The smallest number of singular values with √ΣS² at least target·‖ΔW‖; `energy` is ‖ΔW‖²."""
    return _first(S.square(), target**2, energy)


def sv_cumulative(S: Tensor, target: float) -> int:
    """The smallest number of singular values whose sum is at least target·ΣS."""
    return _first(S, target)


def _first(values: Tensor, target: float, total: float | None = None) -> int:
    """The length of the shortest start of `values` with `target` of their sum, or of `total`."""
    shares = values.cumsum(0) / (values.sum() if total is None else total)
    return int(torch.searchsorted(shares, torch.tensor(target, dtype=shares.dtype))) + 1


METHODS: Mapping[str, Callable[[Tensor, float], int]] = {
    "sv_ratio": sv_ratio,
    "sv_fro": sv_fro,
    "sv_cumulative": sv_cumulative,
}

FROM_TOP = ("fixed", "sv_ratio", "sv_fro")  # rules that need only the singular values that they keep


class Loss(NamedTuple):
    """What smaller ranks leave out, as shares of ‖ΔW‖: of all layers together, and of the worst one."""

    together: float
    worst: float
    layer: str


class Losses:
    """Squared norms of what is lost and of what there was, layer by layer."""

    def __init__(self) -> None:
        self._lost = self._whole = self._worst = 0.0
        self._layer = ""

    def add(self, path: str, lost: float, whole: float) -> None:
        """Count a layer; both numbers are squared norms."""
        self._lost, self._whole = self._lost + lost, self._whole + whole
        share = math.sqrt(lost / whole) if whole else 0.0
        if share >= self._worst:
            self._worst, self._layer = share, path

    def loss(self) -> Loss:
        """The loss of all layers so far."""
        return Loss(math.sqrt(self._lost / self._whole) if self._whole else 0.0, self._worst, self._layer)


class Cut(NamedTuple):
    """A layer of smaller rank, the squared ‖ΔW‖ that is lost, and the squared ‖ΔW‖ there was."""

    layer: Delta
    lost: float
    whole: float


def cut_matrix(matrix: Tensor, rule: RankRule, kernel: tuple[int, ...] = ()) -> Cut:
    """The nearest pair to a matrix (O, I), in fp32."""
    whole = float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    smaller = min(matrix.shape)
    if rule.method in FROM_TOP and rule.most is not None and rule.most * FEW < smaller:
        u, s, vh, _ = top_subspace(matrix.float(), rule.most)
    else:
        wide = torch.float64 if smaller <= EXACT else torch.float32
        u, s, vh = torch.linalg.svd(matrix.to(wide), full_matrices=False)
    rank = rule.rank(s, whole)
    root = s[:rank].sqrt()
    up, down = (u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float()
    kept = float(s[:rank].double().square().sum())
    return Cut(Delta(up, down, 1.0, kernel=kernel), max(0.0, whole - kept), whole)


def cut_pair(layer: Delta, rule: RankRule) -> Cut:
    """The nearest pair of smaller rank: a thin SVD, of the R×R product of both factors' triangles."""
    if rule.method == "fixed" and layer.rank <= (rule.most or layer.rank):
        return Cut(layer, 0.0, layer.norm() ** 2)
    Q, left = torch.linalg.qr(layer.up.double())  # (O, R'), (R', R)
    P, right = torch.linalg.qr(layer.down.double().T)  # (I, R''), (R'', R)
    u, s, vh = torch.linalg.svd(layer.scale * left @ right.T)
    rank = rule.rank(s / abs(layer.scale) if layer.scale else s)  # kohya's S are those of U·D
    if rank == layer.rank:
        return Cut(layer, 0.0, layer.norm() ** 2)
    root = s[:rank].sqrt()
    up, down = Q @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ P.T
    energy = s.square()
    made = layer._replace(up=up.to(layer.up.dtype), down=down.to(layer.down.dtype), scale=1.0)
    return Cut(made, float(energy[rank:].sum()), float(energy.sum()))


def resize(adapter: Adapter, rule: RankRule) -> tuple[Adapter, Loss]:
    """The nearest adapter with the ranks of a rule, and what that loses."""
    layers: dict[LayerPath, Delta] = {}
    losses = Losses()
    for place, layer in adapter.layers.items():
        cut = cut_pair(layer, rule)
        layers[place] = cut.layer
        losses.add(place.path, cut.lost, cut.whole)
    raw = {place: roles for place, roles in adapter.raw.items() if layers[place] is adapter.layers[place]}
    return replace(adapter, layers=layers, raw=raw), losses.loss()


def as_pairs(adapter: Adapter, rule: RankRule, base: BaseCheckpoint | None) -> tuple[Adapter, Loss]:
    """The adapter with the nearest pair in place of each weight of another kind, and what that loses.

    Norm layers and biases stay in `foreign`. Raises `Refused` where the base is needed.
    """
    layers, losses = dict(adapter.layers), Losses()
    foreign = dict(adapter.foreign)
    for place, layer in adapter.foreign.items():
        if not layer.changes_matrix:
            continue
        matrix, kernel = _change(place, layer, base)
        layers[place], lost, whole = cut_matrix(matrix, rule, kernel)
        losses.add(place.path, lost, whole)
        del foreign[place]
    return replace(adapter, layers=layers, foreign=foreign), losses.loss()


def _change(
    place: LayerPath, layer: ForeignLayer, base: BaseCheckpoint | None
) -> tuple[Tensor, tuple[int, ...]]:
    """W′ − W (O, I) of one layer, and its kernel."""
    if base is None and place.part == "unet" and _KERNEL.search(place.path):
        raise Refused(
            f"{layer.module} in {layer.source} is {layer.kind.name} on a convolution, whose kernel is not in "
            "the file; give the base with --model"
        )
    W = None if base is None else base.original(place)
    change = layer.change(W)
    assert change is not None  # it changes a matrix
    return change.flatten(1), () if W is None else tuple(W.shape[2:])
