"""Peak memory of merging an adapter into a checkpoint: python benchmarks/merge_memory.py [--mib 512]

Writes a base of three tensors of this size and a rank-64 adapter for them, merges them, and divides the
process's peak memory above the adapter by the largest tensor. Writes benchmarks/results/merge_memory.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lowrank.formats import base_checkpoint, merging  # noqa: E402
from lowrank.formats.delta import Delta  # noqa: E402
from lowrank.naming.places import LayerPath  # noqa: E402
from lowrank.tensors import stream_pieces, stream_tensors  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "merge_memory.json"
RANK, INPUTS = 64, 4096


def resident(field: str) -> int:
    """Return the bytes of `VmRSS` (current) or `VmHWM` (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def main() -> None:
    """Measure, write and print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mib", type=int, default=512, help="size of the largest tensor in MiB (512)")
    largest = parser.parse_args().mib << 20
    outs = largest // 2 // INPUTS
    names = [f"double_blocks.{i}.img_mlp.0.weight" for i in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.safetensors"
        # warm up with a small base, so that code and libraries are loaded before the measurement
        small = Path(folder) / "small.safetensors"
        stream_tensors(small, {names[0]: (8, 8)}, torch.bfloat16, lambda _: torch.ones(8, 8), {})
        place = LayerPath("unet", "transformer_blocks.0.ff.net.0.proj")
        tiny = {place: Delta(torch.ones(8, 2), torch.ones(2, 8), 1.0)}
        merging.merge(base_checkpoint.BaseCheckpoint(small), tiny, Path(folder) / "out.safetensors", {})
        stream_pieces(
            base,
            {name: (torch.bfloat16, (outs, INPUTS)) for name in names},
            lambda _: (torch.ones(256, INPUTS, dtype=torch.bfloat16) for _ in range(outs // 256)),
            {},
        )
        adapter = {
            LayerPath("unet", f"transformer_blocks.{i}.ff.net.0.proj"): Delta(
                torch.randn(outs, RANK).bfloat16(), torch.randn(RANK, INPUTS).bfloat16(), 1e-3
            )
            for i in range(3)
        }
        adapter_bytes = sum(delta.up.nbytes + delta.down.nbytes for delta in adapter.values())
        baseline = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        merging.merge(base_checkpoint.BaseCheckpoint(base), adapter, Path(folder) / "merged.safetensors", {})
        peak = resident("VmHWM") - baseline
    result = {
        "largest_tensor_mib": largest / 2**20,
        "adapter_mib": round(adapter_bytes / 2**20, 1),
        "peak_above_adapter_mib": round(peak / 2**20, 1),
        "peak_above_adapter_per_largest_tensor": round(peak / largest, 3),
        "limit": 1.2,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
