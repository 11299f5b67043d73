"""What LaLoRA costs: measuring the context beside plain passes, and the penalty beside a training step.

    python benchmarks/context.py --width 160 --latent 32
    python benchmarks/context.py --quick

SD 1.5's U-Net with random weights (`--width 320` is its own size) on latents of `--latent` squared, batch 1.
A plain pass is forward and backward to the input. The penalty is its value and its backward for a LoRA of
`--rank`; the step is forward, backward and AdamW with that LoRA. They take turns; figures are medians over
the turns of ratios of CPU-seconds, with quartiles. Writes benchmarks/results/context_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.targets import find
from lowrank.laplace.context_file import read_context, write_context
from lowrank.laplace.fisher import Fisher
from networks import lalora, lora

UNET = Path(__file__).parent.parent / "configs" / "models" / "sd15.json"


def unet(width: int) -> UNet2DConditionModel:
    """SD 1.5's U-Net with random weights, its narrowest block `width` wide."""
    torch.manual_seed(0)
    known = json.loads(UNET.read_text())["unet"]
    known["block_out_channels"] = [width * factor for factor in (1, 2, 4, 4)]
    made: Any = UNet2DConditionModel.from_config(known)
    return made.requires_grad_(False).eval()


def seconds(work: Callable[[], object], device: str) -> float:
    """CPU-seconds on the CPU, and on a GPU the time until it has done its work."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
    begun = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--latent", type=int, default=64)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small and few: only that it runs")
    args = parser.parse_args()
    if args.quick:
        args.width, args.latent, args.rank, args.turns = 32, 8, 4, 2
    model, device = unet(args.width).to(args.device), args.device
    torch.manual_seed(1)
    noisy = torch.randn(1, 4, args.latent, args.latent, device=device)
    text = torch.randn(1, 77, model.config.cross_attention_dim, device=device)
    timestep = torch.tensor([500], device=device)

    def losses(x: torch.Tensor = noisy) -> torch.Tensor:
        said = model(x, timestep, encoder_hidden_states=text, return_dict=False)[0]
        return (said - noisy).square().flatten(1).mean(1)

    def plain() -> None:
        losses(noisy.clone().requires_grad_()).sum().backward()

    times: dict[str, list[float]] = {name: [] for name in ("plain", "kfac_lr", "diag", "step", "penalty")}
    measures = {name: Fisher(find("unet", model), name, 16, 0, device) for name in ("kfac_lr", "diag")}
    for turn in range(args.turns + 1):
        spent = {"plain": seconds(plain, device)}
        for name, fisher in measures.items():
            with fisher.watching():
                spent[name] = seconds(partial(fisher.add, 1, losses), device)
        if turn:  # one to warm up
            for name, one in spent.items():
                times[name].append(one)
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "context.safetensors"
        at_end = seconds(lambda: write_context(own, measures["kfac_lr"].context({})), device)
        size, context = own.stat().st_size / 1e6, read_context(own)
        method = lora.method(lora.Options()) | lalora.penalty(lalora.Options(str(own), 1.0))
    network = AdapterNetwork(method, find("unet", model), lambda _: (args.rank, float(args.rank)))
    network.start()
    network.apply_to([], model, False, True)
    network.prepare_grad_etc([], model)
    network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step() -> None:
        losses().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def penalty() -> None:
        network.penalties()["lalora"].backward()

    for turn in range(args.turns + 1):
        for name, work in (("step", step), ("penalty", penalty)):
            spent = seconds(work, device)
            if turn:
                times[name].append(spent)
    rows = {}
    for name, other in (("kfac_lr", "plain"), ("diag", "plain"), ("penalty", "step")):
        ratios = [mine / his for mine, his in zip(times[name], times[other], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows[f"{name} / {other}"] = {"ratio": median, "quartiles": [low, high]}
    rows["eigenpairs and file / plain"] = {"ratio": at_end / statistics.median(times["plain"])}
    settings = {name: getattr(args, name) for name in ("device", "width", "latent", "rank", "turns")}
    settings |= {
        "layers": len(context.layers),
        "file_mb": size,
        "plain_s": statistics.median(times["plain"]),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(settings)
    print("| what | ratio | quartiles |\n|---|---|---|")
    for name, row in rows.items():
        spread = "–".join(f"{value:.3f}" for value in row.get("quartiles", ()))
        print(f"| {name} | {row['ratio']:.3f} | {spread} |")
    if not args.quick:
        path = Path(__file__).parent / "results" / f"context_{device}.json"
        path.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
