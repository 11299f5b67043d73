"""The planned memory of a training step against the memory of the same step on real tensors, on the CPU.

    OMP_NUM_THREADS=1 python benchmarks/memory_plan.py            # tiny models, and SD 1.5 at full size
    python benchmarks/memory_plan.py --quick                      # tiny models only

Each setting runs twice through the same functions of a run: on tensors without values (the plan), and on real
tensors with random weights. `counted` is the peak of live storages of the second run. `allocated` is the peak
of what torch's CPU allocator gave out, which also has the scratch of kernels. Autocast is the CPU's in both.
Writes benchmarks/results/memory_plan_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowrank.cli import flux_train, sd_train
from lowrank.plan.live import Phase
from lowrank.train import dry_run, plan_memory
from tools import make_tiny_sd
from tools.make_tiny_flux import make as make_flux

RESULTS = Path(__file__).resolve().parent / "results" / "memory_plan_cpu.json"
STEP = "training step"
HALF = ["--mixed_precision", "bf16"]
SAVING = ["--gradient_checkpointing"]
MAINS: dict[str, Callable] = {
    "flux": flux_train.main,
    "sd15": sd_train.main,
    "sdxl": sd_train.main_sdxl,
    "full": sd_train.main,
}
SETTINGS: list[tuple[str, str, list[str]]] = [
    ("flux", "lora", []),
    ("flux", "delta_r", [*HALF, *SAVING]),
    ("flux", "lora", [*HALF, "--base_storage", "fp8_scaled"]),
    ("flux", "lora", [*HALF, *SAVING, "--base_storage", "nf4"]),
    ("flux", "dora", [*HALF, "--base_storage", "int8", "--train_batch_size", "2"]),
    ("sd15", "lora", []),
    ("sd15", "effilora", [*HALF, *SAVING, "--network_train_unet_only"]),
    ("sd15", "lora", ["--base_storage", "int8", "--blocks_to_swap", "20"]),
    ("sd15", "lora", [*HALF, *SAVING, "--blocks_to_swap", "30"]),
    ("sd15", "lora", [*HALF, *SAVING, "--base_storage", "nf4", "--blocks_to_swap", "30"]),
    ("sdxl", "lora", [*SAVING]),
    ("sdxl", "tlora", [*HALF, "--base_storage", "fp8", "--network_train_unet_only"]),
    ("full", "lora", ["--network_train_unet_only"]),
    ("full", "lora", ["--network_train_unet_only", *SAVING]),
    (
        "full",
        "lora",
        ["--network_train_unet_only", *SAVING, "--base_storage", "int8", "--blocks_to_swap", "30"],
    ),
]


def main() -> int:
    """Run the settings and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny models only")
    quick = parser.parse_args().quick
    logging.disable(logging.WARNING)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        models = {
            "flux": make_flux(root / "flux"),
            "sd15": make_tiny_sd.make(root / "sd15", "sd15"),
            "sdxl": make_tiny_sd.make(root / "sdxl", "sdxl"),
            "full": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        }
        for kind, network, more in SETTINGS:
            if kind == "full" and quick:
                continue
            line = _command(root, str(models[kind]), 256 if kind == "full" else 64, network, more)
            results.append(
                {"model": kind, "network": network, "flags": " ".join(more), **_compared(kind, line)}
            )
            print(json.dumps(results[-1]), flush=True)
    if not quick:
        facts = {"torch": torch.__version__, "unit": "bytes", "results": results}
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


def _command(root: Path, model: str, side: int, network: str, more: list[str]) -> list[str]:
    pictures = root / f"pictures{side}" / "1_cat"
    pictures.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side)).save(pictures / "cat.png")
    return [
        *("--pretrained_model_name_or_path", model, "--train_data_dir", str(pictures.parent)),
        *("--network_module", f"networks.{network}", "--network_dim", "4", "--resolution", str(side)),
        *("--output_dir", str(root / "out"), "--dry_run", *more),
    ]


def _compared(kind: str, line: list[str]) -> dict[str, Any]:
    """The peaks of the training step in bytes, and the plan's error relative to the counted peak."""
    plan, phases, peaks = plan_memory.plan_memory, {}, {}

    def both(job: Any, models: Any, loader: Any) -> list[Phase]:
        phases["planned"] = plan(job, models, loader, gpu=False)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            phases["counted"] = plan(job, models, loader, values=True)
        peaks["allocated"] = _allocated(profiler)
        return phases["planned"]

    with patch.object(plan_memory, "plan_memory", both), patch.object(dry_run, "show", lambda *_: 0):
        MAINS[kind](line)
    peaks |= {
        name: next(phase.peak for phase in found if phase.name == STEP) for name, found in phases.items()
    }
    return {**peaks, "error": round(peaks["planned"] / peaks["counted"] - 1, 5)}


def _allocated(profiler: Any) -> int:
    """The highest sum of the allocator's events; the training step is the largest phase of these settings."""
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


if __name__ == "__main__":
    sys.exit(main())
