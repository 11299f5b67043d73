"""A simulated accelerator: tensors report the device `sim:0`, hold their numbers on the CPU, refuse others.

`start()` registers the device for the whole process and cannot be undone, so tests run it in a process of its
own. It shows without a GPU: a tensor that was left on the CPU, a CPU generator for a tensor of the device,
the transfers with their bytes and order, and every point where the host waits for the device. It does not
show memory, speed, streams (all operations run in order) or the rounding of a GPU's kernels.

torch offers the registration as an experiment (`_setup_privateuseone_for_python_backend`). The rules are
CUDA's: CPU scalars and CPU indices may meet tensors of the device, a copy that is not `non_blocking` waits,
and autocast casts by CUDA's lists, as far as diffusion models use them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "sim"

# operations that copy between devices, and operations whose indices may be on the CPU
_COPIES = ("aten::_to_copy", "aten::copy_", "aten::_copy_from")
_INDEXED = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")
# operations whose result or size the host has to read; CUDA's kernels wait there
_READS = (
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::equal"),
    *("aten::_unique2", "aten::is_nonzero", "aten::repeat_interleave"),
)
# CUDA's lists of torch.autocast: products in half precision, the rest that is named in fp32
_HALF = (
    *("mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "matmul", "linear", "_convolution"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose2d.input", "scaled_dot_product_attention"),
)
_FULL = (
    *("layer_norm", "native_layer_norm", "group_norm", "softmax.int", "log_softmax.int", "exp", "log"),
    *("pow.Tensor_Scalar", "pow.Tensor_Tensor", "rsqrt", "reciprocal", "softplus", "mse_loss", "l1_loss"),
    *("huber_loss", "smooth_l1_loss", "sum", "sum.dim_IntList", "prod", "cumsum", "cumprod"),
    *("norm.Scalar", "linalg_vector_norm", "cosine_similarity"),
)


class Transfer(NamedTuple):
    """A copy between the CPU and the device."""

    to: str  # "device" or "host"
    shape: tuple[int, ...]
    bytes: int


@dataclass
class Traffic:
    """What passed between the CPU and the device in a block."""

    transfers: list[Transfer] = field(default_factory=list)  # in their order
    waits: list[str] = field(default_factory=list)  # operations at which the host waited for the device


_traffic: list[Traffic] = []  # the blocks of `watched` that are open


@contextlib.contextmanager
def watched() -> Iterator[Traffic]:
    """Record the traffic of a block."""
    traffic = Traffic()
    _traffic.append(traffic)
    try:
        yield traffic
    finally:
        _traffic.remove(traffic)


class SimulatedTensor(torch.Tensor):
    """A tensor of the device; `raw` holds its numbers on the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self, **_):
        return f"SimulatedTensor({self.raw})"

    def __reduce_ex__(self, protocol):  # as torch pickles a device's tensor that has no storage of its own
        make = torch._utils._rebuild_device_tensor_from_cpu_tensor
        return make, (self.raw, self.dtype, str(self.device), self.requires_grad)


class _Everywhere(TorchDispatchMode):
    """Also sees the calls without a tensor of the device: factories and copies to it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})


def _mapped(change: Callable, value: Any) -> Any:
    """`change` of every tensor in a value or in nested lists; quicker than torch's tree_map."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(change, item) for item in value])
    return value


def _mapped_call(change: Callable, function: Callable, args: Sequence, kwargs: Mapping) -> Any:
    return function(
        *[_mapped(change, value) for value in args],
        **{name: _mapped(change, value) for name, value in kwargs.items()},
    )


def _raw(value: Tensor) -> Tensor:
    return value.raw if isinstance(value, SimulatedTensor) else value


def _call(function, args, kwargs):
    tensors: list[Tensor] = []
    _mapped(tensors.append, (*args, *kwargs.values()))
    ours = [value for value in tensors if isinstance(value, SimulatedTensor)]
    device = kwargs.get("device")
    asked = device is not None and torch.device(device).type == NAME
    if not ours and not asked:
        return function(*args, **kwargs)
    name = function._schema.name
    if name in _COPIES:
        on_device = asked if device is not None else isinstance(args[0], SimulatedTensor)
        _record_copy(name, args, kwargs, on_device)
    else:
        on_device = True
        _check(name, tensors, kwargs.get("generator"))
        if name in _READS:
            for traffic in _traffic:
                traffic.waits.append(name)
    changed = {"device": "cpu"} if asked else {}
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"} | changed
    result = _mapped_call(_raw, function, args, kwargs)
    if not on_device:
        return result
    known = {id(value.raw): value for value in ours}  # an operation in place returns its argument
    return _mapped(lambda value: known[id(value)] if id(value) in known else SimulatedTensor(value), result)


def _check(name: str, tensors: list[Tensor], generator: torch.Generator | None) -> None:
    """Raise as CUDA does for a CPU tensor or a CPU generator."""
    strangers = [t for t in tensors if not isinstance(t, SimulatedTensor) and t.dim() > 0]
    if strangers and not (name in _INDEXED and isinstance(tensors[0], SimulatedTensor)):
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, but found {NAME}:0 and "
            f"{strangers[0].device} of shape {tuple(strangers[0].shape)}"
        )
    if generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"{name}: expected a generator of {NAME}, but found one of {generator.device}")


def _record_copy(name: str, args, kwargs, on_device: bool) -> None:
    source = args[1] if name == "aten::copy_" else args[0]
    if name == "aten::_copy_from":
        on_device = isinstance(args[1], SimulatedTensor)
    if isinstance(source, SimulatedTensor) == on_device or source.dim() == 0 == source.numel():
        return
    to = "device" if on_device else "host"
    blocking = not kwargs.get(
        "non_blocking", args[2] if name != "aten::_to_copy" and len(args) > 2 else False
    )
    for traffic in _traffic:
        traffic.transfers.append(Transfer(to, tuple(source.shape), source.numel() * source.element_size()))
        if blocking:
            traffic.waits.append(f"copy to the {to}")


class _Backend(backend_registration._DummyBackendModule):
    """The module `torch.sim`."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device=None):
        for traffic in _traffic:
            traffic.waits.append("synchronize")

    def empty_cache(self):
        pass

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        pass

    def manual_seed(self, seed):
        pass


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return SimulatedTensor(torch.empty_strided(size, stride, dtype=dtype))


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return SimulatedTensor(torch.empty(size, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    _raw(target).copy_(_raw(source))
    return target


def _casting(operation, half: bool):
    """The operation with its floating tensors cast, as torch.autocast does for CUDA."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value):
        if not value.is_floating_point() or value.dtype == torch.float64:
            return value
        return value.to(torch.get_autocast_dtype(NAME) if half else torch.float32)

    def call(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return _mapped_call(cast, operation, args, kwargs)

    return call


_libraries: list[torch.library.Library] = []  # a registration lives as long as its library
_modes: list[TorchDispatchMode] = []


def start() -> None:
    """Make `sim` the accelerator of this process, for torch and for accelerate's Accelerator."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    aten, every = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    aten.impl("empty_strided", _empty_strided, "PrivateUse1")
    aten.impl("empty.memory_format", _empty, "PrivateUse1")
    aten.impl("_copy_from", _copy_from, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for names, half in ((_HALF, True), (_FULL, False)):
        for name in names:
            packet, _, overload = name.partition(".")
            operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
            aten.impl(name, _casting(operation, half), "AutocastPrivateUse1")
    _libraries.extend((aten, every))
    _modes.append(_Everywhere())
    _modes[0].__enter__()
