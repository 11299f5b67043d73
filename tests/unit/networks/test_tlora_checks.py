"""T-LoRA's checks that no other file holds: shapes of inputs, recomputation, sizes, half precision."""

from __future__ import annotations

import files
import pytest
import torch
from flux_adapters import flux, made
from tlora_reference import TIMES, out
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import shake

from lowrank.adapters import gate
from networks import tlora

__all__ = ["flux"]  # a fixture
R = 8


def test_linear_schedule_at_every_rank():
    """r = ⌊(T − t)(R − R_min)/T⌋ + R_min for all t in 0..1000, R in 1..128, R_min in 1..R."""
    t = torch.arange(0, 1001)
    for rank in range(1, 129):
        for least in range(1, rank + 1):
            want = (1000 - t) * (rank - least) // 1000 + least
            assert torch.equal(gate.open_ranks(t, rank, least), want), (rank, least)


def adapted(model, **arguments):
    network = tlora.create_network(
        1.0, R, float(R), None, [], model, target=".", tlora_min_rank="1", **arguments
    )
    network.apply_to([], model, False, True)
    return shake(network)


SHAPES = {  # of one sample's input: tokens are rows, (rows, tokens) or (rows, tokens, heads)
    "2-D": (lambda: nn.Linear(16, 12), (16,)),
    "3-D": (lambda: nn.Linear(16, 12), (5, 16)),
    "4-D": (lambda: nn.Linear(16, 12), (3, 5, 16)),
    "1×1 convolution": (lambda: nn.Conv2d(16, 12, 1), (16, 5, 4)),
    "3×3 convolution": (lambda: nn.Conv2d(16, 12, 3, stride=2, padding=1), (16, 7, 6)),
}


@pytest.mark.parametrize("orthogonal", ["True", "False"])
@pytest.mark.parametrize("kind", SHAPES)
def test_ranks_per_sample_of_any_shape(kind, orthogonal):
    """In float64: a CPU may choose another fp32 kernel for another batch size."""
    make, shape = SHAPES[kind]
    torch.manual_seed(0)
    model = nn.Sequential(make()).requires_grad_(False)
    network = adapted(model, orthogonal=orthogonal).double()
    model.double()
    x, times = torch.randn(3, *shape).double(), [0.0, 500.0, 999.0]
    with torch.no_grad():
        with network.denoise_at(torch.tensor(times)):
            together = model(x)
        for index, t in enumerate(times):
            with network.denoise_at(torch.tensor([t])):
                alone = model(x[index : index + 1])
            # one layer in float64, whose rounding is 1e-16
            torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(together[0], together[2], atol=1e-3)


def test_ranks_per_sample_on_sdxl():
    """In float64: a CPU may choose another fp32 kernel for another batch size."""
    unet = files.denoiser("sdxl")
    network = files.network("sdxl", "tlora", unet, tlora_min_rank="1").double()
    unet.double()
    times = torch.tensor([0.0, 500.0, 999.0])
    made = torch.Generator().manual_seed(3)
    x = torch.randn(3, 4, 8, 8, generator=made).double()
    text = torch.randn(3, 5, unet.config.cross_attention_dim, generator=made).double()
    added = {"text_embeds": torch.randn(3, 128, generator=made).double(), "time_ids": torch.ones(3, 6)}

    def ask(pick):
        given = {key: value[pick] for key, value in added.items()}
        return unet(x[pick], times[pick], text[pick], added_cond_kwargs=given, return_dict=False)[0]

    with torch.no_grad():
        together = ask(slice(None))
        for index in range(3):
            one = ask(slice(index, index + 1))
            assert one.dtype == torch.float64
            # float64 rounds at 1e-16; the unadapted network showed 3e-15
            torch.testing.assert_close(together[index : index + 1], one, rtol=0, atol=1e-11)
    network.restore()


@pytest.mark.parametrize("reentrant", [True, False])
def test_ranks_of_recomputed_forwards(reentrant):
    """The mask is there when a backward recomputes, also after another forward at another time."""

    class UNet2DConditionModel(nn.Module):  # a class whose timesteps are known
        def __init__(self) -> None:
            super().__init__()
            self.body, self.again = nn.Linear(16, 16), False

        def forward(self, x, timestep):
            return checkpoint(self.body, x, use_reentrant=reentrant) if self.again else self.body(x)

    torch.manual_seed(0)
    model = UNet2DConditionModel().requires_grad_(False)
    network, x = adapted(model), torch.randn(2, 5, 16, requires_grad=True)
    grads = []
    for model.again in (False, True):
        network.zero_grad()
        model(x, torch.tensor([400.0, 700.0])).square().sum().backward()
        grads.append([p.grad.clone() for p in network.parameters()])
    for one, two in zip(*grads, strict=True):
        assert (one - two).norm() <= 1e-6 * one.norm()
    (layer,) = network.layers()
    opened = int(gate.open_ranks(torch.tensor([400.0]), R, 1))
    assert int((layer.q_layer.grad.abs().sum(1) > 0).sum()) == opened < R


def test_memory_against_lora(flux):
    sizes = {}
    for name in ("lora", "tlora"):
        network = made(name, flux, None, R)
        held = [*network.parameters(), *network.buffers()]
        sizes[name] = sum(t.untyped_storage().nbytes() for t in held)
        network.restore()
    assert sizes["tlora"] <= 2.1 * sizes["lora"]


def test_half_precision_file(flux, tmp_path):
    """At most half a percent of the effect, here of a large one: P and P₀ are rounded apart."""
    network, outputs = shake(made("tlora", flux, None, R, tlora_min_rank="1"), 0.1), {}
    for dtype in (torch.float32, torch.bfloat16):
        path = tmp_path / f"{dtype}.safetensors"
        network.save_weights(str(path), dtype, {})
    want = [out(flux, [t, t], False) for t in TIMES]
    network.restore()
    base = [out(flux, [t, t], False) for t in TIMES]
    for dtype in (torch.float32, torch.bfloat16):
        again = made("tlora", flux, None, R, tlora_min_rank="1")
        again.load_weights(str(tmp_path / f"{dtype}.safetensors"))
        got = [out(flux, [t, t], False) for t in TIMES]
        again.restore()
        outputs[dtype] = max(
            float((a - b).norm() / (b - c).norm()) for a, b, c in zip(got, want, base, strict=True)
        )
    assert outputs[torch.float32] == 0 and outputs[torch.bfloat16] <= 5e-3
