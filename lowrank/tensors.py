"""Files of tensors: read any dialect, write whole or not at all, with the hashes that interfaces show."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lowrank.errors import Refused
from lowrank.files import atomic, existing_file, parse_json

_PICKLES = (".pt", ".pth", ".ckpt", ".bin")
# What torch's restricted unpickler raises over code, and over bytes that are no checkpoint at all.
NOT_A_PICKLE = (
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def has_values(tensor: Tensor) -> bool:
    """False on the meta device and for fake tensors, which have a shape and no values."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, or of a `.pt`/`.pth`/`.ckpt`/`.bin` dictionary of tensors.

    Of such a dictionary what is no tensor is left out, and one under `state_dict` is taken instead of it.
    """
    path = existing_file(path)
    if path.suffix.lower() in _PICKLES:
        return _unpickled(path), {}
    with _safetensors(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # with arithmetic


def is_plain(value: Tensor) -> bool:
    """Whether a tensor from a file has a dtype with arithmetic, and finite values only."""
    plain = value.layout == torch.strided and value.dtype in FLOATS
    return plain and bool(torch.isfinite(value).all())


def read_names(path: str | os.PathLike) -> list[str]:
    """The names of the tensors that `read_tensors` reads; of safetensors only the table is read.

    Raises `Refused` as it does: a table and a file that is too short for it are not a whole file.
    """
    path = existing_file(path)
    if path.suffix.lower() in _PICKLES:
        return list(_unpickled(path))
    with _safetensors(path) as file:
        return list(file.keys())


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise Refused(
            f"{path} is not a whole safetensors file ({error}); it may be half-written, use another"
        ) from error


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        # mapped, not read, where the format allows: a part of a checkpoint then costs that part
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except NOT_A_PICKLE as error:  # its text advises to run the file's code
        raise Refused(
            f"{path} is damaged or holds more than tensors, and code in it is not run; convert it to "
            ".safetensors where it was made"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    items = state.items() if isinstance(state, Mapping) else ()
    tensors = {key: value.detach() for key, value in items if isinstance(value, Tensor)}
    if not tensors or not all(isinstance(key, str) for key in tensors):
        raise Refused(
            f"{path} holds no dictionary of named tensors but a {type(state).__name__}; save the "
            "state dict as .safetensors"
        )
    return tensors


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a safetensors file without its tensors; empty for other formats and absent files."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError:
        return {}  # whoever reads the tensors says what is wrong


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file with kohya's two model hashes added to its metadata; whole or not at all.

    `sshs_model_hash` is the SHA-256 of the bytes after the header; `sshs_legacy_hash` the first 8 hex digits
    of the SHA-256 of bytes 0x100000–0x110000 of the file as it would be with only the `ss_*` metadata.
    """
    copies = {key: value.detach().to("cpu").contiguous().clone() for key, value in tensors.items()}
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    data = serialize(copies, training)
    header = 8 + int.from_bytes(data[:8], "little")
    hashes = {
        "sshs_model_hash": hashlib.sha256(memoryview(data)[header:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(memoryview(data)[0x100000:0x110000]).hexdigest()[:8],
    }
    del data
    with atomic(path) as part:
        save_file(copies, part, {**metadata, **hashes})


DTYPES = {  # by the names that safetensors headers use
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}


class Entry(NamedTuple):
    """A tensor of a safetensors file, as its header tells."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # of its bytes in the file


class TensorFile:
    """A safetensors file whose tensors are read by rows, so that none is ever whole in memory.

    Plain reads, not a mapping: pages of a mapping count as memory of the process. Raises `Refused`.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = existing_file(path)
        with _safetensors(self.path) as file:  # checks the header against the file
            self.metadata = dict(file.metadata() or {})
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length), path)
        header.pop("__metadata__", None)
        strange = {entry["dtype"] for entry in header.values()} - DTYPES.keys()
        if strange:
            raise Refused(f"{path} holds tensors of type {', '.join(sorted(strange))}; use another precision")
        self.entries = {
            name: Entry(DTYPES[e["dtype"]], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
            for name, e in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
        }

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor's first axis, in its own dtype; all of it by default."""
        entry = self.entries[name]
        count = entry.shape[0] if entry.shape else 1
        stop = count if stop is None else min(stop, count)
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        data = bytearray((stop - start) * row)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(entry.start + start * row)
            view, filled = memoryview(data), 0
            while filled < len(data) and (got := file.readinto(view[filled:])):
                filled += got
        if filled < len(data):
            raise Refused(f"{self.path} became shorter while it was read; fetch it again")
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        return torch.frombuffer(data, dtype=entry.dtype).reshape(shape) if data else torch.empty(shape)


# Metadata with the SHA-256 of a file's tensors, and what stands before it: kohya's, Stability's modelspec
CONTENT_HASHES: Mapping[str, str] = MappingProxyType({"sshs_model_hash": "", "modelspec.hash_sha256": "0x"})


def stream_pieces(
    path: str | os.PathLike,
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    make: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file a piece at a time: `make(name)` gives each tensor's rows, in order, when its
    turn comes, in the dtype announced.

    Format: 8 bytes little-endian header length, a JSON header with dtype, shape and byte offsets, then the
    bytes. `CONTENT_HASHES` that are in `metadata` get the SHA-256 of the bytes after the header.
    """
    hashes = [name for name in CONTENT_HASHES if name in metadata]
    metadata = {**metadata, **{name: CONTENT_HASHES[name] + "0" * 64 for name in hashes}}
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in entries.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": names[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        digest = hashlib.sha256()
        for name, (dtype, shape) in entries.items():
            left = math.prod(shape)
            for tensor in make(name):
                left -= tensor.numel()
                if tensor.numel():
                    flat = tensor.to("cpu", dtype).contiguous().reshape(-1)
                    data = flat.view(torch.uint8).numpy().data
                    file.write(data)
                    if hashes:
                        digest.update(data)
            if left:
                raise ValueError(f"{name} is {left} elements short of the {tuple(shape)} announced")
        if hashes:
            header["__metadata__"] |= {name: CONTENT_HASHES[name] + digest.hexdigest() for name in hashes}
            file.seek(8)  # as long as before
            file.write(json.dumps(header).encode())


def stream_tensors(
    path: str | os.PathLike,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    make: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """`stream_pieces` of whole tensors of one dtype: `make(name)` gives each when its turn comes."""

    def whole(name: str) -> Iterable[Tensor]:
        tensor = make(name)
        if tuple(tensor.shape) != tuple(shapes[name]):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, announced as {tuple(shapes[name])}")
        yield tensor

    stream_pieces(path, {name: (dtype, tuple(shape)) for name, shape in shapes.items()}, whole, metadata)
