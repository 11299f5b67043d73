"""EffiLoRA: one down for layers that read the same space, several ups mixed by a router (arXiv 2512.00878).

    y = W x + s·Σₑ wₑ(x)·Bₑ·A x        w(x) = softmax(G·A x), Σₑ wₑ = 1

A is shared by the layers of one part, stream (`STREAMS`) and input shape; each layer has its own E ups B,
which start at zero, and its own router G. num_experts=1 is a plain LoRA with a shared A, and is saved as one.
The paper's Reducer trains in each step only some layers' B, drawn by importance (effi_update_ratio,
lowrank/train/layer_sampling.py).

The paper shares one A over all layers, which needs layers of one width; its text draws layers by σ(−s) and
says that important ones come first, which is σ(s) and what we do. Unlike the code we know, all experts take
part in every forward, in training and afterwards alike.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable
from dataclasses import dataclass

from lowrank.adapters.experts import softmax_router
from lowrank.adapters.method import LORA_FACTOR, Experts, Factor, Method, Updates, structural
from lowrank.adapters.network_module import bind
from lowrank.errors import Refused, nearest

INPUTS, SCOPES = ("h", "x"), ("token", "sample")
MOST = 256  # experts; a typing error would otherwise fill the memory

# What a layer reads, by the end of its path; the first row that fits, and all others read the picture's
# tokens or pixels. Names of diffusers, transformers, kohya's U-Nets and Black Forest Labs' FLUX.
STREAMS = (
    ("text hidden", r"ff_context\.net\.2|txt_mlp\.2"),
    ("hidden", r"ff\.net\.2|mlp\.fc2|img_mlp\.2|DenseReluDense\.wo"),
    ("tokens and hidden", r"single_transformer_blocks\.\d+\.proj_out|single_blocks\.\d+\.linear2"),
    ("text", r"attn2\.to_[kv]|add_[qkv]_proj|to_add_out|ff_context\.net\.0\.proj"),
    ("text", r"txt_attn\.(qkv|proj)|txt_mlp\.0|context_embedder|txt_in"),
    ("condition", r"time_emb_proj|emb_layers\.1|norm\w*\.linear|(img_mod|txt_mod|modulation)\.lin"),
)


@dataclass(frozen=True)
class Options:
    num_experts: int = structural(4)
    """ups of each layer, mixed by a router; 1 has no router and one ΔW"""
    router_input: str = structural("h")
    """what the router reads: h, the rank-wide A x (the paper), or x (HydraLoRA)"""
    router_scope: str = structural("token")
    """weights for each token or pixel, or those of their mean for the whole sample"""
    effi_update_ratio: float = 1.0
    """share of the layers whose ups learn in a step; 1 is all of them"""
    effi_probe_every: int = 100
    """steps between two probes of how much the layers matter"""
    effi_probe_layers: int = 16
    """layers that a probe suppresses together, at most half of them"""

    def __post_init__(self) -> None:
        for name, known in (("router_input", INPUTS), ("router_scope", SCOPES)):
            given = getattr(self, name)
            if given not in known:
                raise Refused(
                    f"network argument {name}={given} is not one of {', '.join(known)}{nearest(given, known)}"
                )
        for name in ("num_experts", "effi_probe_every", "effi_probe_layers"):
            if getattr(self, name) < 1:
                raise Refused(f"network argument {name}={getattr(self, name)} is below 1; give 1 or more")
        if self.num_experts > MOST:
            raise Refused(
                f"network argument num_experts={self.num_experts} is above {MOST}; each is an up of every "
                "layer, 4 is usual"
            )
        if not 0 < self.effi_update_ratio <= 1:
            raise Refused(
                f"network argument effi_update_ratio={self.effi_update_ratio:g} is not above 0 and up to 1; "
                "1 lets every layer learn in every step"
            )


def stream_of(path: str) -> str:
    """What the layer at a dotted path reads."""
    return next((name for name, end in STREAMS if re.search(rf"(?:^|\.)(?:{end})$", path)), "picture")


def share(part: str, path: str, shape: tuple[int, ...]) -> Hashable:
    """Layers of one answer have A in common; `shape` is (I,), of a convolution (I, k, k)."""
    return part, stream_of(path), shape


def experts(options: Options, factor: Factor) -> Method:
    """Experts of another factor's trained up side, and which layers learn in a step."""
    if not set(factor.plus) & set(factor.trained):
        raise Refused(
            "experts are several ups that are trained, and this factor trains none; leave enable_effilora out"
        )
    (role,) = factor.plus
    mixed = Experts(options.num_experts, softmax_router, role, options.router_input, options.router_scope)
    chosen = Updates(role, options.effi_update_ratio, options.effi_probe_every, options.effi_probe_layers)
    return Method(
        "effilora",
        experts=mixed if options.num_experts > 1 else None,
        updates=chosen if options.effi_update_ratio < 1 else None,
    )


def method(options: Options) -> Method:
    factor = dataclasses.replace(LORA_FACTOR, share=share)
    return dataclasses.replace(experts(options, factor), factor=factor)


create_network, create_network_from_weights = bind(method, Options)
