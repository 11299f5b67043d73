"""LoRA on the layers of FLUX that kohya sd-scripts' networks.lora_flux adapts, with its arguments and file.

    y = W x + s·U·D x        D kaiming-uniform, U = 0, s = alpha/rank     (Hu et al., arXiv 2106.09685, eq. 3)

Adapted are all linear layers of the double and single blocks, modulation included, and CLIP-L unless
--network_train_unet_only is given; T5 with train_t5xxl=True. kohya's FLUX joins layers that diffusers has
apart: img_attn.qkv is to_q, to_k, to_v. Such layers have one D here, and each has its rows of U, so that
training is that of one LoRA on the joined layer. Files have kohya's layers, keys and alphas.

Differences: dropout draws a mask for each of to_q, to_k, to_v. With split_qkv=True alpha is multiplied by the
number of parts, as the rank is, so that programs apply the strength of the training; kohya leaves it. GGPO
(ggpo_beta with ggpo_sigma) is refused. In a kohya checkout, networks.lora_flux is kohya's own module.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lowrank.adapters import flux_layers
from lowrank.adapters.method import LORA_FACTOR, Method
from lowrank.adapters.network_module import bind


@dataclass(frozen=True)
class Options(flux_layers.FluxLayers):
    """kohya's arguments, which choose layers, ranks and learning rates."""


def method(options: Options) -> Method:
    def start(weights, ranks, scales):
        return flux_layers.start_values(weights, ranks, options.split_qkv)

    factor = dataclasses.replace(
        LORA_FACTOR, start=start, share=None if options.split_qkv else flux_layers.share, joined=True
    )
    alone = [name for name in ("ggpo_beta", "ggpo_sigma") if getattr(options, name) is not None]
    return Method("lora", factor, notes=tuple(f"network argument {n} has no effect alone" for n in alone))


create_network, create_network_from_weights = bind(method, Options, layers=flux_layers.choose_layers)
