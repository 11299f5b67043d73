"""T-LoRA where speed of a step is not the question: how long its start takes and what it holds; and whether
closed ranks keep noise from showing the picture.

    python benchmarks/tlora.py start --device cuda     # SDXL's attention layers, random weights, rank 64
    python benchmarks/tlora.py start --device cpu --layers 8
    python benchmarks/tlora.py memory --device cpu      # one picture learned by heart by a tiny U-Net

`start`: seconds until every layer of the set has its values, of random singular components (the default) and
of W's (an SVD each), and the bytes that the network holds, as a multiple of LoRA's. Limits: 60 s on one GPU,
2.1 times. `--layers N` takes N of each shape where each needs an SVD, and tells what all would take.

`memory`: a LoRA and a T-LoRA (R_min = 1) of equal rank learn one picture from the same noise. Where their
loss at t ≤ 200 is the same, the T-LoRA must reproduce the picture less at t ≥ 800: a higher loss, as a
multiple of LoRA's. A full-size measure needs SDXL, 800 steps, and CLIP's scores of text and image.
Writes benchmarks/results/tlora_<what>_<device>.json.
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
from lowrank.models.sd_single import published_config
from tools import make_tiny_sd

RESULTS = Path(__file__).parent / "results"
KINDS = {
    "lora": ("lora", {}),
    "tlora, random": ("tlora", {}),
    "tlora, W": ("tlora", {"use_data_init": "True"}),
}


def attention_layers() -> list[tuple[int, int]]:
    """(out, in) of the linear layers in SDXL's attention blocks."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(published_config("sdxl")["unet"])
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    return [
        (layer.out_features, layer.in_features)
        for name, layer in unet.named_modules()
        if isinstance(layer, nn.Linear) and ".attn" in name and name.endswith(ends)
    ]


def network(kind: str, model: nn.Module, rank: int, **more: str) -> AdapterNetwork:
    """A network on every layer of a model, or on those named, at its start."""
    method, arguments = KINDS.get(kind, (kind, {}))
    module = importlib.import_module(f"networks.{method}")
    return module.create_network(1.0, rank, float(rank), None, [], model, **{**arguments, **more})


def start(args: argparse.Namespace) -> dict:
    """Seconds and bytes of each kind."""
    shapes = attention_layers()
    told: dict = {"layers": len(shapes), "rank": args.rank}
    for kind, (_, arguments) in KINDS.items():
        network(kind, nn.ModuleList([nn.Linear(64, 64)]), 4, target=".")  # to warm up
        if arguments:  # an SVD of each weight: so many of each shape, times how many there are
            several = {shape: min(count, args.layers or count) for shape, count in Counter(shapes).items()}
            parts = [([shape] * n, Counter(shapes)[shape] / n) for shape, n in several.items()]
        else:
            parts = [(shapes, 1.0)]
        seconds, held = 0.0, 0.0
        for some, times in parts:
            hosts = [
                nn.Linear(ins, outs, bias=False, device=args.device) if arguments else phantom(outs, ins, ())
                for outs, ins in some
            ]
            torch.manual_seed(0)
            with torch.device(args.device):
                begin = time.perf_counter()
                made = network(kind, nn.ModuleList(hosts), args.rank, target=".")
                if args.device == "cuda":
                    torch.cuda.synchronize()
            seconds += (time.perf_counter() - begin) * times
            own = [value for layer in made.layers() for value in layer.tensors().values()]
            held += sum(value.nbytes for value in own) * times
        told[kind] = {"seconds": round(seconds, 2), "bytes": round(held)}
        told[kind]["bytes_by_lora"] = round(held / told["lora"]["bytes"], 3)
        print(f"{kind}: {seconds:.1f} s, {held / 2**20:.0f} MiB, {told[kind]['bytes_by_lora']:.2f} of LoRA's")
    return told


def memory(args: argparse.Namespace) -> dict:
    """How well noise shows the learned picture, with closed ranks and without, at equal loss of t ≤ 200."""
    torch.manual_seed(0)
    picture = torch.randn(1, 4, 8, 8, device=args.device)
    text = torch.randn(1, 5, make_tiny_sd.unet("sd15", 4).config.cross_attention_dim, device=args.device)
    clean, noisy = range(0, 201, 20), range(800, 1000, 20)
    told: dict = {"rank": args.rank, "steps": args.steps}
    runs = {}
    for kind, arguments in (("lora", {}), ("tlora", {"tlora_min_rank": "1", "orthogonal": "False"})):
        torch.manual_seed(1)
        unet = make_tiny_sd.unet("sd15", 4).to(args.device).requires_grad_(False)
        torch.manual_seed(2)
        net = network(kind, unet, args.rank, target=r"attn|ff|resnets.*conv", **arguments).to(args.device)
        net.apply_to([], unet, False, True)
        optimizer = torch.optim.AdamW(net.parameters(), lr=args.rate, weight_decay=0.0)
        curve, made = [], torch.Generator().manual_seed(3)
        for step in range(1, args.steps + 1):
            t = torch.randint(0, 1000, (8,), generator=made)
            loss = losses(unet, picture, text, t, made).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % args.every == 0:
                with torch.no_grad():
                    curve.append([at(unet, picture, text, times) for times in (clean, noisy)])
                print(f"{kind} {step}: t ≤ 200 {curve[-1][0]:.4f}, t ≥ 800 {curve[-1][1]:.4f}", flush=True)
        runs[kind] = curve
        net.restore()
    pairs = [  # where the T-LoRA is no better at the clean end than LoRA was, the last such moment of each
        (one, two) for one in runs["lora"] for two in runs["tlora"] if abs(one[0] / two[0] - 1) < 0.05
    ]
    if not pairs:
        raise SystemExit("the two never had the same loss at t ≤ 200; give more --steps")
    (lora, tlora) = pairs[-1]
    told |= {"curves": runs, "lora": lora, "tlora": tlora, "noisy_by_lora": round(tlora[1] / lora[1], 3)}
    print(
        f"at t ≤ 200 {lora[0]:.4f} and {tlora[0]:.4f}; at t ≥ 800 {told['noisy_by_lora']:.2f} of LoRA's loss"
    )
    return told


def losses(unet: nn.Module, picture: Tensor, text: Tensor, t: Tensor, made: torch.Generator) -> Tensor:
    """‖x̂₀ − x₀‖² (B,) of one look at the noised picture: x_t = √ᾱ x₀ + √(1 − ᾱ) ε, the U-Net tells x₀."""
    alphas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square().neg().add(1).cumprod(0)
    a = alphas[t].reshape(-1, 1, 1, 1).to(picture)
    noise = torch.randn(len(t), *picture.shape[1:], generator=made).to(picture)
    x = a.sqrt() * picture + (1 - a).sqrt() * noise
    seen = unet(x, t.to(picture.device), text.expand(len(t), -1, -1), return_dict=False)[0]
    return (seen - picture).square().mean((1, 2, 3))


def at(unet: nn.Module, picture: Tensor, text: Tensor, times: range) -> float:
    """The mean loss at these timesteps, always of the same noise."""
    t = torch.tensor(list(times))
    return float(losses(unet, picture, text, t, torch.Generator().manual_seed(7)).mean())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("start", "memory"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rank", type=int, default=None, help="64 for start, 16 for memory")
    parser.add_argument("--layers", type=int, help="of each shape, for start (all)")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args(argv)
    args.rank = args.rank or {"start": 64, "memory": 16}[args.what]
    told = {"start": start, "memory": memory}[args.what](args)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"tlora_{args.what}_{args.device}.json"
    path.write_text(json.dumps({"torch": torch.__version__, **told}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
