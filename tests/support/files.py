"""Adapter files on parts of small models, for the tests of tools that read and write them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from toys import PLAIN, shake
from transformers import CLIPTextModelWithProjection

from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.targets import as_passed
from tools import make_tiny_sd, tiny

# a few layers of every kind: linear ones, 1×1 and 3×3 convolutions, FLUX's joined ones, some not whole
TARGETS = {
    "sd15": r"down_blocks\.0\.(attentions\.0|resnets\.0)|down_blocks\.1\.downs"
    r"|mid_block\.attentions\.0\.(proj_in|.*to_out)",
    "sdxl": r"down_blocks\.1\.(attentions\.0\..*attn1|resnets\.0)|up_blocks\.1\.ups"
    r"|up_blocks\.0\.attentions\.2\.proj_out",
    "flux": r"^transformer_blocks\.0\.(attn|norm1|ff)"
    r"|^single_transformer_blocks\.0\.(attn|proj_mlp|proj_out)",
}
# FLUX.1-dev's transformer: 11,901,408,320 parameters, 19 double and 38 single blocks of width 3072
FLUX_DEV: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
FLUX = {
    **FLUX_DEV,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 6, 6),
}


def denoiser(family: str) -> Any:
    """A small denoiser with weights that do not depend on what ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = FluxTransformer2DModel(**FLUX) if family == "flux" else make_tiny_sd.unet(family, 4)
    return model.requires_grad_(False).eval()


def encoders(family: str) -> list[Any]:
    """The family's text encoders, as far as adapters train them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12)
        models = [tiny.clip(50, layers=1)]
        if family == "sdxl":
            models.append(tiny.clip(50, layers=1, kind=CLIPTextModelWithProjection))
    return [model.requires_grad_(False).eval() for model in models]


def network(
    family: str,
    method: str,
    model: Any,
    text: list[Any] | None = None,
    cache: Path | None = None,
    **more: Any,
) -> AdapterNetwork:
    """A network of a method on some layers of the model, away from its start, attached."""
    arguments = {
        "target": TARGETS[family],
        **({} if method in PLAIN else {"basis_cache": str(cache)}),
        **({"num_experts": "1"} if method == "effilora" else {}),  # more have no one ΔW
        **more,
    }
    passed = as_passed(text or [], model) if text else []
    module = importlib.import_module(f"networks.{method}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(13)
        net = module.create_network(1.0, 4, 2.0, None, passed, model, **arguments)
    net.apply_to(passed, model, bool(text), True)
    return shake(net)


def save(
    folder: Path, family: str, method: str, cache: Path | None = None, text: bool = True, **more: Any
) -> Path:
    """A native file of a method on a small model."""
    net = network(family, method, denoiser(family), encoders(family) if text else None, cache, **more)
    path = folder / f"{family}-{method}.safetensors"
    metadata = {"ss_output_name": "probe", "ss_steps": "7", "lowrank.command": "train.py --network_dim 4"}
    net.save_weights(str(path), None, metadata)
    return path


def answer(family: str, model: Any) -> torch.Tensor:
    """The output of the model for fixed noise and text."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        if family == "flux":
            return model(
                hidden_states=random(1, 6, 16),
                encoder_hidden_states=random(1, 5, 24),
                pooled_projections=random(1, 20),
                timestep=torch.tensor([0.4]),
                guidance=torch.tensor([1.0]),
                img_ids=torch.zeros(6, 3),
                txt_ids=torch.zeros(5, 3),
                return_dict=False,
            )[0]
        width = model.config.cross_attention_dim
        added = {"text_embeds": random(1, 128), "time_ids": torch.ones(1, 6)} if family == "sdxl" else None
        text = random(1, 5, width)
        return model(random(1, 4, 8, 8), 500, text, added_cond_kwargs=added, return_dict=False)[0]
