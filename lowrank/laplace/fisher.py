"""Measure S = E[x xᵀ] and G = E[g gᵀ] of layers while the base model predicts on source data.

Hooks on the layers read x in the forward and g = ∂qₙ/∂y in the backward, where qₙ is one number of a sample
(`gauss_newton_draw`). The numbers of a batch are summed, and none depends on another sample: the result does
not depend on the batch size or the scale of the backward, and on autocast only by its rounding. Weights need
no gradient: if an output has no graph, a new one starts there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters.penalty import Spectrum
from lowrank.adapters.targets import Layer, Target, host_shape
from lowrank.errors import Refused
from lowrank.laplace.context_file import Context, Curvature, weight_fingerprint

OVERSAMPLED = 2  # columns of a sketch per eigenpair that is kept
LEAST_SPARE = 8  # at least this many more columns than eigenpairs


class Moment:
    """The sum M = Σ w·x xᵀ over rows x (N,): full, sketched with its diagonal, or diagonal.

    A sketch is Y = M Ω for a fixed random Ω (N, L) (Nyström; Tropp et al., arXiv 1706.05736): linear in M, so
    that order and batch size do not matter, and exact if M has rank L or less.
    """

    def __init__(self, size: int, kind: str, rank: int, seed: int, device: torch.device | str) -> None:
        width = rank + max(LEAST_SPARE, (OVERSAMPLED - 1) * rank)
        self._rank, self._whole = rank, None
        self._omega = self._sketch = self._diagonal = None
        if kind == "full" or (kind == "low" and size <= 2 * width):  # the full sum costs no more
            self._whole = torch.zeros(size, size, device=device)
            self._rank = size if kind == "full" else min(rank, size)
        else:
            self._diagonal = torch.zeros(size, device=device)
        if kind == "low" and self._whole is None:
            generator = torch.Generator().manual_seed(seed)
            self._omega = torch.linalg.qr(torch.randn(size, width, generator=generator))[0].to(device)
            self._sketch = torch.zeros(size, width, device=device)
        self._keeps_diagonal = kind != "full"

    def add(self, rows: Tensor, weight: float) -> None:
        """Add rows (T, N) of any dtype with one weight; the sum is in fp32."""
        rows = rows.float()
        if self._whole is not None:
            self._whole.addmm_(rows.T, rows, alpha=weight)
        if self._diagonal is not None:
            self._diagonal.add_(rows.square().sum(0), alpha=weight)
        if self._sketch is not None and self._omega is not None:
            self._sketch.addmm_(rows.T, rows @ self._omega, alpha=weight)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the sum consists of."""
        return tuple(part for part in (self._whole, self._diagonal, self._sketch) if part is not None)

    def spectrum(self, count: float) -> Spectrum:
        """Return the sum divided by `count`, as eigenpairs and the diagonal of the remainder, on the CPU."""
        whole, diagonal, sketch = (
            None if part is None else part.cpu().double() / count
            for part in (self._whole, self._diagonal, self._sketch)
        )
        if whole is not None:
            values, vectors = torch.linalg.eigh(whole)
            values, vectors, diagonal = values.flip(0), vectors.flip(1), torch.diagonal(whole)
        elif sketch is not None and self._omega is not None:
            values, vectors = nystrom(sketch, self._omega.cpu().double())
        else:
            assert diagonal is not None
            return Spectrum(None, None, diagonal.float())
        values, vectors = values[: self._rank].clamp_min(0), vectors[:, : self._rank]
        remainder = None
        if self._keeps_diagonal and diagonal is not None:
            remainder = (diagonal - vectors.square() @ values).clamp_min(0).float()
        return Spectrum(vectors.float().contiguous(), values.float(), remainder)


def nystrom(sketch: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (L,), descending, and eigenvectors (N, L) of M ≈ Y (ΩᵀY)⁻¹ Yᵀ, given Y = M Ω (N, L).

    As in arXiv 1706.05736, algorithm 3, a multiple of the identity, as large as the fp32 rounding of Y, is
    added before and subtracted after.
    """
    shift = float(torch.linalg.matrix_norm(sketch)) * torch.finfo(torch.float32).eps * len(sketch) ** 0.5
    Y = sketch + shift * omega  # (N, L)
    core = omega.T @ Y  # (L, L)
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    B = Y @ vectors * values.clamp_min(max(shift, 1e-300)).rsqrt()  # Y (ΩᵀY)⁻¹ Yᵀ = B Bᵀ
    vectors, singular, _ = torch.linalg.svd(B, full_matrices=False)
    return singular.square() - shift, vectors


def inputs_of(host: Layer, x: Tensor) -> Tensor:
    """Return the rows (T, I·k·k) that a layer multiplies with its weight, one per token or output pixel."""
    if not isinstance(host, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    if host.kernel_size == (1, 1) and host.stride == (1, 1) and host.padding in ((0, 0), "valid"):
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    if isinstance(host.padding, str) or host.padding_mode != "zeros":
        raise Refused(
            f"a convolution with padding {host.padding!r} ({host.padding_mode}) cannot be measured; leave it "
            "out with --exclude"
        )
    # (B, I·k·k, positions)
    columns = F.unfold(x.float(), host.kernel_size, host.dilation, host.padding, host.stride)
    return columns.movedim(1, -1).reshape(-1, columns.shape[1])


def gradients_of(host: Layer, g: Tensor) -> Tensor:
    """Return the gradient of a layer's output as rows (T, O)."""
    g = g.movedim(1, -1) if isinstance(host, nn.Conv2d) else g
    return g.reshape(-1, g.shape[-1])


def gauss_newton_draw(losses: Callable[[Tensor], Tensor], prediction: Tensor, signs: Tensor) -> Tensor:
    """Return q (B,): q_n = Σ_i √h_i·η_i·f_i for the prediction f (B, …), random signs η, and h = ∂²ℓ_n/∂f².

    Over the signs, E[∇q ∇qᵀ] = Jᵀ diag(h) J, J = ∂f/∂θ: the Gauss–Newton matrix of ℓ_n, which does not depend
    on the residual (arXiv 1412.1193, §6). `losses` (B,) must be a sum over the elements of f, so that its
    second derivative is diagonal; for a mean of squares over N elements h is 2/N.
    """
    leaf = prediction.detach().float().requires_grad_()
    with torch.enable_grad():
        (first,) = torch.autograd.grad(losses(leaf).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first * signs).sum(), leaf)  # h ⊙ η
    return ((second * signs).clamp_min(0).sqrt() * signs * prediction).flatten(1).sum(1)


class Fisher:
    """Sums of S and G of layers over samples; hooks are attached only inside `with fisher.watching():`."""

    def __init__(
        self, targets: Sequence[Target], curvature: str, rank: int, seed: int, device: torch.device | str
    ) -> None:
        self._curvature, self._targets, self.samples = curvature, list(targets), 0
        kinds = {"kfac": ("full", "full"), "kfac_lr": ("low", "low"), "lora_diag": ("low", "diagonal")}
        S, G = kinds.get(curvature, ("diagonal", "diagonal"))
        self._moments: dict[str, tuple[Moment, Moment]] = {}
        for target in targets:
            if isinstance(target.module, nn.Conv2d) and target.module.groups != 1:
                raise Refused(
                    f"{target.name} is a grouped convolution (groups={target.module.groups}), which no "
                    "adapter supports; leave it out with --exclude"
                )
            outs, ins = host_shape(target.module)
            self._moments[target.name] = (
                Moment(ins, S, rank, seed, device),
                Moment(outs, G, rank, seed + 1, device),
            )
        self._counting, self._scale = 0, 1.0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Attach the hooks to all layers within a block."""
        handles = [t.module.register_forward_hook(partial(self._forward, t)) for t in self._targets]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, samples: int, draws: Callable[[], Tensor], scale: float = 1.0) -> None:
        """Add a batch.

        `draws()` runs the model and returns q (B,), one number of each sample; `scale` multiplies them in the
        backward and is divided out. Raises `Refused` for a number that is not finite.
        """
        self._counting, self._scale = samples, scale
        with torch.enable_grad():
            try:
                values = draws()
            finally:
                self._counting = 0  # gradient checkpointing runs the forward again in the backward
            (values.sum() * scale).backward()
        self.samples += samples
        if not torch.isfinite(values).all():
            raise Refused(
                "the prediction of the base model is not finite; use --mixed_precision bf16 or --no_half_vae"
            )

    def _forward(self, target: Target, _module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        if self._counting:
            S, G = self._moments[target.name]
            with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                rows = inputs_of(target.module, inputs[0])
                S.add(rows, self._counting / len(rows))
            output.register_hook(partial(self._backward, target.module, G, 1 / self._scale**2))
        return output

    @staticmethod
    def _backward(host: Layer, G: Moment, weight: float, g: Tensor) -> None:
        with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
            G.add(gradients_of(host, g), weight)

    def context(self, metadata: dict[str, str]) -> Context:
        """Return what was measured. Raises `Refused` if a gradient overflowed."""
        for name, pair in self._moments.items():
            if not all(torch.isfinite(part).all() for moment in pair for part in moment.tensors):
                raise Refused(
                    f"the curvature of {name} is not finite: its gradients overflow in half precision; use "
                    "--mixed_precision bf16 or no"
                )
        layers = {
            name: Curvature(*(moment.spectrum(self.samples) for moment in pair))
            for name, pair in self._moments.items()
        }
        probes = {target.name: weight_fingerprint(target.module) for target in self._targets}
        return Context(self._curvature, layers, probes, metadata)
