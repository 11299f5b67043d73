"""ΔR-triu: ΔR restricted to the shape of R, upper trapezoidal (QR-LoRA, arXiv 2507.04599).

    y = W x + s·Q·triu(ΔR) x

Of the r×I entries of ΔR (r is the rank), the r(r−1)/2 below the diagonal of its leading r×r square are
always zero; at r = 64 and I = 3072 that is 1 %. The projection is part of the forward, so gradient, momentum
and weight decay never change these entries.
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
