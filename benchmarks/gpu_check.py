"""Check on one GPU what the test suite can only check on the CPU, in at most ten minutes, and write one file.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --device cpu --tiny
    python benchmarks/gpu_check.py --render

Models have the sizes of FLUX.1-dev and random weights that are made on the device, so nothing is downloaded.
A check that fails is recorded with its error, and the next one runs. Results go to
benchmarks/results/gpu_check.json, and `--render` writes docs/gpu_check.md from them. --tiny uses small sizes
and writes no file, to test that this script runs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from diffusers import FluxTransformer2DModel
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import step_time  # noqa: E402 (beside this file)

from lowrank.adapters.targets import find  # noqa: E402
from lowrank.bases.qr_basis import decompose  # noqa: E402
from lowrank.cli import flux_train, sd_train  # noqa: E402
from lowrank.models import blocks, frozen, memory  # noqa: E402
from lowrank.models.place import Stream  # noqa: E402
from lowrank.plan.live import Phase  # noqa: E402
from lowrank.train import dry_run, plan_memory  # noqa: E402
from tools.make_tiny_flux import make as make_tiny_flux  # noqa: E402

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "gpu_check.json", ROOT / "docs" / "gpu_check.md"
GIB = 1 << 30
NETWORKS = {  # with arguments that need no file and no data
    **{name: {} for name in ("lora", "dora", "delta_r", "delta_r_triu", "qrlora", "null_lora", "tlora")},
    "effilora": {},
    "lalora": {},
    "network_null_lalora": {"basis_path": "none"},
    **{
        name: {"basis_path": "auto:random"}
        for name in ("universal_lora", "universal_lalora", "network_null_lalora_plus")
    },
}
STORED = ((torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, "fp8"), (torch.bfloat16, "nf4"))
# settings of full-size runs: the card, storage, blocks swapped, rank
RUNS = ((24, "fp8", 0, 64), (16, "fp8", 0, 16), (12, "nf4", 0, 16))
BASES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "flux": "black-forest-labs/FLUX.1-dev",
}
# settings whose predicted peak is compared: model, side of the picture, flags
UNET, SAVING = "--network_train_unet_only", "--gradient_checkpointing"
PLANS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("sd15", 512, (UNET,)),
    ("sd15", 768, (UNET, SAVING)),
    ("sd15", 512, (UNET, SAVING, "--train_batch_size", "4")),
    ("sd15", 512, (UNET, "--base_storage", "int8", "--blocks_to_swap", "20")),
    ("sdxl", 768, (UNET,)),
    ("sdxl", 1024, (UNET, SAVING)),
    ("sdxl", 1024, (UNET, SAVING, "--base_storage", "fp8_scaled")),
    ("sdxl", 1024, (UNET, SAVING, "--base_storage", "nf4")),
    ("sdxl", 1024, (UNET, SAVING, "--blocks_to_swap", "40")),
    ("sdxl", 1024, (UNET, SAVING, "--cpu_offload_checkpointing")),
    ("flux", 512, (SAVING, "--base_storage", "fp8")),
    ("flux", 1024, (SAVING, "--base_storage", "nf4", "--blocks_to_swap", "10")),
)
TINY_PLANS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("flux", 64, ()),
    ("flux", 64, (SAVING, "--base_storage", "nf4", "--cpu_offload_checkpointing")),
)
LIMIT = 600.0  # seconds for all checks


class Sizes(argparse.Namespace):
    """What --tiny changes."""

    def __init__(self, tiny: bool, hidden: int = 3072, tokens: int = 4096) -> None:
        super().__init__()
        self.hidden, self.tokens, self.text = (256, 64, 16) if tiny else (hidden, tokens, 512)
        self.tiny, self.whole = tiny, (3, 6) if tiny else (19, 38)
        self.turns, self.steps, self.rank = (2, 2, 4) if tiny else (12, 20, 64)
        self.widths = {"tiny": (256, 64)} if tiny else {"SDXL": (1280, 1024), "FLUX": (3072, 4096)}


def empty(sizes: Sizes, counts: tuple[int, int], dtype: torch.dtype) -> FluxTransformer2DModel:
    """A FLUX transformer without values, with the given numbers of double and single blocks."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            made = FluxTransformer2DModel(
                num_layers=counts[0],
                num_single_layers=counts[1],
                num_attention_heads=sizes.hidden // 128,
                attention_head_dim=128,
                in_channels=64,
                joint_attention_dim=256,
                pooled_projection_dim=256,
                guidance_embeds=True,
            )
    finally:
        torch.set_default_dtype(before)
    return made.requires_grad_(False).eval()


@torch.no_grad()
def filled(
    denoiser: FluxTransformer2DModel, device: str, kind: str | None = None, swap: int = 0
) -> Stream | None:
    """Give a model random weights block by block, each stored and placed before the next one is made."""
    place = Stream(device) if swap else None
    streamed = {id(block) for block in blocks.swapped(denoiser, swap)} if swap else set()
    stacked = [block for stack in blocks.stacks(denoiser) for block in stack]
    for block in stacked:
        _randomise(block, device)
        if not (kind or swap):
            continue
        for layer in list(block.modules()):
            if frozen.can_freeze(layer):
                frozen.freeze(layer)
                frozen.store(layer, kind)
                if place is not None and id(block) in streamed:
                    frozen.stream(layer, place)
    inside = {id(module) for block in stacked for module in block.modules()}
    for module in denoiser.modules():
        if id(module) not in inside and next(module.children(), None) is None:
            _randomise(module, device)
    return place


def _randomise(module: nn.Module, device: str) -> None:
    module.to_empty(device=device)
    for name, value in module.named_parameters():
        value.fill_(1.0) if "norm" in name and value.dim() == 1 else value.normal_(0, 0.02)


def batch(sizes: Sizes, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """One picture's inputs of the transformer."""
    torch.manual_seed(1)
    given = step_time.inputs(sizes.tokens, device, dtype)
    given["encoder_hidden_states"] = torch.randn(1, sizes.text, 256).to(device, dtype)
    given["txt_ids"] = torch.zeros(sizes.text, 3, device=device)
    return given


def attached(name: str, denoiser: nn.Module, rank: int, cache: str, dtype: torch.dtype, device: str) -> Any:
    """The network of a method on the usual layers of a denoiser."""
    module, given = importlib.import_module(f"networks.{name}"), dict(NETWORKS[name])
    if name in ("delta_r", "delta_r_triu", "qrlora"):
        given["basis_cache"] = cache
    network = module.create_network(1.0, rank, rank, None, [], denoiser, **given)
    network.apply_to([], denoiser, False, True)
    network.cast_frozen(dtype)
    return network.to(device)


def forward(denoiser: nn.Module, network: Any, given: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The denoiser's output under autocast, at timestep 500."""
    at = torch.tensor([step_time.TIMESTEP], device=given["hidden_states"].device)
    gate = network.denoise_at(at) if network is not None else contextlib.nullcontext()
    with gate, torch.autocast(at.device.type, dtype):
        return denoiser(**given, return_dict=False)[0]


# ---------------------------------------------------------------------------------------------- the checks


def laws(sizes: Sizes, device: str, cache: str) -> Iterator[dict[str, Any]]:
    """A new adapter changes nothing, its gradients are finite, and the base is as before without it."""
    sizes = Sizes(sizes.tiny, 1024, 576)  # a null space of FLUX's largest layer would take seconds
    given = {dtype: batch(sizes, device, dtype) for dtype in (torch.bfloat16, torch.float16)}
    for dtype, kind in STORED:
        for name in NETWORKS:
            torch.manual_seed(0)
            denoiser = empty(sizes, (1, 2), dtype)
            filled(denoiser, device)
            if kind:
                blocks.freeze_base(denoiser)
            network = attached(name, denoiser, sizes.rank, cache, dtype, device)
            if kind:
                blocks.store_base(denoiser, kind)
            adapted = forward(denoiser, network, given[dtype], dtype)
            adapted.float().square().mean().backward()
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            network.restore()
            base = forward(denoiser, None, given[dtype], dtype)
            yield {
                "network": name,
                "base": kind or str(dtype)[6:],
                "equal at the start": torch.equal(adapted, base),
                "finite gradients": bool(gradients) and all(bool(g.isfinite().all()) for g in gradients),
            }


def swap(sizes: Sizes, device: str, cache: str) -> Iterator[dict[str, Any]]:
    """A swapped base gives the outputs and gradients of one that stays on the device, bit for bit."""
    dtype, given = torch.bfloat16, batch(sizes, device, torch.bfloat16)
    for kind in (None, "fp8", "nf4"):
        for checkpointing in (False, True):
            results, counts = [], ""
            for swapped in (0, blocks.most_swapped(empty(sizes, (4, 6), dtype))):
                torch.manual_seed(0)
                denoiser = empty(sizes, (4, 6), dtype)
                place = filled(denoiser, device, kind, swapped)
                if checkpointing:
                    memory.checkpoint_blocks(denoiser)
                    denoiser.train()
                x = given["hidden_states"].clone().requires_grad_(True)
                for _ in range(2):  # the first step learns the order of use
                    x.grad = None
                    y = forward(denoiser, None, given | {"hidden_states": x}, dtype)
                    y.float().square().mean().backward()
                results.append((y.detach(), x.grad))
                if place is not None:
                    counts = f"{place.counts.fetches // 2} fetches, {place.counts.copies // 2} copies"
            equal = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
            yield {"base": kind or "bf16", "checkpointing": checkpointing, "equal": equal, "a step": counts}


def compiled(sizes: Sizes, device: str, cache: str) -> Iterator[dict[str, Any]]:
    """Blocks compiled once each give eager's output up to the rounding of fused kernels."""
    dtype, given = torch.bfloat16, batch(sizes, device, torch.bfloat16)
    for name in ("lora", "delta_r", "dora", "tlora"):
        torch.manual_seed(0)
        denoiser = empty(sizes, (2, 4), dtype)
        filled(denoiser, device)
        network = attached(name, denoiser, sizes.rank, cache, dtype, device)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-2)
            eager = forward(denoiser, network, given, dtype).float()
            denoiser.compile_repeated_blocks(backend="inductor" if device == "cuda" else "aot_eager")
            difference = (forward(denoiser, network, given, dtype).float() - eager).norm() / eager.norm()
        torch.compiler.reset()
        yield {"network": name, "relative difference": float(difference)}


def step_times(sizes: Sizes, device: str, cache: str) -> Iterator[dict[str, Any]]:
    """A training step of each method against PEFT's LoRA and the frozen model: medians of ratios."""
    every = ("base", "peft", "lora", "delta_r", "dora", "tlora", "qrlora", "null_lora", "universal_lora")
    settings = [(size, False, every) for size in sizes.widths]
    if device == "cuda":
        settings.append(("FLUX", True, every[:4]))
    for size, compiles, names in settings:
        hidden, tokens = sizes.widths[size]
        options = argparse.Namespace(hidden=hidden, tokens=tokens, rank=sizes.rank, device=device)
        options.cache, options.compile = cache, compiles
        steps = {name: step_time.stepper(name, options, torch.bfloat16)[0] for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(sizes.turns + 2):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                if turn >= 2:
                    times[name].append(time.perf_counter() - started)
        for name in names:
            row: dict[str, Any] = {"size": size, "compiled": "yes" if compiles else "no", "method": name}
            row["seconds"] = statistics.median(times[name])
            for other in ("peft", "base"):
                ratios = [a / b for a, b in zip(times[name], times[other], strict=True)]
                row[f"/ {other}"] = statistics.median(ratios)
            yield row
        del steps
        release(device)


def bases(sizes: Sizes, device: str, cache: str) -> Iterator[dict[str, Any]]:
    """The QR bases of all layers that FLUX.1-dev's adapters have; the target is 60 seconds for 342 layers."""
    layers = find("unet", empty(sizes, sizes.whole, torch.bfloat16))
    shapes = [tuple(target.module.weight.shape) for target in layers]
    started = time.perf_counter()
    for seed, shape in enumerate(shapes):
        torch.manual_seed(seed)
        decompose(torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02, sizes.rank)
    synchronise(device)
    yield {"layers": len(shapes), "rank": sizes.rank, "seconds": time.perf_counter() - started}


def runs(sizes: Sizes, device: str, cache: str) -> Iterator[dict[str, Any]]:
    """Steps at 1024², batch 1, with checkpointing, with the memory of smaller cards."""
    for card, kind, swapped, rank in RUNS:
        with limited(device, card):
            torch.manual_seed(0)
            denoiser = empty(sizes, sizes.whole, torch.bfloat16)
            swapped = min(swapped, blocks.most_swapped(denoiser))
            filled(denoiser, device, kind, swapped)
            network = attached("lora", denoiser, min(rank, sizes.rank), cache, torch.bfloat16, device)
            memory.checkpoint_blocks(denoiser, network.clock.now)
            denoiser.train()
            optimizer, given = torch.optim.AdamW(network.parameters()), batch(sizes, device, torch.bfloat16)
            times = []
            for _ in range(sizes.steps):
                started = time.perf_counter()
                forward(denoiser, network, given, torch.bfloat16).float().square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                synchronise(device)
                times.append(time.perf_counter() - started)
            peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
            yield {
                "card": f"{card} GB",
                "base": kind,
                "blocks swapped": swapped,
                "rank": min(rank, sizes.rank),
                "seconds a step": statistics.median(times),
                "peak GiB": peak / GIB,
            }
            del denoiser, network, optimizer


def planner(sizes: Sizes, device: str, cache: str) -> Iterator[dict[str, Any]]:
    """The predicted peak of live tensors against torch.cuda.max_memory_allocated, within 10 %."""
    plan, kinds = (
        plan_memory.plan_memory,
        {"flux": flux_train.main, "sd15": sd_train.main, "sdxl": sd_train.main_sdxl},
    )
    for kind, side, more in TINY_PLANS if sizes.tiny else PLANS:
        peaks: dict[str, float] = {}

        def both(job: Any, models: Any, loader: Any, peaks: dict[str, float] = peaks) -> list[Phase]:
            phases = plan(job, models, loader, gpu=device == "cuda")
            release(device)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            measured = max(phase.peak for phase in plan(job, models, loader, values=True, device=device))
            if device == "cuda":
                measured = torch.cuda.max_memory_allocated()
            peaks |= {
                "predicted GiB": max(phase.peak for phase in phases) / GIB,
                "measured GiB": measured / GIB,
            }
            return phases

        with patch.object(plan_memory, "plan_memory", both), patch.object(dry_run, "show", lambda *_: 0):
            kinds[kind](_dry_run(kind, side, more, Path(cache), sizes.tiny))
        AcceleratorState._reset_state(True)  # the next setting may have another precision
        close = abs(peaks["predicted GiB"] / peaks["measured GiB"] - 1) <= 0.1
        yield {"model": kind, "picture": f"{side}²", "flags": " ".join(more), **peaks, "within 10 %": close}


def _dry_run(kind: str, side: int, more: tuple[str, ...], folder: Path, tiny: bool) -> list[str]:
    """The command line of a dry run with one picture."""
    pictures = folder / f"pictures{side}" / "1_cat"
    pictures.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side)).save(pictures / "cat.png")
    path = str(make_tiny_flux(folder / "model")) if tiny else BASES[kind]
    return [
        *("--pretrained_model_name_or_path", path, "--train_data_dir", str(pictures.parent), "--dry_run"),
        *("--network_module", "networks.lora", "--network_dim", "16", "--resolution", str(side)),
        *("--mixed_precision", "bf16", "--output_dir", str(folder / "out"), *more),
    ]


CHECKS: dict[str, Callable[[Sizes, str, str], Iterator[dict[str, Any]]]] = {
    "laws": laws,
    "swap": swap,
    "compile": compiled,
    "step time": step_times,
    "bases": bases,
    "runs": runs,
    "planner": planner,
}


# ---------------------------------------------------------------------------------------- the machine, files


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def limited(device: str, gigabytes: int) -> Iterator[None]:
    """Let torch allocate no more than a card of that size has, less 0.6 GiB for CUDA's context."""
    if device != "cuda":
        yield
        return
    share = (gigabytes * 1e9 - 0.6 * GIB) / torch.cuda.get_device_properties(0).total_memory
    release(device)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def measure(device: str, tiny: bool, only: list[str]) -> dict[str, Any]:
    """Run the checks; an error ends a check, and is in its results."""
    sizes, results, begun = Sizes(tiny), {}, time.perf_counter()
    for name in only or CHECKS:
        started, rows, error = time.perf_counter(), [], None
        if started - begun > LIMIT:
            results[name] = {"rows": [], "error": f"the {LIMIT:.0f} seconds were over", "seconds": 0.0}
            continue
        with tempfile.TemporaryDirectory() as cache:
            try:
                for row in CHECKS[name](sizes, device, cache):
                    print(name, row, flush=True)
                    rows.append(row)
            except (RuntimeError, ValueError, TypeError, AttributeError) as failure:  # out of memory too
                error = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
                print(name, error, flush=True)
        release(device)
        results[name] = {"rows": rows, "error": error, "seconds": time.perf_counter() - started}
    gpu = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    return {"device": gpu, "torch": torch.__version__, "checks": results}


def render(results: dict[str, Any] | None) -> str:
    """docs/gpu_check.md: a table for each check, or which checks there are."""
    head = (
        "Not measured: no GPU was available to this project. The script was run on the CPU with small sizes."
    )
    if results is not None:
        head = f"Measured on {results['device']} with torch {results['torch']}."
    lines = ["# Checks on a GPU", "", head, ""]
    lines += ["`python benchmarks/gpu_check.py` writes the results, and with `--render` it writes this page."]
    lines += ["Words: [glossary.md](glossary.md).", ""]
    if results is None:
        lines += ["| check | what has to hold |", "|---|---|"]
        lines += [f"| {name} | {(check.__doc__ or '').strip()} |" for name, check in CHECKS.items()]
        return "\n".join(lines) + "\n"
    for name, result in results["checks"].items():
        lines += [f"## {name}", "", (CHECKS[name].__doc__ or "").strip(), ""]
        if result["error"]:
            lines += [f"It ended early: {result['error']}.", ""]
        rows = result["rows"]
        if rows:
            lines += ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
            lines += ["| " + " | ".join(map(_shown, row.values())) + " |" for row in rows] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> int:
    """Measure or render; the exit code is 1 if a check found a difference or ended early."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small sizes; no file is written")
    parser.add_argument("--only", nargs="+", default=[], choices=CHECKS, help="checks to run; no file")
    parser.add_argument("--render", action="store_true", help="write docs/gpu_check.md from the results")
    args = parser.parse_args(argv)
    if args.render:
        PAGE.write_text(render(json.loads(RESULTS.read_text()) if RESULTS.is_file() else None))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no GPU; give --device cpu --tiny to test this script", file=sys.stderr)
        return 1
    results = measure(args.device, args.tiny, args.only)
    if not (args.tiny or args.only):
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    bad = [
        (name, row)
        for name, check in results["checks"].items()
        for row in check["rows"]
        if any(value is False for key, value in row.items() if key != "checkpointing")
    ]
    for name, row in bad:
        print(f"differs: {name} {row}")
    return int(bool(bad) or any(check["error"] for check in results["checks"].values()))


if __name__ == "__main__":
    sys.exit(main())
