"""What a run will train, in a few lines before its first step: layers by kind, and memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from torch import Tensor, nn

from lowrank.adapters.flux_layers import joined_path
from lowrank.adapters.network import AdapterNetwork
from lowrank.plan.live import GIB
from lowrank.train.network_module import KohyaNetwork

_PARTS = {
    "unet": "denoiser",
    "te": "text encoder",
    "te1": "text encoder 1",
    "te2": "text encoder 2",
    "te3": "text encoder T5",
}
_KINDS = (  # of layers, by a part of their path; the first that fits
    ("attention", ("attn", ".to_", "self_attn")),
    ("feed-forward", (".ff", "ff_context", "mlp", ".net.", "linear1", "linear2")),
    ("modulation", ("norm", ".mod", "modulation")),
    ("time and text embedding", ("time", "embed")),
    ("projection in and out", ("proj_in", "proj_out")),
)


def layer_kind(path: str, module: nn.Module) -> str:
    """The kind of a layer, for people: attention, feed-forward, convolution, …"""
    if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
        return "convolution"
    dotted = f".{path}"
    return next((kind for kind, marks in _KINDS if any(mark in dotted for mark in marks)), "other")


def kohya_kind(path: str) -> str:
    """The kind of a layer of kohya's FLUX: `double img_attn`, `single linear1`, or the layer itself."""
    match = re.match(r"(double|single)_blocks\.\d+\.(\w+)", path)
    return " ".join(match.groups()) if match else path


def describe_layers(network: KohyaNetwork) -> list[str]:
    """A line for each part of the model: how many of its layers are adapted, by kind.

    networks.lora_flux has kohya's layers, each of which may be several of diffusers' (q, k and v).
    """
    if not isinstance(network, AdapterNetwork):
        return []
    counts: dict[str, Counter[str]] = {}
    layers: dict[tuple[str, str], str] = {}
    for layer in network.layers():
        target = network.targets[layer.name]
        if network.factor.joined and target.part == "unet":
            path = joined_path(target.path)
            layers[target.part, path] = kohya_kind(path)
        else:
            layers[target.part, target.path] = layer_kind(target.path, target.module)
    for (part, _), kind in layers.items():
        counts.setdefault(part, Counter())[kind] += 1
    return [
        f"{_PARTS.get(part, part)}: {sum(kinds.values())} layers "
        f"({', '.join(f'{kind} {count}' for kind, count in kinds.most_common())})"
        for part, kinds in counts.items()
    ]


def describe_memory(denoiser: nn.Module, text_encoders: Iterable[nn.Module], network: nn.Module) -> str:
    """The memory of weights before the first step, by part and place, in GiB; activations come on top."""
    trained = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    adapter = _bytes(network.parameters()) + _bytes(network.buffers()) + trained
    parts = {"denoiser": denoiser, "text encoders": nn.ModuleList(text_encoders)}
    sizes = {name: _bytes([*part.parameters(), *part.buffers()]) for name, part in parts.items()}
    sizes["adapter and gradients"] = adapter
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items() if size)
    return f"memory of weights (GiB): {shown}; --dry_run predicts the peak, with activations and optimizer"


def _bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors; storage that several of them share counts once."""
    local = (getattr(tensor, "_local_tensor", tensor) for tensor in tensors)  # this process' part of a shard
    storages = {tensor.data_ptr(): tensor.untyped_storage() for tensor in local}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages.values()}.values())
