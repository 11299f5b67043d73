"""How the weight of a frozen layer is stored: as numbers of another type, or quantised.

| kind       | stored                                                        | bytes per value |
|------------|---------------------------------------------------------------|-----------------|
| bf16, fp16, fp32 | the values                                              | 2, 2, 4         |
| fp8        | float8_e4m3fn                                                 | 1               |
| fp8_scaled | float8_e4m3fn and one power of two per row                    | 1 + 4/I         |
| int8       | 8 bits and one scale per row and 128 inputs                   | 1 + 4/128       |
| nf4        | 4 bits, one 8-bit scale per 64 values, one fp32 per 256 scales | 0.516           |

A weight W (O, I…) is stored in one flat tensor of bytes, so that moving, counting and writing it is alike
for every kind. All functions are torch's own operations without a synchronisation: they run on every device,
under fake tensors and in a compiled model. NF4 is QLoRA's (arXiv 2305.14314, appendix E) with bitsandbytes'
order of bits, so that its CUDA kernel reads the bytes.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.tensors import has_values

PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = (*PLAIN, "fp8", "fp8_scaled", "int8", "nf4")
_FP8 = torch.float8_e4m3fn
_ALIGNED = 64  # bytes: where parts of the flat tensor begin
_INT8_GROUP = 128  # inputs with one scale, where they divide the width
_NF4_BLOCK, _NF4_GROUP = 64, 256  # values with one scale, and scales with one fp32
_PIECE = 1 << 22  # values that are quantised, or widened from NF4, at a time: bounds the fp32 temporaries
# quantiles of the normal distribution, QLoRA's appendix E
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def plain_kind(dtype: torch.dtype) -> str:
    """The kind that stores the values of a dtype as they are."""
    return next(name for name, value in PLAIN.items() if value is dtype)


class Part(NamedTuple):
    """One tensor in the flat one: its name, type, shape, and the byte at which it begins."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Format:
    """How one weight is stored: its kind, its shape (O, I…), and the dtype in which it computes."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is not one of {KINDS}")

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        """What the flat tensor consists of."""
        outs, size = self.shape[0], math.prod(self.shape)
        shapes: list[tuple[str, torch.dtype, tuple[int, ...]]]
        if self.kind in PLAIN:
            shapes = [("values", PLAIN[self.kind], self.shape)]
        elif self.kind == "nf4":
            blocks = math.ceil(size / _NF4_BLOCK)
            groups = math.ceil(blocks / _NF4_GROUP)
            shapes = [
                ("values", torch.uint8, (blocks * _NF4_BLOCK // 2,)),
                ("scales", torch.int8, (groups * _NF4_GROUP,)),
                ("groups", torch.float32, (groups,)),
                ("offset", torch.float32, (1,)),
            ]
        else:
            shapes = [("values", torch.int8 if self.kind == "int8" else _FP8, self.shape)]
            if self.kind == "fp8_scaled":
                shapes.append(("scales", torch.float32, (outs, 1)))
            elif self.kind == "int8":
                shapes.append(("scales", torch.float32, (outs, size // outs // self._int8_group)))
        parts, start = [], 0
        for name, dtype, shape in shapes:
            parts.append(Part(name, dtype, shape, start))
            start = math.ceil(parts[-1].stop / _ALIGNED) * _ALIGNED
        return tuple(parts)

    @property
    def _int8_group(self) -> int:
        width = math.prod(self.shape[1:])
        return _INT8_GROUP if width % _INT8_GROUP == 0 else width

    @property
    def bytes(self) -> int:
        """The length of the flat tensor."""
        return self.parts[-1].stop

    @property
    def exact(self) -> bool:
        """Whether `dense` returns the stored weight bit for bit, if it has the dtype that computes."""
        return PLAIN.get(self.kind) is self.dtype

    def store(self, weight: Tensor) -> Tensor:
        """Store a weight: the flat tensor (bytes,) uint8, on the weight's device."""
        flat = torch.zeros(self.bytes, dtype=torch.uint8, device=weight.device)
        if not has_values(weight):
            return flat
        weight = weight.detach()
        if self.kind == "nf4":
            for name, value in _nf4(weight).items():
                self._part(flat, name).copy_(value)
            return flat
        start = 0
        for rows in row_pieces(weight):
            for name, value in self._quantised(rows).items():
                self._part(flat, name)[start : start + len(rows)].copy_(value)
            start += len(rows)
        return flat

    def _part(self, flat: Tensor, name: str) -> Tensor:
        return _view(flat, next(part for part in self.parts if part.name == name))

    def _quantised(self, rows: Tensor) -> Mapping[str, Tensor]:
        """What is stored of some rows, in every kind but NF4, whose blocks do not end with rows."""
        if self.kind in PLAIN:
            return {"values": rows}
        if self.kind == "fp8":  # beyond the largest number a cast to float8 gives NaN
            top = torch.finfo(_FP8).max
            return {"values": rows.clamp(-top, top)}
        return _fp8_scaled(rows) if self.kind == "fp8_scaled" else _int8(rows, self._int8_group)

    def dense(self, flat: Tensor) -> Tensor:
        """The weight (O, I…) that a flat tensor holds, in the dtype that computes.

        A kind with the computing dtype's own values returns a view of `flat`, every other kind a new tensor.
        """
        values = {part.name: _view(flat, part) for part in self.parts}
        if self.kind == "nf4":
            return _from_nf4(values, self.shape, self.dtype)
        weight = values["values"].to(self.dtype)
        if "scales" in values:
            scales = values["scales"]
            weight = weight.view(*scales.shape, -1).mul_(scales[..., None]).view(self.shape)
        return weight


def row_pieces(weight: Tensor) -> tuple[Tensor, ...]:
    """A weight (O, I…) in pieces of whole rows, which bound the temporaries of what is computed from it."""
    return weight.split(max(1, _PIECE * len(weight) // max(1, weight.numel())))


def _view(flat: Tensor, part: Part) -> Tensor:
    return flat[part.start : part.stop].view(part.dtype).view(part.shape)


def _fp8_scaled(weight: Tensor) -> dict[str, Tensor]:
    """Float8 values and a power of two per row, which brings the row's largest value to 224…448.

    A power of two changes no mantissa: only what float8 would round to zero or to its coarse smallest numbers
    becomes more precise, and widening is exact in every dtype.
    """
    rows = weight.flatten(1).float()
    largest = rows.abs().amax(1, keepdim=True)
    exponent = torch.ceil(torch.log2(largest / torch.finfo(_FP8).max))
    scales = torch.exp2(torch.where(largest > 0, exponent, torch.zeros_like(exponent)))
    return {"values": (rows / scales).view(weight.shape), "scales": scales}


def _int8(weight: Tensor, group: int) -> dict[str, Tensor]:
    """Whole numbers −127…127 and one scale per row and group of inputs."""
    groups = weight.float().reshape(weight.shape[0], -1, group)
    scales = groups.abs().amax(-1) / 127
    codes = groups / torch.where(scales > 0, scales, torch.ones_like(scales))[..., None]
    return {"values": codes.round().view(weight.shape), "scales": scales}


def _nf4(weight: Tensor) -> dict[str, Tensor]:
    """Two values in a byte, the first in the upper half; scales as offset + group · code / 127."""
    table = torch.tensor(_NF4, device=weight.device)
    borders = (table[1:] + table[:-1]) / 2
    size = weight.numel()
    blocks = math.ceil(size / _NF4_BLOCK)
    flat, missing, step = weight.reshape(-1), blocks * _NF4_BLOCK - size, _PIECE // _NF4_BLOCK
    values = (F.pad(flat, (0, missing)) if missing else flat).view(blocks, _NF4_BLOCK)
    largest = torch.cat([piece.abs().amax(1).float() for piece in values.split(step)])
    offset = largest.mean().view(1)
    rest = F.pad(largest - offset, (0, -blocks % _NF4_GROUP)).view(-1, _NF4_GROUP)
    groups = rest.abs().amax(1)
    scales = (rest / torch.where(groups > 0, groups, torch.ones_like(groups))[:, None] * 127).round()
    divisor = torch.where(largest > 0, largest, torch.ones_like(largest))[:, None]
    packed = torch.empty(blocks, _NF4_BLOCK // 2, dtype=torch.uint8, device=weight.device)
    for start in range(0, blocks, step):
        piece = slice(start, start + step)
        codes = torch.bucketize(values[piece].float() / divisor[piece], borders, out_int32=True)
        packed[piece] = (codes[:, 0::2] * 16 + codes[:, 1::2]).to(torch.uint8)
    return {"values": packed.view(-1), "scales": scales.view(-1), "groups": groups, "offset": offset}


def _from_nf4(values: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    packed, size = values["values"], math.prod(shape)
    blocks = len(packed) * 2 // _NF4_BLOCK
    scales = values["scales"].view(-1, _NF4_GROUP) * (values["groups"] / 127)[:, None]
    largest = (scales.view(-1)[:blocks] + values["offset"])[:, None]  # (blocks, 1) fp32
    if packed.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling() and _bitsandbytes():
        return _by_bitsandbytes(packed, largest.view(-1), shape, dtype)
    # (256, 2): the two numbers of a byte
    table = torch.tensor(_NF4, device=packed.device)
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)
    dense = torch.empty(blocks, _NF4_BLOCK, dtype=dtype, device=packed.device)
    step = blocks if torch.compiler.is_compiling() else _PIECE // _NF4_BLOCK
    bytes_ = packed.view(blocks, -1)
    for start in range(0, blocks, step):
        piece = slice(start, start + step)
        numbers = pairs[bytes_[piece].int()].flatten(1)  # (step, 64)
        dense[piece] = numbers * largest[piece]
    return dense.view(-1)[:size].view(shape)


@functools.lru_cache
def _bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _by_bitsandbytes(packed: Tensor, largest: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The same numbers from one kernel, without fp32 temporaries."""
    from bitsandbytes.functional import QuantState, dequantize_4bit  # takes a second; only NF4 needs it

    padded = torch.Size((len(packed) * 2,))
    state = QuantState(largest, padded, blocksize=_NF4_BLOCK, quant_type="nf4", dtype=dtype)
    return dequantize_4bit(packed.view(-1, 1), state).view(-1)[: math.prod(shape)].view(shape)
