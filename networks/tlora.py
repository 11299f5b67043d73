"""T-LoRA: open fewer ranks at noisier timesteps, against overfitting to few images (arXiv 2507.05964).

    y = W x + s·U·M(t)·D x                                   plain: LoRA with a rank mask ("vanilla")
    y = W x + s·(P·Λ·M(t)·Q − P₀·Λ₀·M(t)·Q₀) x               orthogonal: the initial value is subtracted

M(t) keeps the first r(t) = ⌊((T − t)/T)^α (R − R_min)⌋ + R_min of R ranks (eq. 3, 6), T = 1000; each sample
of a batch has its own t. P₀ (O×R), Λ₀ (R) and Q₀ (R×I) are R singular components, in descending order, of a
random matrix with entries of standard deviation 1/R, or of W: the last, the middle or the principal ones. As
in the paper, P and Q are orthogonal at the start and not constrained later. Defaults are those of the paper:
the last components of a random matrix, R_min = R/2, s = 1.

Differences from the authors' code: it uses one t for a whole batch, and computes the SVD of a random matrix
for each layer. We draw P, Λ and Q directly, with equal distribution. P and Q come from QR of thin Gaussian
matrices. Λ comes from a bidiagonal matrix with χ-distributed entries (Silverstein 1985), drawn once for each
layer shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lowrank.adapters.gate import Schedule
from lowrank.adapters.method import LORA_FACTOR, Chain, Factor, Gate, Method, Start, structural
from lowrank.adapters.network_module import bind
from lowrank.bases.qr_basis import basis_hash
from lowrank.bases.singular import PARTS, component_slice, singular_components
from lowrank.errors import Refused, nearest


@dataclass(frozen=True)
class Options:
    tlora_min_rank: int | None = structural(None)
    """number of ranks open at pure noise (default: half of --network_dim)"""
    tlora_alpha: float = structural(1.0)
    """exponent of the rank schedule; 1 is linear, above 1 opens ranks later in sampling, below 1 earlier"""
    orthogonal: bool = structural(True)
    """True: train P·Λ·Q minus its initial value; False: LoRA with a rank mask, as the paper does on FLUX"""
    sig_type: str = structural("last")
    """singular components that orthogonal=True starts from: principal, middle or last"""
    use_data_init: bool = structural(False)
    """take the initial singular components from the layer's weight instead of a random matrix"""

    def __post_init__(self) -> None:
        if self.sig_type not in PARTS:
            raise Refused(
                f"sig_type {self.sig_type!r} is not one of {', '.join(PARTS)}{nearest(self.sig_type, PARTS)}"
            )
        if self.tlora_min_rank is not None and self.tlora_min_rank < 1:
            raise Refused(f"tlora_min_rank {self.tlora_min_rank} is below 1; give 1 or more")
        if not self.tlora_alpha > 0:
            raise Refused(
                f"tlora_alpha {self.tlora_alpha:g} is not above 0; give 1.0 for the linear schedule"
            )


def singular_values(outs: int, ins: int, std: float) -> Tensor:
    """Draw the singular values (min(O, I),) of a random O × I matrix N(0, std²), descending, in float64."""
    short, long = sorted((outs, ins))
    freedoms = torch.arange(long, 0, -1, dtype=torch.float64)
    chi = (
        torch.distributions.Chi2(torch.cat([freedoms[:short], freedoms[long - short + 1 :]])).sample().sqrt()
    )
    B = chi[:short].diag() + chi[short:].diag(-1)  # bidiagonal, (short, short)
    return std * torch.linalg.eigvalsh(B @ B.T).flip(0).clamp(min=0).sqrt()


def uniform_frame(rows: int, columns: int) -> Tensor:
    """Draw a matrix (rows, columns) with orthonormal columns, uniformly distributed."""
    q, r = torch.linalg.qr(torch.randn(rows, columns))
    return q * r.diagonal().sign()


def start(weights, ranks, scales, options: Options) -> Start:
    """Return P = P₀ (O, R), Λ = Λ₀ (R) and Q = Q₀ (R, I) for each layer."""
    values, spectra = {}, {}
    for name in weights:
        W, R = weights[name], ranks[name]
        outs, ins = W.shape
        if options.use_data_init:
            P, S, Q = singular_components(W, options.sig_type, R)
        else:
            spectrum = spectra.get((outs, ins, R))
            if spectrum is None:
                spectrum = spectra[outs, ins, R] = singular_values(outs, ins, 1 / R)
            components = component_slice(options.sig_type, min(outs, ins), R)
            P, S, Q = uniform_frame(outs, R), spectrum[components].float(), uniform_frame(ins, R).T
        trained = {"p_layer": P, "lambda_layer": S, "q_layer": Q}
        values[name] = trained | {"base_p": P, "base_lambda": S, "base_q": Q}
    metadata = {"basis_hash": basis_hash(weights, ranks)} if options.use_data_init else {}
    return values, metadata


def gate(schedule: Schedule) -> Gate:
    """Return a gate that follows `schedule`; a layer of lower rank opens ranks in proportion."""
    return Gate(schedule.open, schedule.metadata, lambda rank: gate(schedule.for_rank(rank)))


def method(options: Options) -> Method:
    factor = LORA_FACTOR
    if options.orthogonal:
        factor = Factor(
            partial(start, options=options),
            trained=("p_layer", "lambda_layer", "q_layer"),
            chains=(Chain(("p_layer", "lambda_layer"), ("q_layer",)),),
            copy=Chain(("base_p", "base_lambda"), ("base_q",)),
            diagonal=("lambda_layer", "base_lambda"),
            not_recomputable="" if options.use_data_init else "are drawn at random and stored in this file",
            loraplus=("p_layer",),
        )
    return Method("tlora", factor, gate(Schedule(options.tlora_min_rank, options.tlora_alpha)))


create_network, create_network_from_weights = bind(method, Options, alpha_is_rank=True)
