"""Cost of data loading: scanning a large folder, and a cached epoch relative to the model's steps.

    python benchmarks/data.py                 # 100,000 images with captions, then epochs of a small U-Net
    python benchmarks/data.py --quick

Scan: small PNG and JPEG files with caption files are written to a temporary folder, scanned, put into buckets
and ordered. The files are in the page cache, and no pixel may be decoded.

Epoch: each turn runs the loader alone, the steps on batches in memory, and the steps on the loader's batches,
for caches in memory and on disk. `alone` is the loader's time divided by the steps' time: its cost without
overlap. `measured` is the additional time of the epoch. On a CPU times are CPU-seconds with one torch thread,
which other programs hardly disturb; results are medians and quartiles over the turns. The U-Net is tiny, so
that its step is about as short as that of a real one on a GPU. Writes benchmarks/results/data_<device>.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import torch
from diffusers import UNet2DConditionModel
from PIL import Image, ImageFile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowrank.data import plan
from lowrank.data.cache import Cache
from lowrank.data.dataset import from_folders
from lowrank.data.loader import Batch, Loader

TARGET = 0.02  # largest cost, as a fraction of the model's step
BUCKETS = {"enable_bucket": True, "resolution": 512, "caption_extension": ".txt"}


def fill(folder: Path, count: int, sides: tuple[int, int]) -> None:
    """Write `count` images of 64 different contents and shapes, each with a caption file."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    samples = []
    for index in range(64):
        ending = (".png", ".jpg")[index % 2]
        sample = folder / f"sample{ending}"
        size = rng.randint(*sides), rng.randint(*sides)
        Image.effect_noise(size, 60).convert("RGB").save(sample)
        samples.append((ending, sample.read_bytes()))
        sample.unlink()
    for index in range(count):
        ending, content = samples[index % 64]
        (folder / f"{index:06}{ending}").write_bytes(content)
        (folder / f"{index:06}.txt").write_text(f"a cat, number {index}, grass, sky")


def scan(folder: Path, count: int) -> dict[str, float]:
    """Measure wall time and CPU time until the first batch is planned, and count decoded images."""
    fill(folder / "1_cat", count, (24, 48))
    with mock.patch.object(ImageFile.ImageFile, "load", side_effect=AssertionError("pixels decoded")) as load:
        wall, cpu = time.perf_counter(), time.process_time()
        loader = Loader(from_folders(folder, batch_size=4, flip_aug=True, **BUCKETS), seed=0)
        captions = loader.captions()
        scanned = time.perf_counter() - wall, time.process_time() - cpu
        assert captions is not None and len(captions) == count
        plan.epoch_batches(loader.groups, 0, 0)
        return {
            "images": count,
            "wall_s": scanned[0],
            "cpu_s": scanned[1],
            "first_order_s": time.perf_counter() - wall - scanned[0],
            "pixels_decoded": load.call_count,
        }


def stepper(device: str, width: int) -> Callable[[Batch], None]:
    """Return a training step of a tiny U-Net on 64×64 latents, which trains the attention's queries."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(width, 2 * width, 4 * width),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=768,
        attention_head_dim=8,
        norm_num_groups=8,
    ).to(device)
    model.requires_grad_(False)
    trained = [p.requires_grad_(True) for name, p in model.named_parameters() if "to_q" in name]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    text = torch.randn(1, 77, 768, device=device)

    def step(batch: Batch) -> None:
        assert batch.encoded is not None
        latents = batch.encoded.to(device)[:, :4]
        noise = torch.randn_like(latents)
        timesteps = torch.full((len(latents),), 500, device=device)
        words = text.expand(len(latents), -1, -1)
        prediction = model(latents + noise, timesteps, words, return_dict=False)[0]
        loss = (prediction - noise).square().mean((1, 2, 3)) * batch.loss_weights.to(device)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def seconds(batches: Iterable[Batch], step: Callable[[Batch], object], device: str) -> float:
    """Return the CPU-seconds of all threads for all batches, or on a GPU the wall time."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    for batch in batches:
        step(batch)
    return clock() - started


def epochs(folder: Path, args: argparse.Namespace) -> dict[str, dict[str, float | list[float]]]:
    """Measure for each kind of cache the loader's fraction of an epoch, alone and together with the steps."""
    fill(folder / "1_cat", args.images, (400, 800))
    plain = Loader(
        from_folders(folder, batch_size=args.batch_size, flip_aug=True, alpha_mask=True, **BUCKETS), seed=0
    )

    def encode(pixels: torch.Tensor) -> torch.Tensor:  # like a VAE: 8 channels, an eighth of each side
        return torch.nn.functional.avg_pool2d(pixels, 8).repeat(1, 3, 1, 1)[:, :8]

    if args.device == "cpu":
        torch.set_num_threads(1)
    step = stepper(args.device, args.width)
    rows = {}
    for name, cache in (("memory", Cache()), ("disk", Cache(folder / "cache"))):
        loader = plain.encode_all(encode, model_hash="benchmark", cache=cache, batch_size=4)
        batches = list(loader.epoch(0))
        seconds(batches[:2], step, args.device)
        turns = [
            (
                seconds(loader.epoch(0), lambda batch: None, args.device),
                seconds(batches, step, args.device),
                seconds(loader.epoch(0), step, args.device),
            )
            for _ in range(args.turns)
        ]
        rows[name] = {
            "batches": len(batches),
            "step_s": statistics.median(steps for _, steps, _ in turns) / len(batches),
            "loader_s_per_batch": statistics.median(alone for alone, _, _ in turns) / len(batches),
            "alone": quartiles([alone / steps for alone, steps, _ in turns]),
            "measured": quartiles([both / steps - 1 for _, steps, both in turns]),
        }
    return rows


def quartiles(values: list[float]) -> list[float]:
    """Return the three quartiles of `values`."""
    return statistics.quantiles(values, n=4) if len(values) > 1 else values * 3


def main() -> None:
    """Measure, print the tables, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--width", type=int, default=16, help="channels of the U-Net's first block")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and few turns, to test that it runs"
    )
    args = parser.parse_args()
    if args.quick:
        args.files, args.images, args.turns, args.width = 500, 4, 2, 8
    with tempfile.TemporaryDirectory() as folder:
        scanned = scan(Path(folder) / "scan", args.files)
    print(
        f"scan: {scanned['images']:,} images and captions in {scanned['wall_s']:.1f} s "
        f"({scanned['cpu_s']:.1f} s of CPU), order of an epoch {scanned['first_order_s']:.2f} s, "
        f"{scanned['pixels_decoded']} decoded",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = epochs(Path(folder) / "epoch", args)
    print(f"| cache | step s | loader ms per batch | alone | measured (quartiles) | target {TARGET} |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        low, middle, high = row["measured"]
        print(
            f"| {name} | {row['step_s']:.3f} | {1000 * row['loader_s_per_batch']:.2f} | "
            f"{row['alone'][1]:.4f} | {middle:.4f} ({low:.4f}–{high:.4f}) | "
            f"{'met' if row['alone'][1] <= TARGET else 'missed'} |"
        )
    settings = vars(args) | {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if not args.quick:
        path = Path(__file__).parent / "results" / f"data_{args.device}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"settings": settings, "scan": scanned, "epoch": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
