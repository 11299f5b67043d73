"""Gradient checkpointing, compilation, attention kernels and TensorFloat-32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowrank.errors import Refused, nearest
from lowrank.models import frozen
from lowrank.models.place import Offload

if TYPE_CHECKING:
    from diffusers import ModelMixin


def checkpointed(
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    offload: Offload | None = None,
) -> Callable:
    """A checkpoint function (module, *args) for diffusers' `enable_gradient_checkpointing(func)`;
    non-reentrant. With `offload` a block's inputs are kept in host memory.

    `around()` is called when a block runs forward and returns a context for its recomputation: what the block
    then reads from outside its arguments, such as the adapters' timestep, is what it was, whatever ran in
    between. One backward per forward, as the context is entered once.
    """

    def run(module: nn.Module, *args):
        with offload or contextlib.nullcontext():
            return checkpoint(
                module, *args, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), around())
            )

    run.offload = offload  # pyright: ignore[reportFunctionMemberAccess]  # read by `offload_of`
    return run


def checkpoint_blocks(
    denoiser: ModelMixin,
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    offload: Offload | None = None,
) -> None:
    """Recompute each block of a diffusers model in the backward instead of keeping its activations."""
    denoiser.enable_gradient_checkpointing(checkpointed(around, offload))


def offload_of(denoiser: nn.Module) -> Offload | None:
    """What keeps the inputs of a denoiser's checkpointed blocks in host memory; None if they stay."""
    functions = (getattr(part, "_gradient_checkpointing_func", None) for part in denoiser.modules())
    offloads = (getattr(function, "offload", None) for function in functions)
    return next((offload for offload in offloads if offload is not None), None)


def compile_blocks(denoiser: Any, backend: str | Callable) -> None:
    """Compile the repeated blocks of a diffusers model, once for each kind of block and shape of input.

    Adapters must be attached before; they are compiled with their hosts, without a graph break. Blocks whose
    weights are streamed are not compiled. Raises `Refused` for a backend that torch does not have.
    """
    known = torch._dynamo.list_backends(exclude_tags=())
    if isinstance(backend, str) and backend not in known:
        raise Refused(f"--dynamo_backend {backend} is not one of {', '.join(known)}{nearest(backend, known)}")
    # for this process: torch's 8 are too few, as every bucket has its own graphs
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    for block in denoiser.modules():
        streamed = any(layer.stream is not None for layer in frozen.frozen_layers(block))
        if type(block).__name__ in denoiser._repeated_blocks and not streamed:
            block.compile(backend=backend, fullgraph=True, dynamic=False)


def checkpoint_text(encoder: Any) -> None:
    """Recompute each layer of a text encoder of transformers in the backward; it is in training mode then."""
    enable = getattr(encoder, "activation_checkpointing_enable", None)  # its name since transformers 5
    (enable or encoder.gradient_checkpointing_enable)({"use_reentrant": False})
    encoder.train()


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
