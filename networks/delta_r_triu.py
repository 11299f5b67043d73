"""ΔR-triu: ΔR that keeps the shape of R, upper trapezoidal (QR-LoRA, arXiv 2507.04599).

    y = W x + s·Q·triu(ΔR) x

Of ΔR's R×I entries the R(R−1)/2 under the diagonal of its leading square stay exactly zero: 1 % at rank 64.
The projection is in the forward, so gradients, momentum and weight decay never reach them.
"""

from __future__ import annotations

import dataclasses

import torch

from lowrank.adapters.method import Method
from lowrank.adapters.network_module import bind
from networks import delta_r
from networks.delta_r import Options


def method(options: Options) -> Method:
    factor = delta_r.factor(options)
    return Method("delta_r_triu", dataclasses.replace(factor, constrain={"delta_r": torch.triu}))


create_network, create_network_from_weights = bind(method, Options, alpha_is_rank=True)
