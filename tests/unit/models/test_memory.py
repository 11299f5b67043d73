"""Checkpointing and float8 storage on the tiny FLUX: same numbers, less memory."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

from lowrank.errors import Refused
from lowrank.models import blocks, frozen, memory
from lowrank.models.family import Models
from lowrank.models.flux import FLUX, FluxOptions
from lowrank.train.text_conditions import stack_text


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def text_of(models: Models, *captions: str, **options) -> dict:
    return stack_text(FLUX.encode_text(models, list(captions), FluxOptions(**options)))


def gradients(model, text, between=None):
    noisy = torch.randn(1, 16, 4, 4, generator=seeded(1)).requires_grad_(True)
    out = FLUX.denoise(model, noisy, torch.tensor([400.0]), text)
    if between:
        between()
    out.float().square().sum().backward()
    return [noisy.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_checkpointed_gradient_is_the_plain_gradient(models):
    model, text = copy.deepcopy(models.denoiser).requires_grad_(True), text_of(models, "a dog")
    plain = gradients(model, text)
    model.zero_grad()
    memory.checkpoint_blocks(model)
    again = gradients(model, text)
    assert len(plain) > 100 and all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_recomputation_reenters_the_moment_of_the_forward(models):
    """A layer that reads a clock: a pass in between moves the clock, and must not change the gradient."""
    model, text, clock, computed = copy.deepcopy(models.denoiser), text_of(models, "a dog"), [2.0], []
    host = model.transformer_blocks[1].ff.net[2]
    original = host.forward

    def timed(x):
        computed.append(clock[0])
        return original(x * torch.tensor(clock[0]))  # autograd keeps the tensor

    host.forward = timed

    @contextlib.contextmanager
    def at(value):
        before, clock[0] = clock[0], value
        try:
            yield
        finally:
            clock[0] = before

    def move():
        clock[0] = 7.0
        with torch.no_grad():
            FLUX.denoise(model, torch.zeros(1, 16, 4, 4), torch.tensor([1.0]), text)

    plain = gradients(model, text)
    memory.checkpoint_blocks(model, lambda: at(clock[0]))
    assert torch.equal(gradients(model, text)[0], plain[0])
    computed.clear()
    assert torch.equal(gradients(model, text, between=move)[0], plain[0])
    assert computed == [2.0, 7.0, 2.0] and clock[0] == 7.0
    clock[0] = 2.0
    memory.checkpoint_blocks(model)  # the test can fail: without the context the gradient is another one
    assert not torch.equal(gradients(model, text, between=move)[0], plain[0])


def test_fp8_storage_computes_as_the_rounded_weights(models):
    stored = copy.deepcopy(models.denoiser).to(torch.bfloat16)
    blocks.freeze_base(stored)
    blocks.store_base(stored, "fp8")
    small = {f"{name}.weight" for name, m in stored.named_modules() if isinstance(m, frozen.Linear)}
    assert {f"transformer_blocks.0.{name}.weight" for name in ("attn.to_q", "norm1.linear")} <= small
    assert not {"x_embedder.weight", "proj_out.weight"} & small
    rounded = copy.deepcopy(models.denoiser).to(torch.bfloat16)
    for name, p in rounded.named_parameters():
        if name in small:
            p.data = p.data.to(torch.float8_e4m3fn).to(torch.bfloat16)
    text = text_of(models, "a dog")
    expected = gradients(rounded, text)[0]
    assert torch.equal(gradients(stored, text)[0], expected)
    memory.checkpoint_blocks(stored)
    assert torch.equal(gradients(stored, text)[0], expected)


def test_attention_backends(models):
    model = copy.deepcopy(models.denoiser)
    memory.attention(model, "sdpa")
    with pytest.raises(Refused, match="'nonsense' is not available"):
        memory.attention(model, "nonsense")


def test_tf32_is_restored():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for allowed in (True, False):
        with memory.tf32(allowed):
            assert torch.backends.cudnn.allow_tf32 == allowed
            assert (torch.get_float32_matmul_precision() == "high") == allowed
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
