"""Cost of LaLoRA: the context relative to a plain pass, and the penalty relative to a training step.

    python benchmarks/context.py --width 160 --latent 32
    python benchmarks/context.py --quick

SD 1.5's U-Net with random weights (`--width 320` is the real size) on square latents of side `--latent`,
batch 1. A plain pass is forward and backward to the input. The penalty is its forward and backward for a LoRA
of `--rank`; the step is forward, backward and AdamW with the same LoRA. All are run in turns; results are
medians and quartiles over the turns of ratios of CPU-seconds. Writes
benchmarks/results/context_<device>.json.
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
from lowrank.laplace.fisher import Fisher, gauss_newton_draw
from networks import lalora, lora

UNET = Path(__file__).parent.parent / "configs" / "models" / "sd15.json"


def unet(width: int) -> UNet2DConditionModel:
    """Return SD 1.5's U-Net with random weights, whose narrowest block has `width` channels."""
    torch.manual_seed(0)
    config = json.loads(UNET.read_text())["unet"]
    config["block_out_channels"] = [width * factor for factor in (1, 2, 4, 4)]
    model: Any = UNet2DConditionModel.from_config(config)
    return model.requires_grad_(False).eval()


def seconds(work: Callable[[], object], device: str) -> float:
    """Return the CPU-seconds of `work`, or on a GPU the wall time until it is finished."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    if device == "cuda":
        torch.cuda.synchronize()
    started = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--latent", type=int, default=64)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and few turns, to test that it runs"
    )
    args = parser.parse_args()
    if args.quick:
        args.width, args.latent, args.rank, args.turns = 32, 8, 4, 2
    model, device = unet(args.width).to(args.device), args.device
    torch.manual_seed(1)
    noisy = torch.randn(1, 4, args.latent, args.latent, device=device)
    text = torch.randn(1, 77, model.config.cross_attention_dim, device=device)
    timestep = torch.tensor([500], device=device)

    signs = torch.randint_like(noisy, 0, 2) * 2 - 1

    def losses(prediction: torch.Tensor) -> torch.Tensor:
        return (prediction - noisy).square().flatten(1).mean(1)

    def predict(x: torch.Tensor) -> torch.Tensor:
        return model(x, timestep, encoder_hidden_states=text, return_dict=False)[0]

    def draws() -> torch.Tensor:
        return gauss_newton_draw(losses, predict(noisy), signs)

    def plain() -> None:
        losses(predict(noisy.clone().requires_grad_())).sum().backward()

    times: dict[str, list[float]] = {name: [] for name in ("plain", "kfac_lr", "diag", "step", "penalty")}
    measures = {name: Fisher(find("unet", model), name, 16, 0, device) for name in ("kfac_lr", "diag")}
    for turn in range(args.turns + 1):
        spent = {"plain": seconds(plain, device)}
        for name, fisher in measures.items():
            with fisher.watching():
                spent[name] = seconds(partial(fisher.add, 1, draws), device)
        if turn:  # the first turn is a warm-up
            for name, duration in spent.items():
                times[name].append(duration)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "context.safetensors"
        writing = seconds(lambda: write_context(file, measures["kfac_lr"].context({})), device)
        size, context = file.stat().st_size / 1e6, read_context(file)
        method = lora.method(lora.Options()) | lalora.penalty(lalora.Options(str(file), 1.0))
    network = AdapterNetwork(method, find("unet", model), lambda _: (args.rank, float(args.rank)))
    network.start()
    network.apply_to([], model, False, True)
    network.prepare_grad_etc([], model)
    network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step() -> None:
        losses(predict(noisy)).sum().backward()
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
        ratios = [a / b for a, b in zip(times[name], times[other], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows[f"{name} / {other}"] = {"ratio": median, "quartiles": [low, high]}
    rows["eigenpairs and file / plain"] = {"ratio": writing / statistics.median(times["plain"])}
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
