"""LaLoRA: LoRA that is held where the base minds (Laplace; Sliwa et al., arXiv 2512.17720).

    L(ΔW) + (λ/2) Σ_l tr(UᵀGU · DSDᵀ)·s²/c        S = E[x xᵀ], G = E[g gᵀ] on source data, ΔW = s·U·D

S and G, of `calc_lalora_context.py`, say what a layer reads and what the loss minds while the base does what
it must not forget. The sum is the rise of that loss, to second order, so that directions without curvature
are free and the others cost. c is the mean curvature of a weight, which makes λ portable. The file that comes
out is an ordinary LoRA. `penalty(options)` joins the same to any method.

Unlike the paper the curvature is that of the weight W and not of U and D: at U = 0 the loss has no gradient
in D, so their Fisher matrix is 0 for D, and an equal ΔW with other factors costs another price.
`--curvature lora_diag` of the context script is the paper's diagonal.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

from lowrank.adapters.method import LORA_FACTOR, Method, Penalty
from lowrank.adapters.network_module import bind
from lowrank.errors import Refused
from lowrank.laplace import penalty as laplace_penalty
from lowrank.laplace.context_file import read_context


@dataclass(frozen=True)
class Options:
    lalora_context_path: str | None = None
    """curvature file of calc_lalora_context.py; opened and checked whatever λ is"""
    lalora_lambda: float = 0.0
    """λ; 0 is plain LoRA, bit for bit"""
    lalora_isotropic: bool = False
    """hold every direction alike, (λ/2) Σ ‖ΔW‖², which needs no context"""


def penalty(options: Options) -> Method:
    """Only the penalty slot; empty without a context. Raises `Refused` for λ > 0 with nothing to go by."""
    path, strength = options.lalora_context_path, options.lalora_lambda
    if strength < 0:
        raise Refused(f"network argument lalora_lambda={strength:g} is below 0; give 0 or more")
    if path and options.lalora_isotropic:
        raise Refused(f"lalora_isotropic=True does not read lalora_context_path={path}; give one of them")
    if options.lalora_isotropic:
        prepare = partial(laplace_penalty.isotropic, strength=strength)
    elif path:
        context = read_context(path)
        prepare = partial(laplace_penalty.bind_penalty, context=context, strength=strength, source=path)
    elif strength:
        raise Refused(
            f"lalora_lambda={strength:g} has no context; give lalora_context_path=FILE of "
            "calc_lalora_context.py, or lalora_isotropic=True to hold every direction alike"
        )
    else:
        return Method("lalora")
    return Method("lalora", penalty=(Penalty("lalora", prepare=prepare),))


def method(options: Options) -> Method:
    plain = Method("lora", LORA_FACTOR)
    return dataclasses.replace(plain | penalty(options), name=plain.name)


create_network, create_network_from_weights = bind(method, Options)
