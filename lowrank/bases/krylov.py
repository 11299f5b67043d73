"""The top singular subspace of a matrix by block Krylov iteration, and the QR factors of its top-r part.

Functions of tensors. Shapes: O outputs, I inputs (times the kernel of a convolution), r rank; W (O, I).

Sources: block Krylov, Musco & Musco, arXiv 1504.05477; residual test, Davis & Kahan 1970; QR of the top-r
part ("core") of W, QR-LoRA, arXiv 2507.04599.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.errors import Refused

Product = Callable[[Tensor], Tensor]
CHUNK = 2**20  # elements of a half-precision W converted to fp32 at a time: 4 MB instead of a copy of W
FIRST_CHECK = 5  # blocks before the first residual test
ENOUGH = 9  # blocks that σ_i = i^-0.5 needs: solve exactly if min(O, I) < 2·ENOUGH·block
DEEP = 16  # blocks after which the bound on energy is accepted instead of the bound on the angle
DECADES = 1.2  # decades that the bound falls per block (an estimate); only decides when to test next


class Report(NamedTuple):
    """How a subspace was computed, and bounds on its error from its residuals."""

    # "krylov": block Krylov iteration; "exact": float64 eigenvectors of the smaller Gram matrix; "fallback":
    # block Krylov did not reach its goals, then "exact"
    method: str
    columns: int  # dimension of the Krylov space, 0 if exact
    sine: float  # bound on the largest principal sine to the true subspace; 1.0: no bound
    loss: float  # bound on 1 - captured / best possible energy


class Subspace(NamedTuple):
    """Top-r singular triplets, largest first: W ≈ u diag(s) vh."""

    u: Tensor  # (O, r) orthonormal columns
    s: Tensor  # (r,)
    vh: Tensor  # (r, I) orthonormal rows
    report: Report


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Within the block, compute in full fp32: no TF32, no bf16 products, no autocast, no gradients."""
    new = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch >= 2.9 refuses to mix both settings
    modules = (torch.backends.cuda, torch.backends.mkldnn) if new else ()
    backends = [getattr(module, "matmul") for module in modules]  # noqa: B009 - unknown to type checkers
    previous = [backend.fp32_precision for backend in backends]
    previous_old = None if new else torch.get_float32_matmul_precision()
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        if not new:
            torch.set_float32_matmul_precision("highest")
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, value in zip(backends, previous, strict=True):
            backend.fp32_precision = value
        if previous_old:
            torch.set_float32_matmul_precision(previous_old)


def top_subspace(
    weight: Tensor,
    rank: int,
    *,
    seed: int = 0,
    block: int | None = None,
    tolerance: float = 1e-4,
    flat: float = 1e-6,
    name: str = "the weight",
) -> Subspace:
    """Compute the top singular triplets of W (O, I), on its device, by seeded block Krylov iteration.

    The space grows by blocks until the residual test bounds the largest principal sine by `tolerance`, or,
    for a flat spectrum, where angles mean little, the lost energy by `flat` after `DEEP` blocks. The exact
    solution replaces the iteration if min(O, I) < 2·ENOUGH·block, or if the bounds are not reached in half of
    the full space (see `Report.method`). Computes
    in fp32, or in float64 if W is float64; `Report.sine` includes the rounding of fp32. Where W lacks rank,
    s = 0 and the directions are arbitrary. `block` must be at least `rank` (default max(rank, 32)), so that
    no repeated singular value is missed.

    Raises `Refused`, with `name` in the message, for NaN or infinite values and for rank > min(O, I).
    """
    check_rank(weight, rank, name)
    block = max(rank, 32) if block is None else block
    if block < rank:
        raise ValueError(f"block {block} is narrower than rank {rank}")
    weight, (o, i) = weight.detach(), weight.shape
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    times = functools.partial(_times, weight, dtype)
    times_transposed = functools.partial(_times_transposed, weight, dtype)
    a, at = (
        (times_transposed, times) if o > i else (times, times_transposed)
    )  # A (short, long) is W, or Wᵀ when W is tall
    with full_precision(weight.device):
        generator = torch.Generator().manual_seed(seed)  # on the CPU: equal on every device
        start = a(torch.randn(max(o, i), block, generator=generator, dtype=dtype).to(weight.device))
        if not start.isfinite().all():  # a NaN or infinity in W always reaches this product
            raise Refused(
                f"{name} has NaN or infinite values; its file is damaged, use another copy of the file"
            )
        if not start.any():  # W = 0: directions are arbitrary
            x, report = torch.eye(min(o, i), rank), Report("exact", 0, 0.0, 0.0)
        elif min(o, i) < 2 * ENOUGH * block:
            x, report = _exact(weight, rank), Report("exact", 0, 0.0, 0.0)
        elif converged := _krylov(a, at, start, rank, generator, (tolerance, flat)):
            x, report = converged
        else:
            x, report = _exact(weight, rank), Report("fallback", 0, 0.0, 0.0)
        x, s, yh = _triplets(at, x.to(start))
    return Subspace(yh.mT.contiguous(), s, x.mT.contiguous(), report) if o > i else Subspace(x, s, yh, report)


def check_rank(weight: Tensor, rank: int, name: str) -> None:
    """Raise `Refused` unless W is a floating-point matrix and 1 <= rank <= min(O, I)."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise Refused(
            f"{name} is {weight.dtype} of shape {tuple(weight.shape)} and not a floating-point matrix; "
            "dequantise or flatten it first"
        )
    o, i = weight.shape
    if not 1 <= rank <= min(o, i):
        raise Refused(
            f"rank {rank} is not between 1 and min(out={o}, in={i}) of {name}; change --network_dim (--rank) "
            "or leave the layer out with --network_args exclude=…"
        )


def _row_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield row blocks of W in `dtype`, in one reused buffer; W itself if it already has this dtype."""
    if weight.dtype == dtype:
        yield slice(0, len(weight)), weight
        return
    rows = max(1, CHUNK // weight.shape[1])
    wide = weight.new_empty(min(rows, len(weight)), weight.shape[1], dtype=dtype)
    for start in range(0, len(weight), rows):
        block = weight[start : start + rows]
        yield slice(start, start + len(block)), wide[: len(block)].copy_(block)


def _times(weight: Tensor, dtype: torch.dtype, x: Tensor) -> Tensor:
    """Return W x (O, c)."""
    product = x.new_empty(weight.shape[0], x.shape[1])  # (O, c)
    for rows, w in _row_blocks(weight, dtype):
        torch.mm(w, x, out=product[rows])
    return product


def _times_transposed(weight: Tensor, dtype: torch.dtype, y: Tensor) -> Tensor:
    """Return Wᵀ y (I, c)."""
    product = y.new_zeros(weight.shape[1], y.shape[1])  # (I, c)
    for rows, w in _row_blocks(weight, dtype):
        product.addmm_(w.mT, y[rows])
    return product


def _krylov(
    a: Product, at: Product, start: Tensor, rank: int, generator: torch.Generator, goal: tuple[float, float]
) -> tuple[Tensor, Report] | None:
    """Return the Ritz basis (short, r) of G = A Aᵀ in span[Y, GY, G²Y, …], or None if both goals are missed.

    A (short, long) is W or Wᵀ and Y = `start` (short, b). `goal` is (sine, lost energy). The iteration stops
    without a result at k = short/2 columns. Only the basis Q (short, k) is stored; the products that extend Q
    also give M = QᵀGQ (k, k), whose eigenproblem is solved in float64.
    """
    short, block = start.shape
    limit, eps = short // 2, torch.finfo(start.dtype).eps
    scale = start.abs().max()  # about ‖W‖, keeps the entries of G in the range of fp32
    q = start.new_empty(limit, short)  # rows are the basis; the CPU allocates pages on first use
    m = torch.empty(limit, limit, dtype=torch.float64)  # lower triangle only, eigh reads no more
    x, _ = _orthonormal(start / scale, q[:0], generator)
    k, check = 0, FIRST_CHECK * block
    while (k := k + block) <= limit:
        q[k - block : k] = x.mT
        y = a(at(x) / scale) / scale  # G x                         (short, b)
        m[k - block : k, :k] = (q[:k] @ y).mT.cpu()  # xᵀG Q        (b, k)
        x, coupling = _orthonormal(y, q[:k], generator)
        if k < check:
            continue
        vectors, sine, loss, rounding = _ritz(m[:k, :k], coupling.cpu().double(), rank, eps)
        if sine <= goal[0] or (loss <= goal[1] and k >= DEEP * block):
            return q[:k].mT @ vectors.to(q), Report("krylov", k, min(1.0, sine + rounding), loss)
        check = _next_check(k, block, sine / goal[0] if sine < math.inf else loss / max(goal[1], 1e-30))
        if check > limit:
            break
    return None


def _next_check(k: int, block: int, excess: float) -> int:
    """Return the k of the next residual test; the last bound was `excess` times too large."""
    ahead = k + block * min(max(math.ceil(math.log10(max(excess, 1.0)) / DECADES), 1), 4)
    return min(ahead, DEEP * block) if k < DEEP * block else ahead


def _orthonormal(y: Tensor, q: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return X (n, b), orthonormal and orthogonal to the rows of q, and T (b, b) with y = qᵀq y + X T.

    Orthogonalises at least twice, because normalising magnifies the rounding errors along q. Columns whose
    remainder is only rounding (the space is invariant, or W lacks rank) are replaced by random columns, and
    their rows of T are 0.
    """
    floor = 8 * torch.finfo(y.dtype).eps * y.norm(dim=0)
    t = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
    for again in range(4):
        y, step = torch.linalg.qr(y - q.mT @ (q @ y))
        t = step @ t
        vanished = step.diagonal().abs() <= (0.5 if again else floor)  # two passes do, unless half is lost
        if vanished.any():
            fresh = torch.randn(len(y), int(vanished.sum()), generator=generator, dtype=y.dtype)
            y[:, vanished], t[vanished] = fresh.to(y.device) / math.sqrt(len(y)), 0
        elif again:
            break
    return y, t


def _ritz(m: Tensor, coupling: Tensor, rank: int, eps: float) -> tuple[Tensor, float, float, float]:
    """Return the top Ritz vectors (k, r) of M, bounds on the sine and lost energy, and the sine of rounding.

    G Q = Q M + X T Eᵀ, where E (k, b) is the last b columns of the identity. So a Ritz pair (λ, y) has the
    residual ‖T Eᵀy‖ (Eᵀy: the last b entries of y). The sine of direction i is at most residual_i /
    (λ_i − λ_{r+1} − residual_{r+1}).
    """
    values, vectors = torch.linalg.eigh(m)
    far = rank + rank // 2 + 2
    values, vectors = values[-far:].flip(0).clamp(min=0), vectors[:, -far:].flip(1)
    residual = (coupling @ vectors[-coupling.shape[1] :]).norm(dim=0)
    gap = values[:rank] - values[rank] - residual[rank]
    sine = (residual[:rank] / gap).norm().item() if gap[-1] > 0 else math.inf
    # energy is lost to directions outside the space, assumed to be below the last of these values
    reach = (values[:rank] - values[-1]).clamp(min=torch.finfo(m.dtype).tiny)
    leak = torch.minimum(residual[:rank], residual[:rank] ** 2 / reach).sum() / values[:rank].sum()
    # measured for σ_i = i^-p, p from 0.25 to 2, rank 1 to 64: rounding is at most this angle, often half
    sigma = values[: rank + 1].sqrt()
    rounding = eps * (40 + 0.1 * sigma[0] / (sigma[-2] - sigma[-1]).clamp(min=1e-30))
    return vectors[:, :rank], sine, leak.item(), rounding.item()


def _exact(weight: Tensor, rank: int) -> Tensor:
    """Return the top eigenvectors (short, r) of the smaller of WWᵀ and WᵀW, in float64."""
    o, i = weight.shape
    gram = torch.zeros(min(o, i), min(o, i), dtype=torch.float64, device=weight.device)
    for _, w in _row_blocks(weight if o > i else weight.mT, torch.float64):
        gram.addmm_(w.mT, w)
    return torch.linalg.eigh(gram)[1].flip(1)[:, :rank]


def _triplets(at: Product, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD of x xᵀA: left (short, r), s (r,), right (long, r), orthonormal also where s = 0."""
    y, t = torch.linalg.qr(at(x))  # Aᵀx = y t                      (long, r), (r, r)
    p, s, qh = torch.linalg.svd(t.double())
    return x @ qh.mT.to(x), s.to(x), (y @ p.to(x)).mT.contiguous()


def thin_qr(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """Return the QR factors of the core u diag(s) vh: Q (O, r), R (r, I) upper trapezoidal, diag(R) > 0.

    Only an r × r matrix is factored: the first r columns of diag(s) vh give the rotation from u to Q, up to
    signs, which diag(R) > 0 fixes. The result depends on the core alone, not on signs or order in u and vh.
    If these columns are dependent (dead inputs), later independent columns replace them: R is then an echelon
    form with zeros on its diagonal. If the rank of the core is below r, the last rows of R are zero. Q always
    spans u.
    """
    core = s.double()[:, None] * vh.double()  # (r, I)
    rank, i = core.shape
    floor = 4 * torch.finfo(torch.float32).eps * s.max().item() / math.sqrt(i)  # rounding of a column in fp32
    pivots = torch.arange(rank, device=core.device)
    o, lead = torch.linalg.qr(core[:, :rank])  # (r, r)
    if lead.diagonal().abs().min() <= floor:
        pivots = _pivots(core, floor)
        o, lead = torch.linalg.qr(torch.cat([core[:, pivots], torch.eye(rank).to(core)], dim=1))
    o = o * torch.where(lead.diagonal() < 0, -1.0, 1.0).to(core)
    first = torch.full((rank, 1), i, device=core.device)  # each row starts at its pivot
    first[: len(pivots), 0] = pivots
    r = (o.mT @ core).masked_fill(torch.arange(i, device=core.device) < first, 0)
    return u @ o.to(u), r.to(u)


def _pivots(core: Tensor, floor: float) -> Tensor:
    """Return the first columns (at most r) of core (r, I) that are over `floor` away from earlier ones."""
    residual, pivots = core.clone(), []
    while len(pivots) < len(core) and (independent := (residual.norm(dim=0) > floor).nonzero()).numel():
        pivots.append(int(independent[0]))
        v = torch.nn.functional.normalize(residual[:, pivots[-1]], dim=0)
        residual -= torch.outer(v, v @ residual)
    return torch.tensor(pivots, dtype=torch.long, device=core.device)
