"""Count the bytes of live tensors while code runs: what is in memory at the peak, and by which part.

`LiveMemory` sees every tensor that an operation makes, counts its storage once, and forgets it when the
storage is freed. So it sees what autograd keeps. It counts real tensors and fake ones (`lowrank.plan.fake`)
alike. It does not see what a kernel allocates and frees inside one operation.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

GIB = 2**30
HOST = "host memory"


@dataclass(frozen=True)
class Phase:
    """The peak of one phase of a run in bytes, its parts, largest first, and its work."""

    name: str
    peak: int
    parts: tuple[tuple[str, int], ...]
    flops: int = 0  # floating-point operations of matrix products, convolutions and attention


class LiveMemory(TorchDispatchMode):
    """While it is entered, count live storages by part. `inputs`: also count what operations only read."""

    def __init__(self, inputs: bool = False) -> None:
        super().__init__()
        self.bytes = self.peak = self.flops = 0
        self.phases: list[Phase] = []
        self._inputs = inputs
        self._storages: dict[int, tuple[Any, int, str]] = {}  # by address: weak reference, bytes, part
        self._outside: dict[int, Any] = {}  # storages in host memory, by address
        self._parts: Counter[str] = Counter()
        self._peak_parts: dict[str, int] = {}
        self._labels = ["other tensors"]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and looking for that takes a third of the time

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._inputs:
            self.count(tree_iter((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        self.count((result,) if isinstance(result, Tensor) else tree_iter(result))
        return result

    def count(self, values: Iterable[Any]) -> None:
        """Count the tensors among `values` that are not counted yet, under the current part."""
        for value in values:
            if isinstance(value, Tensor):
                for tensor in _plain(value):
                    self._add(tensor.untyped_storage(), self._labels[-1])

    def _add(self, storage: torch.UntypedStorage, part: str) -> None:
        key = storage._cdata
        if key in self._storages or key in self._outside:
            return
        if part == HOST:
            self._outside[key] = weakref.ref(storage, partial(self._forget, key))
            return
        size = storage.nbytes()
        self._storages[key] = weakref.ref(storage, partial(self._drop, key)), size, part
        self.bytes += size
        self._parts[part] += size
        if self.bytes >= self.peak:  # also after a change of labels
            self.peak, self._peak_parts = self.bytes, dict(self._parts)

    def _drop(self, key: int, _reference: Any = None) -> None:
        _, size, part = self._storages.pop(key)
        self.bytes -= size
        self._parts[part] -= size

    @contextlib.contextmanager
    def part(self, label: str) -> Iterator[None]:
        """Count new tensors under `label` for a block; those of `HOST` are in host memory and not counted."""
        self._labels.append(label)
        try:
            yield
        finally:
            self._labels.pop()

    def relabel(self, tensors: Iterable[Tensor], label: str) -> None:
        """Move tensors to another part; those that are not counted yet are counted."""
        for tensor in (plain for value in tensors for plain in _plain(value)):
            storage = tensor.untyped_storage()
            if storage._cdata in self._outside:
                continue
            if storage._cdata in self._storages:
                self._drop(storage._cdata)
            self._add(storage, label)

    def leave(self, tensors: Iterable[Tensor]) -> None:
        """Stop counting tensors: they are in host memory."""
        for tensor in (plain for value in tensors for plain in _plain(value)):
            storage = tensor.untyped_storage()
            if (key := storage._cdata) in self._storages:
                self._drop(key)
            self._outside[key] = weakref.ref(storage, partial(self._forget, key))

    def _forget(self, key: int, _reference: Any) -> None:
        self._outside.pop(key, None)

    def enter(self, tensors: Iterable[Tensor], label: str) -> None:
        """Count tensors again that had left for host memory."""
        tensors = list(tensors)
        for tensor in (plain for value in tensors for plain in _plain(value)):
            self._outside.pop(tensor.untyped_storage()._cdata, None)
        self.relabel(tensors, label)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the peak of a block as a `Phase`."""
        self.peak, self._peak_parts, before = self.bytes, dict(self._parts), self.flops
        yield
        parts = sorted(((size, part) for part, size in self._peak_parts.items() if size), reverse=True)
        self.phases.append(
            Phase(name, self.peak, tuple((part, size) for size, part in parts), self.flops - before)
        )

    def watch(self, model: nn.Module, what: str) -> None:
        """Count what the children of a module make under their names; lists of blocks as one part."""
        for name, child in model.named_children():
            for block in child if isinstance(child, nn.ModuleList) else (child,):
                label = f"{what} in {name}"
                block.register_forward_pre_hook(lambda *_, label=label: self._labels.append(label))
                # also after an exception: a recomputation ends with one when it has all that it needs
                block.register_forward_hook(lambda *_: self._labels.pop() and None, always_call=True)


def _plain(value: Tensor) -> Iterator[Tensor]:
    """The tensors with memory inside a tensor: itself, or the parts of a wrapper such as a quantised one."""
    flatten = getattr(value, "__tensor_flatten__", None)
    if flatten is None:
        if value.device.type != "meta":
            yield value
        return
    for name in flatten()[0]:
        yield from _plain(getattr(value, name))
