"""Frozen layers: torch's numbers, nothing kept, weights streamed from host memory in the order of use."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from lowrank.errors import Refused
from lowrank.models import frozen, memory, place
from lowrank.models.place import Stream

KINDS = (None, "bf16", "fp8", "fp8_scaled", "int8", "nf4")


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(4, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1)),
        *(nn.GroupNorm(8, 64), nn.Conv2d(64, 16, 1, bias=False), nn.Flatten(2)),
        *(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32, bias=False), nn.Linear(32, 8)),
    ).requires_grad_(False)


def stored(model: nn.Sequential, kind: str | None, stream: Stream | None) -> nn.Sequential:
    """The model with frozen layers; `model` itself gets the weights that they stand for."""
    twin = copy.deepcopy(model)
    for plain, layer in zip(model, twin, strict=True):
        if frozen.can_freeze(layer):
            frozen.freeze(layer)
            frozen.store(layer, kind)
            plain.weight.data = layer.weight
            if stream is not None:
                frozen.stream(layer, stream)
    return twin


def step(model: nn.Sequential, x: torch.Tensor, checkpointed: bool = False) -> tuple:
    x = x.clone().requires_grad_(True)
    if checkpointed:
        half = checkpoint(model[:4], x, use_reentrant=False)
        y = checkpoint(model[4:], half, use_reentrant=False)
    else:
        y = model(x)
    y.float().square().sum().backward()
    return y.detach(), x.grad


def pictures(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_and_place_computes_as_the_widened_weights(kind, dtype):
    for swap in (False, True):
        model = layers().to(dtype)
        twin = stored(model, kind, Stream("cpu") if swap else None)
        for checkpointed in (False, True):
            for _ in range(2):  # the second step copies ahead
                expected, actual = step(model, pictures(dtype)), step(twin, pictures(dtype), checkpointed)
                assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_autocast_computes_as_torch():
    model = layers().to(torch.bfloat16)
    twin = stored(model, "fp8", None)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = step(model, pictures()), step(twin, pictures())
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    assert actual[1].dtype == torch.float32


def test_autograd_keeps_no_weight(monkeypatch):
    made: list = []
    fetch = frozen.Linear.fetch

    def noted(layer):
        dense = fetch(layer)
        made.append(weakref.ref(dense))
        return dense

    monkeypatch.setattr(frozen.Linear, "fetch", noted)
    twin = stored(layers(), "fp8", None)
    x = pictures().requires_grad_(True)
    loss = twin(x).square().sum()
    gc.collect()
    assert len(made) >= 3 and not any(reference() is not None for reference in made)
    loss.backward()
    assert x.grad is not None


def test_frozen_layer_is_no_parameter_and_reads_as_a_weight():
    layer = nn.Linear(64, 16).requires_grad_(False)
    before = layer.weight.detach().clone()
    frozen.freeze(layer)
    assert torch.equal(layer.weight, before) and isinstance(layer, nn.Linear)
    assert type(layer).__name__ == "Linear"  # by which kohya's networks and LyCORIS find layers
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    frozen.store(layer, "int8")
    assert layer.weight.shape == (16, 64) and not torch.equal(layer.weight, before)
    torch.testing.assert_close(layer.row_norms, before.square().sum(1))  # of the weight before
    layer.to(torch.bfloat16)  # does not change the stored bytes
    assert layer.packed.dtype == torch.uint8


@pytest.mark.parametrize("padding", [{"padding": "same"}, {"padding_mode": "reflect"}], ids=str)
def test_convolutions_of_other_padding_stay_as_they_are(padding):
    layer = nn.Conv2d(2, 2, 3, **padding)
    assert not frozen.can_freeze(layer)
    with pytest.raises(TypeError):
        frozen.freeze(layer)


# ---------- streaming


def test_copies_of_a_step():
    """Six layers, three buffers: a layer that is still in a buffer is not copied again."""
    stream = Stream("cpu")
    twin = stored(layers(), None, stream)
    largest = max(weight.numel() for weight in stream.weights)
    assert stream.device_bytes == 3 * largest and stream.host_bytes == sum(map(len, stream.weights))
    before = copy.copy(stream.counts)
    for number in range(4):
        step(twin, pictures())
        now = stream.counts
        assert now.fetches - before.fetches == 2 * 6
        if number:  # the first step notes the order
            assert now.late == before.late and now.copies - before.copies == 6
        before = copy.copy(now)


def test_copies_of_a_checkpointed_step():
    stream = Stream("cpu", buffers=2)
    twin = stored(layers(), None, stream)
    for _ in range(2):
        step(twin, pictures(), checkpointed=True)
    before = copy.copy(stream.counts)
    step(twin, pictures(), checkpointed=True)
    # the recomputation of each half ends before its last layer, whose output the backward does not need
    assert stream.counts.fetches - before.fetches == 6 + (6 - 2) + 6
    assert stream.counts.late == before.late and stream.counts.copies - before.copies == 8


def test_other_passes_in_between_get_the_right_weights():
    stream = Stream("cpu")
    model = layers()
    twin = stored(model, None, stream)
    expected = step(model, pictures())
    for _ in range(3):
        actual = step(twin, pictures())
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
        with torch.no_grad():  # a preview, and a part of the model alone
            assert torch.equal(twin(pictures()), expected[0])
            assert torch.equal(twin[8](torch.ones(1, 128)), model[8](torch.ones(1, 128)))
    late = stream.counts.late
    with torch.no_grad():
        twin(pictures())
    assert stream.counts.late == late  # by now the order of the preview is known too


def test_reading_a_streamed_weight_gives_a_copy():
    stream = Stream("cpu", buffers=2)
    model = layers()
    twin = stored(model, None, stream)
    read = [layer.weight for layer in frozen.frozen_layers(twin)]
    expected = [layer.weight for layer in model if hasattr(layer, "weight") and layer.weight.dim() > 1]
    assert all(torch.equal(a, b) for a, b in zip(read, expected, strict=True))


def test_refused_page_locked_memory_falls_back(monkeypatch, caplog):
    def refuse(self):
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    host = torch.zeros(4, dtype=torch.uint8)
    assert place.pinned(host) is host
    assert "refuses page-locked memory (CUDA error: out of memory)" in caplog.text


def test_one_buffer_is_refused():
    with pytest.raises(ValueError, match="cannot be filled ahead"):
        Stream("cpu", buffers=1)


# ---------- checkpointed inputs in host memory


def test_offloaded_checkpoints_give_the_same_gradients():
    model, x = layers(), pictures()
    expected = step(model, x, checkpointed=True)
    offload = place.Offload()
    run = memory.checkpointed(offload=offload)
    y = x.clone().requires_grad_(True)
    out = run(model[4:], run(model[:4], y))
    assert offload.counts.copies == 2  # the inputs of both halves, and nothing from inside
    assert offload.counts.bytes == 4 * (x.numel() + 2 * 64 * 8 * 8)
    out.square().sum().backward()
    assert offload.counts.fetches == 2
    assert all(torch.equal(a, b) for a, b in zip(expected, (out.detach(), y.grad), strict=True))


# ---------- compiled blocks


class Blocks(nn.Module):
    """Three equal blocks."""

    _repeated_blocks = ("Sequential",)

    def __init__(self) -> None:
        super().__init__()
        parts = [nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(3)]
        self.parts = nn.ModuleList(parts).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return x


# torch's own: it makes an object of every autograd function that it compiles (2.13)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", [None, "fp8", "nf4"])
@torch._dynamo.config.patch(recompile_limit=8)
def test_blocks_are_compiled_once_for_each_shape(kind):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Blocks()
    for layer in model.modules():
        if frozen.can_freeze(layer):
            frozen.freeze(layer)
            frozen.store(layer, kind)
    inputs = [torch.randn(n, 32) for n in (2, 5)]
    expected = [step(model, x) for x in inputs]
    counter = CompileCounter()
    memory.compile_blocks(model, counter)
    for _ in range(2):
        for x, values in zip(inputs, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(values, step(model, x), strict=True))
    assert counter.frame_count == 2  # one for each shape, and not one for each block
    torch._dynamo.reset()


@torch._dynamo.config.patch(recompile_limit=8)
def test_streamed_blocks_are_not_compiled():
    model, stream = Blocks(), Stream("cpu")
    frozen.freeze(model.parts[2][0])
    frozen.stream(model.parts[2][0], stream)
    memory.compile_blocks(model, "eager")
    assert [block._compiled_call_impl is not None for block in model.parts] == [True, True, False]
    with pytest.raises(Refused, match=r"--dynamo_backend inductr is not one of .*inductor"):
        memory.compile_blocks(model, "inductr")
