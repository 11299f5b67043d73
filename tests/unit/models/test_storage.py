"""Kinds of storage: bytes, errors, and the numbers of bitsandbytes' NF4."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank.models import storage
from lowrank.models.storage import KINDS, Format

# Relative error ‖W' − W‖/‖W‖ of normal weights: half the distance of neighbouring numbers, root mean square.
# bf16 2⁻⁹·0.85; e4m3 2⁻⁴·0.42, more below its normal numbers; int8 σ·3/127/√12 in groups of 128; NF4 QLoRA's.
ERRORS = {"bf16": 0.0018, "fp16": 0.00025, "fp32": 0, "fp8": 0.036, "fp8_scaled": 0.028, "int8": 0.0075}
ERRORS["nf4"] = 0.095


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(96, 256), (64, 32, 3, 3), (7, 10)], ids=str)
def test_error_and_size(kind, shape):
    weight, form = weights(*shape), Format(kind, shape, torch.float32)
    flat = form.store(weight)
    assert flat.dtype == torch.uint8 and flat.shape == (form.bytes,)
    dense = form.dense(flat)
    assert dense.shape == shape and dense.dtype == torch.float32
    # small weights have few blocks, whose largest value is nearer
    assert (dense - weight).norm() <= ERRORS[kind] * (1.35 if weight.numel() < 1000 else 1) * weight.norm()
    assert form.exact == (kind == "fp32")
    if weight.numel() > 1000:
        most = {"nf4": 0.53, "int8": 1.04, "fp8": 1, "fp8_scaled": 1.02, "bf16": 2, "fp16": 2, "fp32": 4}
        assert form.bytes <= most[kind] * weight.numel() + 128


@pytest.mark.parametrize("kind", ["fp8", "fp8_scaled", "int8", "nf4"])
def test_extreme_weights(kind):
    weight = torch.zeros(4, 64)
    weight[1], weight[2, 3], weight[3] = 1000.0, -1e-6, torch.linspace(-5e-4, 5e-4, 64)
    form = Format(kind, (4, 64), torch.float32)
    dense = form.dense(form.store(weight))
    assert torch.isfinite(dense).all() and not dense[0].any()
    # float8's largest number; scales have no limit, and float8 has steps of 1/16 at most
    assert dense[1, 0] == {"fp8": 448, "fp8_scaled": 1024}.get(kind, 1000)
    if kind == "fp8_scaled":  # 5e-4 is below float8's smallest normal number
        assert (dense[3] - weight[3]).abs().max() < 0.07 * 5e-4


def test_stored_values_stay_when_stored_again():
    for kind in ("bf16", "fp8", "fp8_scaled"):
        form = Format(kind, (96, 256), torch.float32)
        dense = form.dense(form.store(weights(96, 256)))
        assert torch.equal(form.dense(form.store(dense)), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_that_of_bitsandbytes(dtype, monkeypatch):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight, form = weights(300, 512), Format("nf4", (300, 512), dtype)
    flat = form.store(weight)
    values = next(part for part in form.parts if part.name == "values")
    theirs, state = functional.quantize_4bit(weight, quant_type="nf4")
    differ = (flat[values.start : values.stop] != theirs.flatten()).float().mean()
    assert differ < 1e-4  # a value between two numbers may fall on either side
    ours = form.dense(flat)
    monkeypatch.setattr(storage, "_bitsandbytes", lambda: False)
    assert torch.equal(form.dense(flat), ours)  # their kernel and torch's operations
    # scales have 8 bits here: at most 1/254 of the spread in 256 scales
    dequantised = functional.dequantize_4bit(theirs, state)
    assert (ours.float() - dequantised).norm() < 0.004 * weight.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_fake_tensors_have_the_sizes(kind):
    form = Format(kind, (64, 32, 3, 3), torch.bfloat16)
    with FakeTensorMode():
        flat = form.store(torch.empty(64, 32, 3, 3))
        dense = form.dense(flat)
    assert flat.shape == (form.bytes,) and dense.shape == (64, 32, 3, 3) and dense.dtype == torch.bfloat16
