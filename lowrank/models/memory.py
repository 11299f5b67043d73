"""What trades time for memory: gradient checkpointing, float8 storage of the frozen base, and how much was
used.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank.errors import Refused

if TYPE_CHECKING:
    from diffusers import ModelMixin


def checkpointed(
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Callable:
    """A checkpoint function (module, *args) for diffusers' `enable_gradient_checkpointing(func)`;
    non-reentrant.

    `around()` is called when a block runs forward and returns a context for its recomputation: what the block
    then reads from outside its arguments, such as the adapters' timestep, is what it was, whatever ran in
    between. One backward per forward, as the context is entered once.
    """

    def run(module: nn.Module, *args):
        return checkpoint(
            module, *args, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), around())
        )

    return run


def checkpoint_blocks(
    denoiser: ModelMixin, around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
) -> None:
    """Recompute each block of a diffusers model in the backward instead of keeping its activations."""
    denoiser.enable_gradient_checkpointing(checkpointed(around))


def checkpoint_text(encoder: Any) -> None:
    """Recompute each layer of a text encoder of transformers in the backward; it is in training mode then."""
    enable = getattr(encoder, "activation_checkpointing_enable", None)  # its name since transformers 5
    (enable or encoder.gradient_checkpointing_enable)({"use_reentrant": False})
    encoder.train()


def store_in_fp8(denoiser: ModelMixin, compute_dtype: torch.dtype) -> None:
    """Keep the frozen base in float8_e4m3fn and widen each layer only while it computes (diffusers' layerwise
    casting).

    Half of bf16's memory for the weights; norms, modulations and the outermost projections keep their
    precision. It pays in training only together with gradient checkpointing: without it, autograd keeps the
    widened weights. Do it before adapters are attached. Raises `Refused` for float32, and for a base that is
    quantised already.
    """
    if compute_dtype not in (torch.bfloat16, torch.float16):
        raise Refused(
            f"--fp8_base computes in half precision, not {compute_dtype}; add --mixed_precision bf16"
        )
    odd = next((name for name, p in denoiser.named_parameters() if not p.is_floating_point()), None)
    if odd:
        raise Refused(
            f"--fp8_base needs an ordinary base, but {odd} is already quantised; leave one of the two out"
        )
    outermost = ("conv_in", "conv_out")
    convolutions = [
        module
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Conv2d) and name not in outermost
    ]
    denoiser.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=compute_dtype, skip_modules_classes=(nn.Conv2d,)
    )
    for module in convolutions:
        module.to(torch.float8_e4m3fn)
        module.forward = functools.partial(_convolve, module, compute_dtype)


def _convolve(module: nn.Conv2d, dtype: torch.dtype, input: Tensor) -> Tensor:
    """A convolution with its weight widened for this call.

    Layerwise casting changes the weight in place, and a convolution's backward keeps that very weight.
    """
    bias = None if module.bias is None else module.bias.to(dtype)
    return module._conv_forward(input.to(dtype), module.weight.to(dtype), bias)


def attention(denoiser: ModelMixin, name: str) -> None:
    """Choose the attention kernels: "sdpa" (torch's own choice among its kernels), "xformers", or where the
    model's processors ask for one (FLUX's do, U-Nets' do not) any backend name of diffusers.
    """
    processors = (getattr(module, "processor", None) for module in denoiser.modules())
    try:
        if any(hasattr(processor, "_attention_backend") for processor in processors):
            denoiser.set_attention_backend("native" if name == "sdpa" else name)
        elif name == "xformers":
            denoiser.enable_xformers_memory_efficient_attention()
        elif name != "sdpa":
            raise ValueError("a U-Net has torch's kernels and xformers'")
    except (ValueError, RuntimeError, ImportError) as error:
        raise Refused(
            f"attention {name!r} is not available here ({str(error).splitlines()[0]}); use sdpa"
        ) from error


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TensorFloat-32 in fp32 matrix products on CUDA for a block; the setting is restored."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
