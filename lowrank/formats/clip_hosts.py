"""A CLIP of the installed transformers that takes no memory, and diffusers' loading of an adapter into it.

Its sizes are those of the adapter. Its weights are zeros that are stored once, except on the adapted layers.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.errors import Refused
from lowrank.formats.delta import Delta, weightless_host
from lowrank.formats.hosts import Checked, Unread, compared, host
from lowrank.formats.read import Adapter
from lowrank.naming.places import LayerPath, component_name

ROUNDING = 3e-2  # the largest error of bfloat16; above it a layer was read in another way
_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)$")


def clip_hosts(layers: Mapping[LayerPath, Delta], part: str) -> tuple[nn.Module, dict[LayerPath, str]] | None:
    """A CLIP with the adapted layers of one part, and their paths in it; None for T5, or without sizes."""
    mine = {place: layer for place, layer in layers.items() if place.part == part}
    matches = {place: match for place in mine if (match := _LAYER.match(place.path))}
    others = mine.keys() - matches.keys()
    if part == "te3" or not matches or any(place.path != "text_projection" for place in others):
        return None
    hidden, middle = 0, 0
    for place, match in matches.items():
        outs, ins = mine[place].up.shape[0], mine[place].down.shape[1]
        hidden = outs if match[3] == "fc2" else ins
        middle = {"fc1": outs, "fc2": ins}.get(match[3], middle)
    count = 1 + max(int(match[1]) for match in matches.values())
    projections = [mine[place].up.shape[0] for place in others]
    model = _clip(part, hidden, middle or 4 * hidden, count, projections[0] if projections else 8)
    names = {}
    for place, layer in mine.items():
        name = place.path if _has(model, place.path) else place.path.removeprefix("text_model.")
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, host(layer))
        names[place] = name
    parameters: Any = model.parameters()
    for parameter in parameters:
        parameter._is_hf_initialized = True  # transformers would draw weights that a file does not have
    return model, names


def _clip(part: str, hidden: int, middle: int, layers: int, projection: int) -> nn.Module:
    """A CLIP without memory: SDXL's second encoder has a projection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=hidden, intermediate_size=middle, num_hidden_layers=layers, num_attention_heads=1,
        projection_dim=projection, vocab_size=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = (CLIPTextModelWithProjection if part == "te2" else CLIPTextModel)(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(
                model.get_submodule(parent),
                last,
                weightless_host(module.out_features, module.in_features, ()),
            )
            continue
        for key, value in module.named_parameters(recurse=False):
            zeros = torch.zeros(1).expand(value.shape)
            setattr(module, key, nn.Parameter(zeros, requires_grad=False))
        for key, value in module.named_buffers(recurse=False):
            module.register_buffer(key, torch.zeros(value.shape, dtype=value.dtype), persistent=False)
    return model


def _has(model: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in model.named_modules())


def text_by_diffusers(adapter: Adapter, loader: Any, loaded: tuple[Any, Any, Any]) -> Checked:
    """The text encoders of a file, put into transformers' CLIP as `pipe.load_lora_weights` does.

    `loader` is diffusers' class for the family, and `loaded` what it read from the file. Raises `Unread`
    where it cannot, and `Refused` for the lengths of DoRA, which diffusers 0.42 does not put there.
    """
    state, alphas, metadata = loaded
    pairs = []
    for part in dict.fromkeys(place.part for place in adapter.layers if place.part != "unet"):
        component = component_name(part, adapter.family)
        clip = clip_hosts(adapter.layers, part)
        if clip is None:  # T5, which diffusers does not adapt
            _check_text(state, component, adapter, part)
            continue
        model, names = clip
        options = {"prefix": component, "metadata": metadata, "adapter_name": "default"}
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
                loader.load_lora_into_text_encoder(state, alphas, model, **options)
        except (ValueError, RuntimeError) as error:
            raise Unread(str(error).splitlines()[0]) from error
        pairs += [(place, adapter.layers[place], model.get_submodule(name)) for place, name in names.items()]
    checked = compared(pairs, "diffusers, text encoders")
    if checked.worst > ROUNDING and any(layer.magnitude is not None for _, layer, _ in pairs):
        raise Refused(
            f"{adapter.source} has DoRA layers of text encoders, and the installed diffusers does not load "
            "the lengths of their rows; use --to peft, or --to kohya (ComfyUI, LyCORIS), or --parts unet"
        )
    return checked


def _check_text(state: Mapping[str, Tensor], component: str, adapter: Adapter, part: str) -> None:
    """Raise `Unread` unless diffusers' state has two factors of each text encoder layer, and nothing else."""
    count = sum(key.startswith(f"{component}.") for key in state)
    layers = [layer for place, layer in adapter.layers.items() if place.part == part]
    magnitudes = sum(layer.magnitude is not None for layer in layers)
    if count != 2 * len(layers) + magnitudes:
        raise Unread(f"diffusers reads {count} tensors of {component}, {len(layers)} layers were written")
