"""EffiLoRA: layers with a common input share one down; each layer mixes several ups (arXiv 2512.00878).

    y = W x + s·Σₑ wₑ(x)·Bₑ·A x        w(x) = softmax(G·A x), Σₑ wₑ = 1

A (R×I) is shared by all layers of one model (U-Net or a text encoder), rank, input stream (`STREAMS`) and
input shape. Each layer has its own E ups B (E×O×R), which start at zero, and its own router G (E×R). With
num_experts=1 it is a LoRA with a shared A and is saved as a plain LoRA. The paper's Reducer trains the B of
only some layers in each step, drawn by importance: effi_update_ratio.

Code: the router in lowrank/adapters/experts.py, the forward in adapters/layer.py, the sharing of A in
adapters/network.py, the drawing of layers in train/layer_sampling.py.

Differences from the paper: it has one A for all layers, which is possible only if all have the same I. Its
formula draws layers with probability σ(−z), its text prefers important layers; we draw with σ(z), where z is
the importance of a layer, standardised over the layers. Every expert takes part in every forward, in training
and in inference.
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
MAX_EXPERTS = 256  # a mistyped number would otherwise exhaust the memory

# (input stream, end of a layer's path); the first matching row applies. Layers that match no row read the
# image's tokens or pixels. Paths as in diffusers, transformers, kohya's U-Nets and Black Forest Labs' FLUX.
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
    """number of experts (up matrices) per layer, mixed by a router; 1: no router, an ordinary LoRA"""
    router_input: str = structural("h")
    """input of the router: h, the projection A x (the paper), or x, the input of the layer (HydraLoRA)"""
    router_scope: str = structural("token")
    """token: expert weights for each token or pixel; sample: from the mean over a sample's tokens"""
    effi_update_ratio: float = 1.0
    """share of the layers whose up matrices are updated in a step; 1 updates all layers"""
    effi_probe_every: int = 100
    """steps between two measurements of layer importance, used when effi_update_ratio is below 1"""
    effi_probe_layers: int = 16
    """number of layers suppressed at once to measure layer importance, at most half of all layers"""

    def __post_init__(self) -> None:
        for name, choices in (("router_input", INPUTS), ("router_scope", SCOPES)):
            value = getattr(self, name)
            if value not in choices:
                raise Refused(
                    f"network argument {name}={value} is not one of "
                    f"{', '.join(choices)}{nearest(value, choices)}"
                )
        for name in ("num_experts", "effi_probe_every", "effi_probe_layers"):
            if getattr(self, name) < 1:
                raise Refused(f"network argument {name}={getattr(self, name)} is below 1; give 1 or more")
        if self.num_experts > MAX_EXPERTS:
            raise Refused(
                f"network argument num_experts={self.num_experts} is above {MAX_EXPERTS}; 4 is usual"
            )
        if not 0 < self.effi_update_ratio <= 1:
            raise Refused(
                f"network argument effi_update_ratio={self.effi_update_ratio:g} is not in (0, 1]; "
                "1 updates every layer in every step"
            )


def stream_of(path: str) -> str:
    """Return the input stream of the layer at a dotted path: a name of `STREAMS`, or "picture"."""
    return next((stream for stream, end in STREAMS if re.search(rf"(?:^|\.)(?:{end})$", path)), "picture")


def share(part: str, path: str, shape: tuple[int, ...]) -> Hashable:
    """Return the key of a layer's shared A: layers with equal keys share it.

    `shape` is the input shape of the layer, (I,) or for a convolution (I, k, k).
    """
    return part, stream_of(path), shape


def experts(options: Options, factor: Factor) -> Method:
    """Fill the experts slot for the trained up of `factor`, and choose which layers are updated in a step.

    Raises `Refused` if `factor` trains no up.
    """
    if not set(factor.loraplus) & set(factor.trained):
        raise Refused(
            "experts multiply a trained up matrix, and this method trains none; leave enable_effilora out"
        )
    (role,) = factor.loraplus
    mixture = Experts(options.num_experts, softmax_router, role, options.router_input, options.router_scope)
    updates = Updates(role, options.effi_update_ratio, options.effi_probe_every, options.effi_probe_layers)
    return Method(
        "effilora",
        experts=mixture if options.num_experts > 1 else None,
        updates=updates if options.effi_update_ratio < 1 else None,
    )


def method(options: Options) -> Method:
    factor = dataclasses.replace(LORA_FACTOR, share=share)
    return dataclasses.replace(experts(options, factor), factor=factor)


create_network, create_network_from_weights = bind(method, Options)
