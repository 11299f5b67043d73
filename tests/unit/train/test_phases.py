"""Memory that runs out becomes one sentence: the phase, the setting to change, the last checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowrank.errors import Refused
from lowrank.train.phases import phase

ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:114] . DefaultCPUAllocator: can't allocate memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_out_of_memory_is_one_sentence(kind):
    with (
        pytest.raises(
            Refused, match=r"out of memory while training \(.+\); give --x; the last checkpoint"
        ) as told,
        phase("training", "give --x", lambda: Path("out/checkpoint-2")),
    ):
        raise ERRORS[kind]
    assert "\n" not in str(told.value) and "out/checkpoint-2" in str(told.value)
    with pytest.raises(Refused, match=r"give --x$"), phase("training", "give --x"):
        raise ERRORS[kind]


@pytest.mark.parametrize(("predicted", "shown"), [("it needs 3 GiB", "it needs 3 GiB; "), ("", "")])
def test_prediction_is_in_the_sentence(predicted, shown):
    with (
        pytest.raises(Refused, match=rf"\); {shown}give --x$"),
        phase("training", "give --x", None, lambda: predicted),
    ):
        raise ERRORS["cuda"]


def test_real_allocation_that_fails():
    """An allocation of 2^60 bytes fails on every machine; the text is that of this version of torch."""
    with pytest.raises(Refused, match="out of memory while training"), phase("training", "give --x"):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_other_errors_pass():
    for error in (RuntimeError("shapes differ"), ValueError("x"), Refused("y")):
        with pytest.raises(type(error), match=str(error)), phase("training", "give --x"):
            raise error
