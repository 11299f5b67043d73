"""Blocks of the families: which layers are stored in another kind, and which are swapped."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from lowrank.errors import Refused
from lowrank.models import blocks, frozen
from lowrank.models.family import Source
from lowrank.models.sd import SD15
from lowrank.models.sdxl import SDXL


@pytest.fixture(scope="module")
def flux_dev() -> nn.Module:
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True)


@pytest.mark.parametrize(("count", "double", "single"), [(1, 0, 2), (2, 1, 2), (18, 9, 18), (35, 17, 36)])
def test_flux_blocks_are_counted_as_in_kohyas_scripts(flux_dev, count, double, single):
    names = [type(block).__name__ for block in blocks.swapped(flux_dev, count)]
    assert names == ["FluxTransformerBlock"] * double + ["FluxSingleTransformerBlock"] * single


def test_too_many_blocks(flux_dev, tiny_sd):
    message = r"--blocks_to_swap 36 exceeds 35: .* 19 double and 38 single .*; give 35 or less"
    with pytest.raises(Refused, match=message):
        blocks.swapped(flux_dev, 36)
    unet = SD15.empty(SD15.load(Source(str(tiny_sd)), ()))
    count = sum(map(len, blocks.stacks(unet)))
    assert len(blocks.swapped(unet, count - 2)) == count - 2
    with pytest.raises(Refused, match=f"exceeds {count - 2}: this model has {count} blocks"):
        blocks.swapped(unet, count - 1)


SIZES = [(None, 22.1, 22.2), ("fp8", 11.1, 11.3), ("nf4", 5.8, 6.0)]


@pytest.mark.parametrize(("kind", "low", "high"), SIZES)
def test_bytes_of_flux_dev(flux_dev, kind, low, high):
    device, host = blocks.base_bytes(flux_dev, torch.bfloat16, kind)
    assert low <= device / 2**30 <= high and host == 0
    swapped, host = blocks.base_bytes(flux_dev, torch.bfloat16, kind, 35)
    assert swapped < 0.25 * device and 0.8 * device < host < device


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_base_bytes_are_those_of_the_stored_model(kind, tiny_sdxl):
    family = SDXL
    models = family.load(Source(str(tiny_sdxl), dtype=torch.bfloat16), ("denoiser",))
    predicted = blocks.base_bytes(family.empty(models), torch.bfloat16, kind, 10)
    blocks.freeze_base(models.denoiser)
    stream = blocks.store_base(models.denoiser, kind, 10)
    assert stream is not None
    on_device = frozen.stored_bytes(models.denoiser) - stream.host_bytes + stream.device_bytes
    assert predicted == (on_device, stream.host_bytes)


def test_quantised_base_is_refused():
    bnb = pytest.importorskip("bitsandbytes")

    class Unet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_blocks = nn.ModuleList([bnb.nn.Linear4bit(64, 64, quant_type="nf4").to("cpu")])
            self.mid_block, self.up_blocks = None, nn.ModuleList()

    with pytest.raises(Refused, match="quantised already"):
        blocks.freeze_base(Unet())


def test_stored_and_swapped_unet_computes_as_the_stored_one(tiny_sd):
    models = SD15.load(Source(str(tiny_sd)), ("denoiser", "text"))
    text = {"context": SD15.encode_text(models, ["a dog"], SD15.options())[0]["context"][None]}
    z, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([400])
    outputs = []
    for swap in (0, 6):
        unet = copy.deepcopy(models.denoiser)
        blocks.freeze_base(unet)
        blocks.store_base(unet, "nf4", swap)
        noisy = z.clone().requires_grad_(True)
        SD15.denoise(unet, noisy, t, text).square().mean().backward()
        outputs.append(noisy.grad)
    assert torch.equal(*outputs) and outputs[0].any()
