"""Cost of changing the strengths (α, β) of a merge grid, relative to one denoising step.

    python benchmarks/merge_grid.py

Two adapters of rank 64 on a FLUX transformer of width 1024 (2 double, 4 single blocks, 576 image tokens). The
time to set new strengths is divided by the time of one forward; medians and quartiles over the turns, for two
ΔR that share their basis, and for a ΔR and a LoRA, which are concatenated.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from step_time import inputs, model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowrank.combine.mixture import Mixture
from lowrank.formats.read import Adapter


def adapter(denoiser: torch.nn.Module, name: str, seed: int, folder: Path) -> Adapter:
    """Write and read an adapter file of one method with random trained values."""
    cache = {} if name == "lora" else {"basis_cache": str(folder)}
    module = importlib.import_module(f"networks.{name}")
    network = module.create_network(1.0, 64, 64.0, None, [], denoiser, **cache)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=1e-3)
    path = folder / f"{name}-{seed}.safetensors"
    network.save_weights(str(path), None, {})
    return Adapter(path)


@torch.no_grad()
def main(turns: int = 9) -> None:
    """Measure and print the table."""
    denoiser, batch = model(1024, "cpu", torch.float32), inputs(576, "cpu", torch.float32)
    print("| adapters | set strengths / denoising step | quartiles |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for names in (("delta_r", "delta_r"), ("delta_r", "lora")):
            pair = [adapter(denoiser, name, seed, Path(folder)) for seed, name in enumerate(names)]
            attached = Mixture(pair).attach(denoiser)
            ratios = []
            for turn in range(turns + 1):
                started = time.perf_counter()
                attached.set((0.1 * turn, 1.0))
                middle = time.perf_counter()
                denoiser(**batch, return_dict=False)
                ratios.append((middle - started) / (time.perf_counter() - middle))
            attached.restore()
            low, median, high = statistics.quantiles(ratios[1:], n=4)
            print(f"| {' + '.join(names)} | {median:.3f} | {low:.3f}–{high:.3f} |")


if __name__ == "__main__":
    main()
