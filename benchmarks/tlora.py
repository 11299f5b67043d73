"""Two measurements of T-LoRA: the cost of its start, and memorisation of a picture at high noise.

    python benchmarks/tlora.py start --device cuda     # SDXL's attention layers, random weights, rank 64
    python benchmarks/tlora.py start --device cpu --layers 8
    python benchmarks/tlora.py memory --device cpu      # a tiny U-Net trained on one picture

`start`: seconds until all layers have their initial values, from random singular components (the default) and
from those of W (an SVD each), and the bytes of the network relative to LoRA's. Limits: 60 s on one GPU, 2.1
times. `--layers N` measures N layers of each shape, where each needs an SVD, and extrapolates to all.

`memory`: a LoRA and a T-LoRA (R_min = 1) of equal rank are trained on one picture with equal noise. At equal
loss for t ≤ 200, the T-LoRA must reproduce the picture less for t ≥ 800: a higher loss, given relative to
LoRA's. A full-size measurement would need SDXL, 800 steps, and CLIP scores of text and image. Writes
benchmarks/results/tlora_<what>_<device>.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowrank.adapters.network import AdapterNetwork
from lowrank.formats.delta import phantom
from lowrank.models import published
from tools import make_tiny_sd

RESULTS = Path(__file__).parent / "results"
KINDS = {
    "lora": ("lora", {}),
    "tlora, random": ("tlora", {}),
    "tlora, W": ("tlora", {"use_data_init": "True"}),
}


def attention_layers() -> list[tuple[int, int]]:
    """Return (out, in) of the linear layers in SDXL's attention blocks."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(published.configurations("sdxl")["unet"])
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    return [
        (layer.out_features, layer.in_features)
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear) and ".attn" in name and name.endswith(ends)
    ]


def network(kind: str, model: nn.Module, rank: int, **more: str) -> AdapterNetwork:
    """Create a network on a model with its initial values; `more` are network arguments."""
    method, arguments = KINDS.get(kind, (kind, {}))
    module = importlib.import_module(f"networks.{method}")
    return module.create_network(1.0, rank, float(rank), None, [], model, **{**arguments, **more})


def start(args: argparse.Namespace) -> dict:
    """Measure seconds and bytes of each kind."""
    shapes = attention_layers()
    result: dict = {"layers": len(shapes), "rank": args.rank}
    for kind, (_, arguments) in KINDS.items():
        network(kind, nn.ModuleList([nn.Linear(64, 64)]), 4, target=".")  # warm-up
        if arguments:  # an SVD per weight: measure a few of each shape, multiply by their number
            several = {shape: min(count, args.layers or count) for shape, count in Counter(shapes).items()}
            parts = [([shape] * n, Counter(shapes)[shape] / n) for shape, n in several.items()]
        else:
            parts = [(shapes, 1.0)]
        seconds, size = 0.0, 0.0
        for measured, factor in parts:
            hosts = [
                nn.Linear(ins, outs, bias=False, device=args.device) if arguments else phantom(outs, ins, ())
                for outs, ins in measured
            ]
            torch.manual_seed(0)
            with torch.device(args.device):
                started = time.perf_counter()
                net = network(kind, nn.ModuleList(hosts), args.rank, target=".")
                if args.device == "cuda":
                    torch.cuda.synchronize()
            seconds += (time.perf_counter() - started) * factor
            tensors = [value for layer in net.layers() for value in layer.tensors().values()]
            size += sum(value.nbytes for value in tensors) * factor
        result[kind] = {"seconds": round(seconds, 2), "bytes": round(size)}
        result[kind]["bytes_by_lora"] = round(size / result["lora"]["bytes"], 3)
        print(
            f"{kind}: {seconds:.1f} s, {size / 2**20:.0f} MiB, {result[kind]['bytes_by_lora']:.2f} of LoRA's"
        )
    return result


def memory(args: argparse.Namespace) -> dict:
    """Measure the loss at t ≥ 800, with closed ranks and without, at equal loss for t ≤ 200."""
    torch.manual_seed(0)
    picture = torch.randn(1, 4, 8, 8, device=args.device)
    text = torch.randn(1, 5, make_tiny_sd.unet("sd15", 4).config.cross_attention_dim, device=args.device)
    clean, noisy = range(0, 201, 20), range(800, 1000, 20)
    result: dict = {"rank": args.rank, "steps": args.steps}
    runs = {}
    for kind, arguments in (("lora", {}), ("tlora", {"tlora_min_rank": "1", "orthogonal": "False"})):
        torch.manual_seed(1)
        unet = make_tiny_sd.unet("sd15", 4).to(args.device).requires_grad_(False)
        torch.manual_seed(2)
        net = network(kind, unet, args.rank, target=r"attn|ff|resnets.*conv", **arguments).to(args.device)
        net.apply_to([], unet, False, True)
        optimizer = torch.optim.AdamW(net.parameters(), lr=args.rate, weight_decay=0.0)
        curve, generator = [], torch.Generator().manual_seed(3)
        for step in range(1, args.steps + 1):
            t = torch.randint(0, 1000, (8,), generator=generator)
            loss = losses(unet, picture, text, t, generator).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % args.every == 0:
                with torch.no_grad():
                    curve.append([at(unet, picture, text, times) for times in (clean, noisy)])
                print(f"{kind} {step}: t ≤ 200 {curve[-1][0]:.4f}, t ≥ 800 {curve[-1][1]:.4f}", flush=True)
        runs[kind] = curve
        net.restore()
    pairs = [  # moments of both runs with equal loss at t ≤ 200; the last is used
        (a, b) for a in runs["lora"] for b in runs["tlora"] if abs(a[0] / b[0] - 1) < 0.05
    ]
    if not pairs:
        raise SystemExit("LoRA and T-LoRA never had equal loss at t ≤ 200; raise --steps")
    (lora, tlora) = pairs[-1]
    result |= {"curves": runs, "lora": lora, "tlora": tlora, "noisy_by_lora": round(tlora[1] / lora[1], 3)}
    print(
        f"at t ≤ 200 {lora[0]:.4f} and {tlora[0]:.4f}; "
        f"at t ≥ 800 {result['noisy_by_lora']:.2f} of LoRA's loss"
    )
    return result


def losses(unet: nn.Module, picture: Tensor, text: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    """Return ‖x̂₀ − x₀‖² (B,) for x_t = √ᾱ x₀ + √(1 − ᾱ) ε, where the U-Net predicts x̂₀."""
    alphas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square().neg().add(1).cumprod(0)
    a = alphas[t].reshape(-1, 1, 1, 1).to(picture)
    noise = torch.randn(len(t), *picture.shape[1:], generator=generator).to(picture)
    x = a.sqrt() * picture + (1 - a).sqrt() * noise
    prediction = unet(x, t.to(picture.device), text.expand(len(t), -1, -1), return_dict=False)[0]
    return (prediction - picture).square().mean((1, 2, 3))


def at(unet: nn.Module, picture: Tensor, text: Tensor, times: range) -> float:
    """Return the mean loss at these timesteps, always with equal noise."""
    t = torch.tensor(list(times))
    return float(losses(unet, picture, text, t, torch.Generator().manual_seed(7)).mean())


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("start", "memory"), help="measurement")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--rank", type=int, default=None, help="rank (default: 64 for start, 16 for memory)")
    parser.add_argument("--layers", type=int, help="start: layers of each shape to measure (default: all)")
    parser.add_argument("--steps", type=int, default=400, help="memory: training steps")
    parser.add_argument("--every", type=int, default=5, help="memory: steps between two evaluations")
    parser.add_argument("--rate", type=float, default=2e-3, help="memory: learning rate")
    args = parser.parse_args(argv)
    args.rank = args.rank or {"start": 64, "memory": 16}[args.what]
    result = {"start": start, "memory": memory}[args.what](args)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"tlora_{args.what}_{args.device}.json"
    path.write_text(json.dumps({"torch": torch.__version__, **result}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
