"""Bases from training data: the directions of the first gradients, or of inputs and gradients, of each layer.

    grad      L, R = top singular vectors of G = Σ ∂ℓ/∂W = Σ g xᵀ over samples and tokens
    actgrad   L, R = top eigenvectors of Σ g gᵀ and of Σ x xᵀ

x is a layer's input and g the gradient at its output. This takes one pass over the data and no tensor of a
weight's size. For grad, two products of G (O, I) with random test matrices are summed instead of G: Y = GΩ
(O, k) and Z = ΨG (l, I). For actgrad, each covariance has a product with one test matrix. Inputs of a k×k
convolution are unfolded, so I is C·k·k.

Sources: LoRA-GA, arXiv 2407.05000 (singular vectors of the first gradient as factors). Tropp, Yurtsever,
Udell and Cevher, arXiv 1609.00048 (Y and Z, with k = 2K + 1 and l = 2k + 1) and 1706.05736 (a covariance).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.adapters.layer import AdaptedLayer
from lowrank.adapters.method import Warmup, WarmupBatches
from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.targets import Layer, host_shape
from lowrank.bases.krylov import full_precision
from lowrank.errors import Refused, nearest

KINDS = ("grad", "actgrad")
START_SCALE, LEAST_SCALE = 2.0**16, 2.0**-8  # loss scale under fp16: first value as in torch; lower limit

logger = logging.getLogger(__name__)


class Sides(NamedTuple):
    """Output directions (left) and input directions (right) of a layer, most important first."""

    left: Tensor  # (O, K) orthonormal columns
    right: Tensor  # (K, I·k·k) orthonormal rows


# ------------------------------------------------------------------ mathematics


def widths(outs: int, ins: int, rank: int) -> tuple[int, int]:
    """Return (k, l), the columns of Ω and rows of Ψ needed for `rank` directions of an O × I matrix."""
    k = min(2 * rank + 1, outs, ins)
    return k, min(2 * k + 1, outs)


def gradient_products(x: Tensor, g: Tensor, omega: Tensor, psi_t: Tensor) -> tuple[Tensor, Tensor]:
    """Return Y = GΩ (O, k), Z = ΨG (l, I) for G = gᵀx: x (N, I), g (N, O), Ω (I, k), Ψᵀ (O, l)."""
    return g.T @ (x @ omega), (g @ psi_t).T @ x


def gradient_sides(Y: Tensor, Z: Tensor, psi_t: Tensor, rank: int) -> Sides:
    """Return the top `rank` singular vectors of G, given Y = GΩ, Z = ΨG and Ψᵀ (O, l); in float64."""
    Q = torch.linalg.qr(Y.double())[0]  # (O, k)
    U, T = torch.linalg.qr(psi_t.double().T @ Q)  # (l, k), (k, k): ΨQ
    core = torch.linalg.solve_triangular(T, U.T @ Z.double(), upper=True)  # (k, I), where G ≈ Q·core
    u, _, vh = torch.linalg.svd(core, full_matrices=False)
    return Sides((Q @ u[:, :rank]).float(), vh[:rank].float().contiguous())


def covariance_products(x: Tensor, g: Tensor, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Return gᵀgΩ' (O, l) and xᵀxΩ (I, k); x (N, I), g (N, O), Ω = right (I, k), Ω' = left (O, l)."""
    return g.T @ (g @ left), x.T @ (x @ right)


def covariance_vectors(product: Tensor, test: Tensor, rank: int) -> Tensor:
    """Return the top `rank` eigenvectors (n, K) of A ⪰ 0, given A·test (n, k): Nyström, in float64."""
    product, test = product.double(), test.double()
    shift = product.norm() * torch.finfo(torch.float32).eps  # rounding of sums in fp32
    shifted = product + shift * test
    gram = test.T @ shifted
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    root = vectors * values.clamp_min(values[-1] * torch.finfo(torch.float64).eps).rsqrt()  # (k, k)
    return torch.linalg.svd(shifted @ root, full_matrices=False)[0][:, :rank].float()


def tokens(host: Layer, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's inputs (N, I·k·k) and output gradients (N, O), fp32, one row per token or pixel."""
    if isinstance(host, nn.Conv2d):
        if isinstance(host.padding, str):
            raise Refused(
                f"a convolution with padding={host.padding!r} has no gradient basis; leave it out with "
                "--network_args exclude=…"
            )
        x = F.unfold(
            x.float(), host.kernel_size, dilation=host.dilation, padding=host.padding, stride=host.stride
        )  # (B, I·k·k, pixels)
        return x.transpose(1, 2).flatten(0, 1), g.float().flatten(2).transpose(1, 2).flatten(0, 1)
    return x.float().flatten(0, -2), g.float().flatten(0, -2)


# ------------------------------------------------------------------ hooks on the backward pass


class _Tap(torch.autograd.Function):
    """The identity; its backward calls `see(x, g)` with the layer's input and its output's gradient.

    The input is saved with `save_for_backward`, so that gradient checkpointing recomputes it.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, see: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.see = see
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.see(*ctx.saved_tensors, gradients[0])
        return gradients[0], None, None


def _added(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """Add two lists of tensors elementwise; an empty list counts as zeros."""
    return [a + b for a, b in zip(first, second, strict=True)] if first and second else first or second


@dataclass
class _Sketch:
    """Sums of one layer's products; `pending` are those of the current batch, until checked to be finite."""

    layer: AdaptedLayer
    rank: int
    kind: str
    right: Tensor
    left: Tensor
    sums: list[Tensor] = field(default_factory=list)
    pending: list[Tensor] = field(default_factory=list)

    def see(self, scale: float, x: Tensor, g: Tensor) -> None:
        with full_precision(g.device):
            rows = tokens(self.layer.host, x, g.float() / scale)
            products = gradient_products if self.kind == "grad" else covariance_products
            self.pending = _added(self.pending, list(products(*rows, self.right, self.left)))

    def keep(self) -> None:
        self.sums, self.pending = _added(self.sums, self.pending), []

    def sides(self, total: Callable[[Tensor], Tensor]) -> tuple[Sides, bool]:
        """Return the basis, and whether a gradient reached the layer; without a gradient it is random."""
        k, n = self.right.shape[1], self.left.shape
        shapes = ((n[0], k), (n[1], len(self.right))) if self.kind == "grad" else (n, self.right.shape)
        sums = self.sums or [torch.zeros(shape, device=self.right.device) for shape in shapes]
        first, second = (total(part) for part in sums)
        with full_precision(first.device):
            if not first.any() or not second.any():
                left, right = self.left[:, : self.rank], self.right[:, : self.rank]
                return Sides(left.contiguous(), right.T.contiguous()), False
            if self.kind == "grad":
                return gradient_sides(first, second, self.left, self.rank), True
            left = covariance_vectors(first, self.left, self.rank)
            right = covariance_vectors(second, self.right, self.rank)
            return Sides(left, right.T.contiguous()), True


@contextlib.contextmanager
def _tapped(sketches: list[_Sketch], scale: Callable[[], float]) -> Iterator[None]:
    """Within the block, add the products of every backward pass to the sketches."""

    def hook(sketch: _Sketch, _module: Any, arguments: tuple, y: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        y = y if y.requires_grad else y.detach().requires_grad_()
        return _Tap.apply(y, arguments[0].detach(), lambda x, g: sketch.see(scale(), x, g))

    handles = [sketch.layer.host.register_forward_hook(partial(hook, sketch)) for sketch in sketches]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _test(side: str, rows: int, columns: int) -> Tensor:
    """Return a test matrix (rows, columns), random orthonormal, seeded by `side` and its shape.

    So it is equal in every process and run.
    """
    seed = int.from_bytes(hashlib.sha256(f"{side},{rows},{columns}".encode()).digest()[:7], "big")
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))[0]


def _sketches(network: AdapterNetwork, kind: str, rank: Callable[[AdaptedLayer], int]) -> list[_Sketch]:
    tests: dict[tuple, Tensor] = {}  # layers of one size share test matrices
    sketches = []
    for layer in network.layers():
        outs, ins = host_shape(layer.host)
        K, device = rank(layer), layer.alpha.device
        if not 1 <= K <= min(outs, ins):
            raise Refused(
                f"rank {K} exceeds min(out={outs}, in={ins}) of {layer.name}; lower --network_dim, or leave "
                "the layer out with --network_args exclude=…"
            )
        k, lefts = widths(outs, ins, K)
        right, left = ("right", ins, k, device), ("left", outs, lefts, device)
        for key in (right, left):
            if key not in tests:
                tests[key] = _test(*key[:3]).to(device)
        sketches.append(_Sketch(layer, K, kind, tests[right], tests[left]))
    return sketches


# ------------------------------------------------------------------ the warm-up stage


def gradient_basis(
    network: AdapterNetwork,
    samples: WarmupBatches,
    count: int,
    kind: str = "grad",
    rank: Callable[[AdaptedLayer], int] = lambda layer: layer.rank,
) -> dict[str, Sides]:
    """Compute the basis of every layer, by name, from `count` samples; a short data set is repeated.

    `rank(layer)` is the number of directions K. Extra memory is about 4·K·(O + I) fp32 numbers per layer. A
    layer that no gradient reaches (CLIP's last under clip_skip) gets a random basis, with a warning. Raises
    `Refused` for a K above min(O, I), and for gradients that are not finite.
    """
    _check_kind(kind)
    sketches, scale = _sketches(network, kind, rank), START_SCALE if samples.scaled else 1.0
    used = 0
    bar = tqdm(total=count, desc=f"basis ({kind})", dynamic_ncols=True, disable=not samples.progress)
    with bar, _tapped(sketches, lambda: scale):
        for step, losses in enumerate(samples.batches()):
            batch, mean = _backward(network, losses, scale)
            while not _finite(sketches, samples):
                scale /= 2
                if not samples.scaled or scale < LEAST_SCALE:
                    raise Refused(
                        f"the gradient of batch {step + 1} of the warm-up is not finite; check for a damaged "
                        "image or base model, or use --mixed_precision bf16"
                    )
                batch, mean = _backward(network, losses, scale)
            for sketch in sketches:
                sketch.keep()
            global_batch = batch * samples.processes
            used += global_batch
            bar.update(min(global_batch, count - bar.n))
            samples.log({"basis/loss": mean}, step + 1)
            if used >= count:
                break
    bases = {sketch.layer.name: sketch.sides(samples.total) for sketch in sketches}
    unreached = [name for name, (_, reached) in bases.items() if not reached]
    if unreached:
        logger.warning(
            "no gradient reached %d of %d layers, for example %s: their basis is random",
            *(len(unreached), len(bases), unreached[0]),
        )
    return {name: sides for name, (sides, _) in bases.items()}


def _backward(network: AdapterNetwork, losses: Callable[[], Tensor], scale: float) -> tuple[int, float]:
    """Run the backward pass of a batch's summed losses, clear the gradients, return (samples, mean loss)."""
    value = losses()  # (B,)
    (value.sum() * scale).backward()
    network.zero_grad(set_to_none=True)
    return len(value), value.detach().float().mean().item()


def _finite(sketches: list[_Sketch], samples: WarmupBatches) -> bool:
    """Return whether the pending products are finite in every process; if not, drop them in all."""
    pending = [part.sum() for sketch in sketches for part in sketch.pending]
    device = sketches[0].right.device
    bad = torch.stack(pending).isfinite().logical_not().sum() if pending else torch.zeros((), device=device)
    if not samples.total(bad.float()).any():
        return True
    for sketch in sketches:
        sketch.pending = []
    return False


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise Refused(f"basis {kind!r} is not one of {', '.join(KINDS)}{nearest(kind, KINDS)}")


def basis_stage(
    kind: str,
    samples: int,
    assign: Callable[[AdaptedLayer, Tensor, Tensor], None],
    rank: Callable[[AdaptedLayer], int] = lambda layer: layer.rank,
) -> Warmup:
    """Return the warm-up stage that computes the `kind` basis of each layer from `samples` samples.

    `assign(layer, L, R)` stores L (O, K) and R (K, I·k·k), in fp32 on the layer's device; ΔW must stay 0.
    Raises `Refused` for an unknown kind and for less than one sample.
    """
    _check_kind(kind)
    if samples < 1:
        raise Refused(f"basis_samples={samples} gives no gradient; give 1 or more")

    def run(network: AdapterNetwork, batches: WarmupBatches) -> None:
        bases = gradient_basis(network, batches, samples, kind, rank)
        with torch.no_grad():
            for layer in network.layers():
                assign(layer, *bases[layer.name])

    return Warmup(f"basis {kind} from {samples} samples", run)
