"""How long a step takes with other settings of memory: an estimate that puts settings in order.

Not measured on a GPU. The numbers are those of a card of 2022 with 24 GB: 150 TFLOP/s in half precision,
1 TB/s of its memory, 25 GB/s over PCIe 4.0 ×16. Only their ratios matter.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOPS = 150e12  # floating-point operations a second
BANDWIDTH = 1e12  # bytes a second, of the card's memory
LINK = 25e9  # bytes a second, between host memory and the card
EXPOSED = 0.1  # share of a copy that no computation hides: the first layers, and traffic in the card's memory
# bytes read and written to widen one weight to half precision; NF4's passes through fp32
WIDENING = {"bf16": 0, "fp8": 4, "fp8_scaled": 6, "int8": 6, "nf4": 16}


@dataclass(frozen=True)
class Work:
    """What a step does: operations, passes over the weights, their number, and bytes in host memory."""

    flops: float
    passes: int  # forward and backward, and a recomputation
    weights: int
    host_bytes: int


def seconds(work: Work, storage: str | None) -> float:
    """The estimated time of a step; copies run beside the computation."""
    compute = work.flops / FLOPS
    widening = work.passes * work.weights * WIDENING[storage or "bf16"] / BANDWIDTH
    copying = work.passes * work.host_bytes / LINK
    return compute + widening + max(copying - compute, EXPOSED * copying)
