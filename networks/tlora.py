"""T-LoRA: fewer ranks the noisier the sample, so that one picture is not learned by heart (arXiv 2507.05964).

    y = W x + s·U·M(t)·D x                                   plain ("vanilla"): LoRA with a mask
    y = W x + s·(P·Λ·M(t)·Q − P₀·Λ₀·M(t)·Q₀) x               orthogonal: the start subtracted

M(t) keeps the first r(t) = ⌊((T − t)/T)^α (R − R_min)⌋ + R_min of R ranks (eq. 3, 6), for each sample of a
batch by its own t; T = 1000. P₀, Λ₀, Q₀ are R singular components of a random matrix N(0, 1/R), or of W, in
descending order: the `last`, the `middle` or the `principal` ones. Nothing but the start keeps P and Q
orthogonal, as in the paper. Defaults are the paper's: the last of a random matrix, R_min = R/2, s = 1.

The authors' code takes one t for a whole batch and the SVD of a random matrix for each layer. Here singular
vectors are drawn by themselves: those of a Gaussian matrix are independent of its singular values and
uniform, so that QR of thin Gaussian matrices gives them. The singular values come from the bidiagonal form of
such a matrix, whose entries are χ-distributed (Golub and Kahan; Silverstein 1985), once for each shape.
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
    """ranks open at pure noise (unset: half of the layer's rank)"""
    tlora_alpha: float = structural(1.0)
    """exponent of the schedule: 1 is linear, above 1 opens ranks later in sampling, below 1 earlier"""
    orthogonal: bool = structural(True)
    """P·Λ·Q with the start subtracted; False is LoRA with a mask, the paper's choice for FLUX"""
    sig_type: str = structural("last")
    """which singular components P·Λ·Q starts from: principal, middle or last"""
    use_data_init: bool = structural(False)
    """take them from the layer's weight instead of a random matrix"""

    def __post_init__(self) -> None:
        if self.sig_type not in PARTS:
            raise Refused(
                f"sig_type {self.sig_type!r} is not one of {', '.join(PARTS)}{nearest(self.sig_type, PARTS)}"
            )
        if self.tlora_min_rank is not None and self.tlora_min_rank < 1:
            raise Refused(f"tlora_min_rank {self.tlora_min_rank} is below 1; give 1 or more")
        if not self.tlora_alpha > 0:
            raise Refused(f"tlora_alpha {self.tlora_alpha:g} is not above 0; 1.0 is the linear schedule")


def singular_values(outs: int, ins: int, std: float) -> Tensor:
    """The singular values (min(O, I),) of a random O × I matrix N(0, std²), largest first, in float64."""
    short, long = sorted((outs, ins))
    freedoms = torch.arange(long, 0, -1, dtype=torch.float64)
    chi = (
        torch.distributions.Chi2(torch.cat([freedoms[:short], freedoms[long - short + 1 :]])).sample().sqrt()
    )
    B = chi[:short].diag() + chi[short:].diag(-1)  # bidiagonal, (short, short)
    return std * torch.linalg.eigvalsh(B @ B.T).flip(0).clamp(min=0).sqrt()


def uniform_frame(rows: int, columns: int) -> Tensor:
    """A matrix (rows, columns) with orthonormal columns, uniform among all such."""
    q, r = torch.linalg.qr(torch.randn(rows, columns))
    return q * r.diagonal().sign()


def start(weights, ranks, scales, options: Options) -> Start:
    """P = P₀, Λ = Λ₀, Q = Q₀."""
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
            chosen = component_slice(options.sig_type, min(outs, ins), R)
            P, S, Q = uniform_frame(outs, R), spectrum[chosen].float(), uniform_frame(ins, R).T
        own = {"p_layer": P, "lambda_layer": S, "q_layer": Q}
        values[name] = own | {"base_p": P, "base_lambda": S, "base_q": Q}
    facts = {"basis_hash": basis_hash(weights, ranks)} if options.use_data_init else {}
    return values, facts


def gate(schedule: Schedule) -> Gate:
    """Open ranks by a schedule; in a network of rank R, every layer in proportion to R."""
    return Gate(schedule.open, schedule.metadata, lambda rank: gate(schedule.of(rank)))


def method(options: Options) -> Method:
    factor = LORA_FACTOR
    if options.orthogonal:
        factor = Factor(
            partial(start, options=options),
            trained=("p_layer", "lambda_layer", "q_layer"),
            chains=(Chain(("p_layer", "lambda_layer"), ("q_layer",)),),
            copy=Chain(("base_p", "base_lambda"), ("base_q",)),
            diagonal=("lambda_layer", "base_lambda"),
            unique="" if options.use_data_init else "are drawn at random into the file of a run",
            plus=("p_layer",),
        )
    return Method("tlora", factor, gate(Schedule(options.tlora_min_rank, options.tlora_alpha)))


create_network, create_network_from_weights = bind(method, Options, alpha_is_rank=True)
