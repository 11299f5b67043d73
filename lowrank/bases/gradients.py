"""Bases from the data to come: the directions in which the first gradients, or activations, of a layer lie.

    grad      L, R = top singular vectors of G = Σ ∂ℓ/∂W = Σ g xᵀ over samples and tokens
    actgrad   L, R = top eigenvectors of Σ g gᵀ and of Σ x xᵀ

x is a layer's input and g the gradient at its output. One pass, and nothing of a weight's size: G (O, I) is
never formed but seen through random test matrices, as Y = GΩ (O, k) and Z = ΨG (l, I); a covariance as its
product with one. Inputs of a k×k convolution are unfolded, so that I counts C·k·k.

Sources: LoRA-GA, arXiv 2407.05000 (the first gradient's singular vectors as factors). Tropp, Yurtsever, Udell
and Cevher, arXiv 1609.00048 (Y and Z, with k = 2K + 1 and l = 2k + 1) and 1706.05736 (a covariance).
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
START_SCALE, LEAST_SCALE = 2.0**16, 2.0**-8  # of the loss under fp16: torch's first one; where to give up

logger = logging.getLogger(__name__)


class Sides(NamedTuple):
    """Where a layer writes to and reads from, the most important direction first."""

    left: Tensor  # (O, K) orthonormal columns
    right: Tensor  # (K, I·k·k) orthonormal rows


# ------------------------------------------------------------------ mathematics


def widths(outs: int, ins: int, rank: int) -> tuple[int, int]:
    """(k, l): how many columns of Ω and rows of Ψ find `rank` directions of an O × I matrix."""
    k = min(2 * rank + 1, outs, ins)
    return k, min(2 * k + 1, outs)


def gradient_products(x: Tensor, g: Tensor, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Y = GΩ (O, k) and Z = ΨG (l, I) of G = gᵀx: x (N, I), g (N, O), Ω = right (I, k), Ψᵀ = left (O, l)."""
    return g.T @ (x @ right), (g @ left).T @ x


def gradient_sides(Y: Tensor, Z: Tensor, left: Tensor, rank: int) -> Sides:
    """The top `rank` singular vectors of the G that was seen as Y and Z; float64 inside."""
    Q = torch.linalg.qr(Y.double())[0]  # (O, k)
    U, T = torch.linalg.qr(left.double().T @ Q)  # (l, k), (k, k): ΨQ
    core = torch.linalg.solve_triangular(T, U.T @ Z.double(), upper=True)  # (k, I), where G ≈ Q·core
    u, _, vh = torch.linalg.svd(core, full_matrices=False)
    return Sides((Q @ u[:, :rank]).float(), vh[:rank].float().contiguous())


def covariance_products(x: Tensor, g: Tensor, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """gᵀgΩ' (O, l) and xᵀxΩ (I, k); x (N, I), g (N, O), Ω = right (I, k), Ω' = left (O, l)."""
    return g.T @ (g @ left), x.T @ (x @ right)


def covariance_vectors(product: Tensor, test: Tensor, rank: int) -> Tensor:
    """Top `rank` eigenvectors (n, K) of A ⪰ 0, of which A·test (n, k) is known: Nyström, in float64."""
    product, test = product.double(), test.double()
    shift = product.norm() * torch.finfo(torch.float32).eps  # the rounding of what was added up in fp32
    shifted = product + shift * test
    gram = test.T @ shifted
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    root = vectors * values.clamp_min(values[-1] * torch.finfo(torch.float64).eps).rsqrt()  # (k, k)
    return torch.linalg.svd(shifted @ root, full_matrices=False)[0][:, :rank].float()


def tokens(host: Layer, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (N, I·k·k) and output gradients (N, O) of a layer, one row per place, in fp32."""
    if isinstance(host, nn.Conv2d):
        if isinstance(host.padding, str):
            raise Refused(f"a convolution with padding={host.padding!r} has no basis of its data; exclude it")
        x = F.unfold(
            x.float(), host.kernel_size, dilation=host.dilation, padding=host.padding, stride=host.stride
        )  # (B, I·k·k, places)
        return x.transpose(1, 2).flatten(0, 1), g.float().flatten(2).transpose(1, 2).flatten(0, 1)
    return x.float().flatten(0, -2), g.float().flatten(0, -2)


# ------------------------------------------------------------------ what a backward pass shows


class _Tap(torch.autograd.Function):
    """The identity; in the backward, the output's gradient meets the layer's input.

    The input is saved as autograd's own are, so that gradient checkpointing recomputes it.
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


def _added(one: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    """The sum of two lists of equal shapes, of which either may still be empty."""
    return [a + b for a, b in zip(one, other, strict=True)] if one and other else one or other


@dataclass
class _Sketch:
    """Sums of one layer's products, and those of the batch that is not yet known to be finite."""

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
            made = (gradient_products if self.kind == "grad" else covariance_products)(
                *rows, self.right, self.left
            )
            self.pending = _added(self.pending, list(made))

    def keep(self) -> None:
        self.sums, self.pending = _added(self.sums, self.pending), []

    def sides(self, total: Callable[[Tensor], Tensor]) -> tuple[Sides, bool]:
        """The basis, and whether any gradient was seen; without one it is random."""
        k, n = self.right.shape[1], self.left.shape
        shapes = ((n[0], k), (n[1], len(self.right))) if self.kind == "grad" else (n, self.right.shape)
        sums = self.sums or [torch.zeros(shape, device=self.right.device) for shape in shapes]
        first, second = (total(one) for one in sums)
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
    """While it lasts, every backward pass adds what it shows to the sketches."""

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
    """Random orthonormal columns that depend on their shape alone: every process and run has the same."""
    seed = int.from_bytes(hashlib.sha256(f"{side},{rows},{columns}".encode()).digest()[:7], "big")
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))[0]


def _sketches(network: AdapterNetwork, kind: str, rank: Callable[[AdaptedLayer], int]) -> list[_Sketch]:
    tests: dict[tuple, Tensor] = {}  # layers of one size share theirs
    made = []
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
        made.append(_Sketch(layer, K, kind, tests[right], tests[left]))
    return made


# ------------------------------------------------------------------ the stage


def gradient_basis(
    network: AdapterNetwork,
    samples: WarmupBatches,
    count: int,
    kind: str = "grad",
    rank: Callable[[AdaptedLayer], int] = lambda layer: layer.rank,
) -> dict[str, Sides]:
    """The basis of every layer by name, from `count` samples; the data is gone through again if it is short.

    `rank` says how many directions K a layer needs. Extra memory is about 4·K·(O + I) fp32 numbers a layer.
    A layer that no gradient reaches (CLIP's last under clip_skip) gets a random basis, which is said. Raises
    `Refused` for a K above min(O, I), and for gradients that are not finite.
    """
    _check_kind(kind)
    sketches, scale = _sketches(network, kind, rank), START_SCALE if samples.scaled else 1.0
    seen = 0
    bar = tqdm(total=count, desc=f"basis ({kind})", dynamic_ncols=True, disable=not samples.progress)
    with bar, _tapped(sketches, lambda: scale):
        for step, losses in enumerate(samples.batches()):
            batch, mean = _backward(network, losses, scale)
            while not _finite(sketches, samples):
                scale /= 2
                if not samples.scaled or scale < LEAST_SCALE:
                    raise Refused(
                        f"the gradient of batch {step + 1} of the warm-up is not finite; look for a damaged "
                        "picture or base model, or use --mixed_precision bf16"
                    )
                batch, mean = _backward(network, losses, scale)
            for sketch in sketches:
                sketch.keep()
            here = batch * samples.processes
            seen += here
            bar.update(min(here, count - bar.n))
            samples.log({"basis/loss": mean}, step + 1)
            if seen >= count:
                break
    found = {sketch.layer.name: sketch.sides(samples.total) for sketch in sketches}
    unseen = [name for name, (_, reached) in found.items() if not reached]
    if unseen:
        logger.warning(
            "no gradient reached %d of %d layers, for example %s: their basis is random",
            *(len(unseen), len(found), unseen[0]),
        )
    return {name: sides for name, (sides, _) in found.items()}


def _backward(network: AdapterNetwork, losses: Callable[[], Tensor], scale: float) -> tuple[int, float]:
    """Backward of a batch's summed losses; (samples, their mean loss). No gradient is left behind."""
    value = losses()  # (B,)
    (value.sum() * scale).backward()
    network.zero_grad(set_to_none=True)
    return len(value), value.detach().float().mean().item()


def _finite(sketches: list[_Sketch], samples: WarmupBatches) -> bool:
    """Whether all that a batch added is finite, in every process; what is not is dropped."""
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
    """The warm-up stage that finds the `kind` basis from so many samples and hands each layer its own.

    `assign(layer, L, R)` gets L (O, K) and R (K, I·k·k) on the layer's device in fp32, and must leave ΔW 0.
    Raises `Refused` for an unknown kind and for less than one sample.
    """
    _check_kind(kind)
    if samples < 1:
        raise Refused(f"basis_samples={samples} gives no gradient; give 1 or more")

    def run(network: AdapterNetwork, given: WarmupBatches) -> None:
        bases = gradient_basis(network, given, samples, kind, rank)
        with torch.no_grad():
            for layer in network.layers():
                assign(layer, *bases[layer.name])

    return Warmup(f"basis {kind} from {samples} samples", run)
