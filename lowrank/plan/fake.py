"""Run code on tensors without values: shapes, dtypes and lifetimes are real, and nothing is computed.

torch's FakeTensorMode gives such tensors. Where code reads a value (`item`, `bool`, `equal`), it gets 1 or
True: finite, and on the branch that computes more. Fake tensors are on the CPU, because a build without CUDA
has no others; `cuda_autocast` gives operations the dtypes that autocast has on CUDA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_HALVES = (torch.float16, torch.bfloat16)
_AUTOCAST = torch._C.DispatchKey.AutocastCPU
# Operations of our models that autocast computes in fp32 on CUDA and not on the CPU: from AT_FORALL_FP32 in
# torch's ATen/autocast_mode.h.
_WIDE = (
    *("layer_norm", "native_layer_norm", "rms_norm", "group_norm", "upsample_nearest2d", "exp", "log"),
    *("reciprocal", "rsqrt", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus"),
)


class _UnknownValues(TorchDispatchMode):
    """Answer reads of a value that is not known: numbers are 1, comparisons True."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                return True  # aten.equal, aten.is_nonzero
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


@contextlib.contextmanager
def _cuda_autocast() -> Iterator[None]:
    """Inside autocast of the CPU, compute in fp32 what autocast of CUDA computes in fp32."""
    library = torch.library.Library("aten", "IMPL")
    for name in _WIDE:
        operation, _, overload = name.partition(".")
        overload = getattr(getattr(torch.ops.aten, operation), overload or "default")
        library.impl(name, partial(_in_fp32, overload), "AutocastCPU")
    try:
        yield
    finally:
        library._destroy()


def _in_fp32(operation: Callable, *args, **kwargs):
    def widened(value):
        return value.float() if isinstance(value, Tensor) and value.dtype in _HALVES else value

    args, kwargs = tree_map(widened, (args, kwargs))
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_AUTOCAST)):
        return operation(*args, **kwargs)


def _apply_in_place(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    """nn.Module._apply for tensors without values.

    torch's own swaps such parameters and fails, because FakeTensorMode keeps weak references to them (2.13).
    """
    for child in self.children() if recurse else ():
        child._apply(fn)
    for parameter in self._parameters.values():
        if parameter is not None:
            parameter.data = fn(parameter.data)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self


@contextlib.contextmanager
def without_values(cuda_autocast: bool) -> Iterator[None]:
    """Inside the block tensors have no values; real tensors that are met lose theirs."""
    rules = _cuda_autocast() if cuda_autocast else contextlib.nullcontext()
    apply, nn.Module._apply = nn.Module._apply, _apply_in_place
    try:
        with rules, FakeTensorMode(allow_non_fake_inputs=True), _UnknownValues():
            yield
    finally:
        nn.Module._apply = apply
