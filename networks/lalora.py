"""LaLoRA: LoRA with a Laplace (curvature-weighted) penalty on ΔW against forgetting (arXiv 2512.17720).

    loss + (λ/2) Σ tr(UᵀGU · DSDᵀ)·s²/c, a sum over the layers        ΔW = s·U·D, s = alpha/rank

S = E[x xᵀ] (I×I) and G = E[g gᵀ] (O×O) of each layer: x is the layer's input and g the gradient at its output
of the prediction with random signs, so that S ⊗ G approximates the Gauss–Newton matrix of the squared error.
`calc_lalora_context.py` measures both on source data and writes them to a context file. ½ of the sum before
the division by c approximates the rise of the base model's loss on the source data, to second order and layer
by layer. So changes in directions without curvature are free. c is the mean curvature per weight, so that λ
has the same meaning for every model. The result is an ordinary LoRA file. `penalty(options)` adds the penalty
to any method.

Difference from the paper: we take the curvature of W, not of U and D. At U = 0 the loss has no gradient in D,
so the Fisher matrix of D is 0. With the curvature of U and D, two factorisations of one ΔW would also be
penalised differently. `--curvature lora_diag` of the context script is the nearest to the paper's diagonal:
it penalises U alone, by E[g²]·E[(D₀x)²] in place of E[g²(D₀x)²], with D₀ as training starts.
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
    """context file made by calc_lalora_context.py; it is read and checked also if lalora_lambda is 0"""
    lalora_lambda: float = 0.0
    """strength λ of the LaLoRA penalty; 0 trains exactly as without the penalty"""
    lalora_isotropic: bool = False
    """penalise all directions equally, (λ/2) Σ ‖ΔW‖², without a context file"""


def penalty(options: Options) -> Method:
    """Return a method with only the penalty slot filled, or none filled if no penalty is configured.

    Raises `Refused` for λ < 0, for λ > 0 without a context, and for a context together with isotropic=True.
    """
    path, strength = options.lalora_context_path, options.lalora_lambda
    if strength < 0:
        raise Refused(f"network argument lalora_lambda={strength:g} is below 0; give 0 or more")
    if path and options.lalora_isotropic:
        raise Refused(f"lalora_isotropic=True does not use lalora_context_path={path}; give only one of them")
    if options.lalora_isotropic:
        prepare = partial(laplace_penalty.isotropic, strength=strength)
    elif path:
        context = read_context(path)
        prepare = partial(laplace_penalty.bind_penalty, context=context, strength=strength, source=path)
    elif strength:
        raise Refused(
            f"lalora_lambda={strength:g} needs a context; give lalora_context_path=FILE, made by "
            "calc_lalora_context.py, or lalora_isotropic=True to penalise all directions equally"
        )
    else:
        return Method("lalora")
    return Method("lalora", penalty=(Penalty("lalora", prepare=prepare),))


def method(options: Options) -> Method:
    plain = Method("lora", LORA_FACTOR)
    return dataclasses.replace(plain | penalty(options), name=plain.name)


create_network, create_network_from_weights = bind(method, Options)
