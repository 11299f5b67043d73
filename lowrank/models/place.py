"""Where the weights of frozen layers are: on the device, or in host memory and copied ahead of use.

A training step uses its layers in one order: forward, backward, and with checkpointing each block's
recomputation. `Stream` notes in the first step what follows what, and copies the next weights on a side
stream while the present layer computes. It has a few buffers of the size of the largest weight, so that
device memory does not depend on how many layers are streamed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BUFFERS = 3  # one in use, one complete, one being filled


@dataclass
class Transfers:
    """What a `Stream` did: weights fetched, copies to the device, their bytes, and copies not made ahead."""

    fetches: int = 0
    copies: int = 0
    bytes: int = 0
    late: int = 0


class _Use(NamedTuple):
    """A layer's use: in which pass, and which layer."""

    backward: bool  # also while a checkpointed block is recomputed
    gradient: bool
    layer: int


class _Buffer:
    """Memory on the device for one weight, the layer whose weight it holds, and the event of its copy."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.layer: int | None = None
        self.copied: Any = None


class Stream:
    """Weights in host memory, as flat tensors of bytes, and their copies in buffers on the device.

    `fetch` returns a weight that is valid until the next `fetch`. The next uses are predicted by what
    followed the last two uses earlier. A wrong prediction costs a copy, and never gives a wrong weight.
    """

    def __init__(self, device: torch.device | str, buffers: int = BUFFERS) -> None:
        if buffers < 2:
            raise ValueError(f"{buffers} buffers cannot be filled ahead; give 2 or more")
        self.device, self.counts = torch.device(device), Transfers()
        self.weights: list[Tensor] = []
        self._count, self._buffers = buffers, list[_Buffer]()
        self._follows: dict[tuple[int, _Use], _Use] = {}  # (layer before, use) -> the use after it
        self._before, self._last = -1, _Use(False, False, -1)
        on_gpu = self.device.type == "cuda"
        self._side = torch.cuda.Stream(self.device) if on_gpu else None

    def add(self, weight: Tensor) -> int:
        """Move a flat tensor to host memory, pinned where the device is a GPU; returns its number."""
        host = weight.to("cpu")
        self.weights.append(pinned(host) if self.device.type == "cuda" else host)
        self._buffers.clear()  # they may be too small now
        return len(self.weights) - 1

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory."""
        return sum(weight.numel() for weight in self.weights)

    @property
    def device_bytes(self) -> int:
        """Bytes of the buffers on the device."""
        return self._count * max((weight.numel() for weight in self.weights), default=0)

    def fetch(self, layer: int) -> Tensor:
        """Return the flat tensor of a layer on the device, valid until the next call."""
        if not self._buffers:
            size = max(weight.numel() for weight in self.weights)
            self._buffers = [_Buffer(size, self.device) for _ in range(self._count)]
        self.counts.fetches += 1
        use = _Use(in_backward(), torch.is_grad_enabled(), layer)
        self._follows[self._before, self._last] = use
        self._before, self._last = self._last.layer, use
        ahead = list(self._predicted())
        buffer = next((buffer for buffer in self._buffers if buffer.layer == layer), None)
        if buffer is None:
            self.counts.late += 1
            buffer = self._copy(layer, keep=())
        if self._side is not None and buffer.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(buffer.copied)
        self._buffers.remove(buffer)
        self._buffers.append(buffer)  # in the order of use, the latest last
        for later in ahead:
            if all(other.layer != later for other in self._buffers):
                self._copy(later, keep=(layer, *ahead))
        return buffer.bytes[: self.weights[layer].numel()]

    def _predicted(self) -> Iterator[int]:
        """The layers that the buffers have room for besides the present one, in the order of use."""
        before, use = self._before, self._last
        for _ in range(self._count - 1):
            after = self._follows.get((before, use))
            if after is None:
                return
            yield after.layer
            before, use = use.layer, after

    def _copy(self, layer: int, keep: tuple[int, ...]) -> _Buffer:
        """Copy a weight into the buffer that was not used for longest, but for those to `keep`."""
        buffer = next(buffer for buffer in self._buffers if buffer.layer not in keep)
        weight, self.counts.copies = self.weights[layer], self.counts.copies + 1
        self.counts.bytes += weight.numel()
        target, buffer.layer = buffer.bytes[: weight.numel()], layer
        if self._side is None:
            target.copy_(weight)
            return buffer
        # all kernels that read the buffer's former weight are in the queue, since `fetch` was called again
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            target.copy_(weight, non_blocking=True)
            buffer.copied = self._side.record_event()
        return buffer


class Offload(torch.autograd.graph.saved_tensors_hooks):
    """While it is active, autograd keeps the tensors that it saves in host memory, pinned for a GPU.

    Around a checkpointed block these are the inputs of the block. Copies are queued behind the computation
    that made them, so no synchronisation is needed. A tensor that several blocks get, such as the text, is
    copied for each.
    """

    def __init__(self) -> None:
        self.counts = Transfers()
        self.copied: Callable[[Tensor], object] = lambda host: None  # gets each copy in host memory
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> tuple[torch.device, Tensor]:
        self.counts.copies += 1
        self.counts.bytes += tensor.numel() * tensor.element_size()
        host = torch.empty_like(tensor, device="cpu")
        if tensor.device.type == "cuda":
            host = pinned(host)
        self.copied(host)
        return tensor.device, host.copy_(tensor.detach(), non_blocking=True)

    def _unpack(self, packed: tuple[torch.device, Tensor]) -> Tensor:
        device, host = packed
        self.counts.fetches += 1
        return host.to(device, non_blocking=True, copy=True)


def in_backward() -> bool:
    """Whether autograd's engine runs, which also recomputes checkpointed blocks."""
    return torch._C._current_graph_task_id() != -1


def pinned(host: Tensor) -> Tensor:
    """The tensor in page-locked memory, which a GPU copies from at full speed while it computes.

    Where the system refuses more page-locked memory, returns `host` and warns.
    """
    try:
        return host.pin_memory()
    except RuntimeError as error:
        logger.warning(
            "the system refuses page-locked memory (%s); ordinary memory is used, from which a GPU copies "
            "slowly; raise the limit (ulimit -l), or lower --blocks_to_swap",
            str(error).splitlines()[0],
        )
        return host
