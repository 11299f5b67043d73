"""Adapters on one small FLUX in memory, and what compares them."""

from __future__ import annotations

import hashlib

import pytest
import torch
from diffusers import FluxTransformer2DModel
from files import FLUX
from toys import PLAIN, shake

from lowrank.train.network_module import create, find_module


def made(name: str, model, cache, rank: int = 4, alpha=None, **arguments):
    arguments |= {} if name in PLAIN else {"basis_cache": str(cache)}
    return create(
        find_module(name),
        model,
        (),
        rank=rank,
        alpha=alpha,
        dropout=None,
        arguments=arguments,
        weights=None,
        dim_from_weights=False,
    )


def base_of(model):
    fresh = type(model)(**FLUX)
    fresh.load_state_dict(model.state_dict())
    return fresh.requires_grad_(False)


@pytest.fixture
def flux():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return FluxTransformer2DModel(**FLUX).requires_grad_(False).eval()


@pytest.fixture
def saved(flux, cache, tmp_path):
    """A function that trains an adapter in an instant and gives its file."""

    def save(name: str, seed: int, rank: int = 4, **more):
        net = shake(made(name, flux, cache, rank, **more), seed=seed)
        path = tmp_path / f"{name}-{seed}-{rank}.safetensors"
        net.save_weights(str(path), None, {})
        net.restore()
        return path

    return save


def forward(model):
    torch.manual_seed(0)
    ids = torch.zeros(6, 3)
    inputs = {
        "hidden_states": torch.randn(2, 6, 16),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.tensor([1.0, 1.0]),
    }
    dtype = model.dtype
    inputs = {
        k: v.to(dtype) if k in ("hidden_states", "encoder_hidden_states", "pooled_projections") else v
        for k, v in inputs.items()
    }
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def digest(model):
    return hashlib.sha256(
        b"".join(p.view(torch.uint8).numpy().tobytes() for p in model.parameters())
    ).hexdigest()
