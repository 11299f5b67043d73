"""Time of a FLUX transformer's training step with each method, relative to PEFT's LoRA and the base.

    OMP_NUM_THREADS=1 python benchmarks/step_time.py --device cpu
    python benchmarks/step_time.py --device cuda
    python benchmarks/step_time.py --quick

DoRA is compared with PEFT's DoRA, T-LoRA also with LyCORIS'. A step is forward, mean-square loss, backward
and AdamW, with equal inputs, rank and 12 targets. The frozen base is measured as forward and backward to its
input. Methods run in turns, step by step, so that a slower machine slows all of them; results are medians and
quartiles over the turns of ratios within a turn. On a CPU these are ratios of CPU-seconds, which other
programs disturb less; use one thread, because waiting threads count as busy. Writes
benchmarks/results/step_time_<device>.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowrank.adapters.targets import FLUX_TARGETS, find

OURS = {  # our networks, with their arguments
    "delta_r": {},
    "delta_r_triu": {},
    "lora": {},
    "qrlora": {},
    "null_lora": {},
    "universal_lora": {"basis_path": "auto:random"},
    "dora": {},
    "effilora": {},
    "tlora": {},
    "tlora plain": {"orthogonal": "False"},
}
METHODS = (*OURS, "lycoris tlora")
RIVALS = {"dora": "peft dora"}  # what a method is compared with, if not PEFT's LoRA
TIMESTEP = 500.0  # of every sample: half of the ranks between R_min and R are open


def model(hidden: int, device: str, dtype: torch.dtype) -> FluxTransformer2DModel:
    """Return a transformer of FLUX's blocks with random weights."""
    torch.manual_seed(0)
    heads = hidden // 128
    transformer = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=4,
        num_attention_heads=heads,
        attention_head_dim=128,
        in_channels=64,
        joint_attention_dim=256,
        pooled_projection_dim=256,
        guidance_embeds=True,
    )
    return transformer.to(device, dtype).requires_grad_(False)


def inputs(tokens: int, device: str, dtype: torch.dtype) -> dict:
    """Return one batch of `tokens` image tokens and 64 text tokens."""
    torch.manual_seed(1)
    side = int(tokens**0.5)
    ids = torch.zeros(side * side, 3, device=device)
    ids[:, 1], ids[:, 2] = torch.arange(side * side) // side, torch.arange(side * side) % side
    floats = {
        "hidden_states": torch.randn(1, side * side, 64),
        "encoder_hidden_states": torch.randn(1, 64, 256),
        "pooled_projections": torch.randn(1, 256),
    }
    floats = {name: value.to(device, dtype) for name, value in floats.items()}
    others = {
        "timestep": torch.tensor([TIMESTEP / 1000], device=device),
        "guidance": torch.tensor([1.0], device=device),
        "img_ids": ids,
        "txt_ids": torch.zeros(64, 3, device=device),
    }
    return floats | others


def lycoris_tlora(denoiser: FluxTransformer2DModel, args: argparse.Namespace) -> list[torch.nn.Parameter]:
    """Attach LyCORIS' T-LoRA to the same layers, with SimpleTuner's mask; return its trained parameters."""
    import lycoris

    preset = {"enable_conv": False, "target_module": [], "target_name": [f"*{t}" for t in FLUX_TARGETS]}
    lycoris.LycorisNetwork.apply_preset(preset | {"use_fnmatch": True})
    network = lycoris.create_lycoris(denoiser, 1.0, args.rank, args.rank, algo="tlora")
    network.apply_to()
    network.to(args.device)
    lycoris.set_timestep_mask(lycoris.compute_timestep_mask(TIMESTEP, 1000, args.rank, args.rank // 2))
    assert len(network.loras) == len(find("unet", denoiser)), "LyCORIS adapts other layers"
    return [p for p in network.parameters() if p.requires_grad]


def stepper(name: str, args: argparse.Namespace, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """Return (training step, number of trained parameters); "base" differentiates only its input."""
    denoiser, batch = model(args.hidden, args.device, dtype), inputs(args.tokens, args.device, dtype)
    if name == "base":
        batch["hidden_states"].requires_grad_(True)
        parameters = [batch["hidden_states"]]
    elif name in ("peft", "peft dora"):
        sizes = {"r": args.rank, "lora_alpha": args.rank, "use_dora": name == "peft dora"}
        denoiser.add_adapter(LoraConfig(target_modules=list(FLUX_TARGETS), **sizes))
        parameters = [p for p in denoiser.parameters() if p.requires_grad]
    elif name == "lycoris tlora":
        parameters = lycoris_tlora(denoiser, args)
    else:
        module = importlib.import_module(f"networks.{name.split()[0]}")
        cache = {"basis_cache": args.cache} if name in ("delta_r", "delta_r_triu", "qrlora") else {}
        network = module.create_network(1.0, args.rank, args.rank, None, [], denoiser, **cache, **OURS[name])
        network.apply_to([], denoiser, False, True)
        network.cast_frozen(dtype)
        network.to(args.device)
        parameters = list(network.parameters())
    if args.compile:
        denoiser.compile_repeated_blocks()
    for parameter in parameters:
        if dtype == torch.float32 or name != "base":
            parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if name != "base" else None
    half = torch.autocast(args.device, dtype, enabled=dtype != torch.float32)

    def step() -> None:
        with half:
            loss = denoiser(**batch, return_dict=False)[0].float().square().mean()
        loss.backward()
        if optimizer:
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        if args.device == "cuda":
            torch.cuda.synchronize()

    return step, sum(p.numel() for p in parameters) if optimizer else 0


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=576)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=METHODS,
        choices=METHODS,
        help="methods to measure; a file is written only with all of them",
    )
    parser.add_argument("--compile", action="store_true", help="compile each kind of block once")
    parser.add_argument("--bf16", action="store_true", help="base in bf16 under autocast")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and few turns, to test that it runs"
    )
    args = parser.parse_args()
    if args.quick:
        args.hidden, args.tokens, args.rank, args.turns = 256, 64, 8, 2
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    times: dict[str, list[float]] = {}
    clock = time.perf_counter if args.device == "cuda" else time.process_time
    with tempfile.TemporaryDirectory() as args.cache:
        rivals = {RIVALS[name] for name in args.methods if name in RIVALS}
        steps = {
            name: stepper(name, args, dtype) for name in ("base", "peft", *sorted(rivals), *args.methods)
        }
        for turn in range(args.turns + 2):  # the first two are a warm-up
            for name, (step, _) in steps.items():
                started = clock()
                step()
                if turn >= 2:
                    times.setdefault(name, []).append(clock() - started)
    rows = {}
    for name, (_, parameters) in steps.items():
        rival = RIVALS.get(name, "peft")
        ratios = [a / b for a, b in zip(times[name], times[rival], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "median_s": statistics.median(times[name]),
            "ratio_to_peft": statistics.median(ratios),
            "compared_with": rival,
            "quartiles": [quartiles[0], quartiles[2]],
            "trained_parameters": parameters,
            **{
                f"ratio_to_{other.replace(' ', '_')}": statistics.median(
                    a / b for a, b in zip(times[name], times[other], strict=True)
                )
                for other in ("base", "lora", "lycoris tlora")
                if other in times
            },
        }
    settings = {
        "device": args.device,
        "hidden": args.hidden,
        "tokens": args.tokens,
        "rank": args.rank,
        "turns": args.turns,
        "dtype": str(dtype),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(settings)
    print("| method | step s | / PEFT | quartiles | / base | / our LoRA | / LyCORIS tlora | trained |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row['median_s']:.3f} | {row['ratio_to_peft']:.3f} | {row['quartiles'][0]:.3f}–"
            f"{row['quartiles'][1]:.3f} | {row['ratio_to_base']:.3f} | {row.get('ratio_to_lora', 0):.3f} | "
            f"{row.get('ratio_to_lycoris_tlora', 0):.3f} | {row['trained_parameters']:,} |"
        )
    if not (args.quick or args.compile) and tuple(args.methods) == METHODS:
        path = Path(__file__).parent / "results" / f"step_time_{args.device}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
