"""Kinds of layers in other programs' adapters that are no pair of factors: W′ − W from their tensors and W.

A kind is the names of its tensors and one function. The kinds are those of LyCORIS (`modules/*.py`) and of
ComfyUI's `set_weight`. Scales are those of LyCORIS in training: its merge multiplies LoKr and LoHa by alpha/R
twice. Shapes: O out, I in, K the size of a convolution's kernel, R rank; W is (O, I[, k, k]).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
MAGNITUDE, ALPHA = "magnitude", "alpha"  # roles that several kinds share


def _scale(tensors: Tensors, rank: int) -> float:
    alpha = tensors.get(ALPHA)
    return 1.0 if alpha is None else float(alpha) / rank


def _half(tensors: Tensors, name: str) -> tuple[Tensor, int | None]:
    """One half of a Kronecker product, as it is or from its factors, and their rank."""
    if name in tensors:
        return tensors[name].flatten(1), None
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    middle = tensors.get(name.replace("_w", "_t"))
    if middle is not None:  # (R, R, k, k) between a (R, O) and b (R, I)
        return torch.einsum("ij...,ip,jq->pq...", middle, a, b).flatten(1), len(b)
    return a @ b.flatten(1), len(b)


def lokr(tensors: Tensors, _weight: Tensor | None = None) -> Tensor:
    """ΔW (O, I·K) = alpha/R · w1 ⊗ w2 (arXiv 2309.14859); the scale is 1 where both are stored whole."""
    (first, r1), (second, r2) = _half(tensors, "lokr_w1"), _half(tensors, "lokr_w2")
    rank = r2 if r1 is None else r1
    return (1.0 if rank is None else _scale(tensors, rank)) * torch.kron(first, second)


def loha(tensors: Tensors, _weight: Tensor | None = None) -> Tensor:
    """ΔW (O, I·K) = alpha/R · (a1 b1) ⊙ (a2 b2) (arXiv 2108.06098, eq. 5)."""
    product: Tensor | float = 1.0
    for which in "12":
        a, b, middle = (tensors.get(f"hada_{name}") for name in (f"w{which}_a", f"w{which}_b", f"t{which}"))
        assert a is not None and b is not None  # checked by `ForeignLayer`
        half = a @ b.flatten(1) if middle is None else torch.einsum("ij...,ip,jq->pq...", middle, a, b)
        product = product * half.flatten(1)
    assert isinstance(product, Tensor)
    return _scale(tensors, len(tensors["hada_w1_b"])) * product


def glora(tensors: Tensors, weight: Tensor | None) -> Tensor:
    """ΔW = alpha/R · (W·a1·a2 + b1·b2) (arXiv 2306.07967); a1, a2 act on the inputs, not on the kernel."""
    assert weight is not None  # the kind needs the base
    a1, a2, b1, b2 = (tensors[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    rank = min(b1.shape[:2])
    if b1.shape[0] == rank != b1.shape[1]:  # files before LyCORIS 1.8.3 have the factors in the other order
        a1, a2, b1, b2 = a2, a1, b2, b1
    A = a1.flatten(1) @ a2.flatten(1)  # (I, I)
    of_inputs = torch.einsum("oi...,ij->oj...", weight, A).flatten(1)
    return _scale(tensors, rank) * (of_inputs + b1.flatten(1) @ b2.flatten(1))


def ia3(tensors: Tensors, weight: Tensor | None) -> Tensor:
    """ΔW = W scaled by the learned vector, along the inputs or along the outputs (arXiv 2205.05638)."""
    assert weight is not None  # the kind needs the base
    along_inputs = bool(tensors["on_input"])
    shape = [1] * weight.dim()
    shape[1 if along_inputs else 0] = -1
    return (weight * tensors["weight"].reshape(shape)).flatten(1)


def _rotation(blocks: Tensor, outs: int, alpha: Tensor | None) -> Tensor:
    """R (…, b, b) = (1 + Q)(1 − Q)⁻¹ with Q = B − Bᵀ, whose norm is at most alpha·O where alpha is set."""
    Q = blocks - blocks.transpose(-1, -2)
    if alpha is not None and float(alpha) > 0:
        norm, most = torch.linalg.vector_norm(Q) + 1e-8, float(alpha) * outs
        Q = Q * (most / norm if norm > most else 1.0)
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.linalg.solve(identity - Q, identity + Q, left=False)


def oft(tensors: Tensors, weight: Tensor | None) -> Tensor:
    """ΔW = rescale · RᵀW − W, each block of rows with its own rotation (arXiv 2306.07280); also kohya's."""
    assert weight is not None  # the kind needs the base
    W = weight.flatten(1)
    R = _rotation(tensors["oft_blocks"], len(W), tensors.get(ALPHA))  # (N, b, b)
    turned = torch.einsum("nij,nik->njk", R, W.reshape(len(R), R.shape[-1], -1)).reshape(W.shape)
    return _rescaled(tensors, turned) - W


def boft(tensors: Tensors, weight: Tensor | None) -> Tensor:
    """ΔW = rescale · R_M … R_1 W − W, stage m mixing rows that are 2ᵐ·b/2 apart (arXiv 2311.06243)."""
    assert weight is not None  # the kind needs the base
    stages = tensors["oft_blocks"]  # (M, N, b, b)
    W = weight.flatten(1)
    turned, b = W, stages.shape[-1]
    for m, R in enumerate(_rotation(stages, len(W), tensors.get(ALPHA))):
        apart = 2**m * b // 2
        rows = turned.reshape(-1, 2, apart, W.shape[1]).transpose(1, 2).reshape(-1, b, W.shape[1])
        mixed = torch.einsum("nij,njk->nik", R, rows)
        turned = mixed.reshape(-1, apart, 2, W.shape[1]).transpose(1, 2).reshape(W.shape)
    return _rescaled(tensors, turned) - W


def _rescaled(tensors: Tensors, rows: Tensor) -> Tensor:
    rescale = tensors.get("rescale")
    return rows if rescale is None else rescale.reshape(-1, 1) * rows


def full(tensors: Tensors, _weight: Tensor | None = None) -> Tensor:
    """ΔW as the file stores it."""
    value = tensors["diff"]
    return value.flatten(1) if value.dim() > 1 else value


def norm(tensors: Tensors, _weight: Tensor | None = None) -> Tensor:
    """The change of a norm layer's weight (C,)."""
    return tensors["w_norm"]


def set_weight(tensors: Tensors, weight: Tensor | None) -> Tensor:
    """W′ − W where the file stores W′."""
    assert weight is not None  # the kind needs the base
    change = tensors["set_weight"].reshape(weight.shape) - weight
    return change.flatten(1) if change.dim() > 1 else change


class Kind(NamedTuple):
    """A kind of layer: its name, the tensors of its files, and W′ − W from them and W."""

    name: str
    change: Callable[[Tensors, Tensor | None], Tensor] | None  # None: only the bias changes
    needed: tuple[tuple[str, ...], ...]  # one name of each group
    optional: tuple[str, ...] = ()
    bias: str | None = None  # the tensor that is added to the bias
    needs_base: bool = False

    @property
    def shown_by(self) -> frozenset[str]:
        """The tensors that only this kind has."""
        return frozenset(name for group in self.needed for name in group) - {"weight"}

    @property
    def names(self) -> frozenset[str]:
        """All tensors that a layer of this kind may have."""
        return frozenset((*self.optional, *(name for group in self.needed for name in group)))


def _each(*names: str) -> tuple[tuple[str, ...], ...]:
    return tuple((name,) for name in names)


_W1, _W2 = ("lokr_w1", "lokr_w1_a"), ("lokr_w2", "lokr_w2_a")
_LOKR = ("lokr_w1_b", "lokr_w2_b", "lokr_t1", "lokr_t2", MAGNITUDE, ALPHA, "diff_b")
_LOHA = _each("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_GLORA = _each("a1.weight", "a2.weight", "b1.weight", "b2.weight")
IA3 = Kind("IA3", ia3, _each("on_input", "weight"), needs_base=True)
OFT = Kind("OFT", oft, _each("oft_blocks"), ("rescale", ALPHA), needs_base=True)
NORM = Kind("norm", norm, _each("w_norm"), ("b_norm", ALPHA), bias="b_norm")
BIAS = Kind("bias", None, _each("diff_b"), (ALPHA,), bias="diff_b")
NORM_BIAS = Kind("norm", None, _each("b_norm"), (ALPHA,), bias="b_norm")
KINDS = (
    Kind("LoKr", lokr, (_W1, _W2), _LOKR, bias="diff_b"),
    Kind("LoHa", loha, _LOHA, ("hada_t1", "hada_t2", MAGNITUDE, ALPHA, "diff_b"), bias="diff_b"),
    Kind("GLoRA", glora, _GLORA, (ALPHA,), needs_base=True),
    IA3,
    OFT,
    Kind("full difference", full, _each("diff"), ("diff_b", ALPHA), bias="diff_b"),
    NORM,
    Kind("set_weight", set_weight, _each("set_weight"), needs_base=True),
    BIAS,
    NORM_BIAS,
)
BOFT = OFT._replace(name="BOFT", change=boft)
SUFFIXES = frozenset(name for kind in KINDS for name in kind.names) - {MAGNITUDE, ALPHA}


def kind_of(tensors: Tensors) -> Kind | None:
    """The kind of a layer by the names of its tensors; None for a kind that is not known here."""
    kind = next((kind for kind in KINDS if not tensors.keys().isdisjoint(kind.shown_by)), None)
    return BOFT if kind is OFT and tensors["oft_blocks"].dim() == 4 else kind
