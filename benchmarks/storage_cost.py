"""What an adapter loses if it was trained on a stored base and is used on the full one, on a demo model.

    python benchmarks/storage_cost.py                    # SD 1.5's demo model, every kind, three seeds
    python benchmarks/storage_cost.py --kinds nf4 --seeds 1

For each kind of --base_storage, LoRA learns the content of the picture in assets/cnt. The adapter is then
used on the base as it was trained (`same`) and on the base in fp32 (`full`). Measured: the mean squared
error of the predicted noise for that picture at 96 fixed draws of noise and timestep, and the share of 32
pictures with the right content by the demo's scorer. Written to benchmarks/results/storage_cost.json after
each adapter; a second start continues there.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.demo_merge import CONTENT, DEMO, ROOT, Bench, contents_prompts
from lowrank.cli import sd_train
from lowrank.combine.mixture import Mixture, read_for_merge
from lowrank.formats.read import Adapter
from lowrank.models import blocks
from tools.glyph_world import report

KINDS = ("fp32", "bf16", "int8", "fp8_scaled", "fp8", "nf4")
RESULTS = ROOT / "benchmarks/results/storage_cost.json"
DRAWS, PICTURES, STEPS = 96, 32, 150


def train(kind: str, seed: int, out: Path) -> Adapter:
    """Train LoRA of rank 16 on the base in one kind of storage, computing in fp32."""
    arguments = [
        *("--pretrained_model_name_or_path", str(DEMO / "sd15"), "--output_dir", str(out)),
        *("--instance_data_dir", str(CONTENT), "--instance_prompt", "a photo of a <c> dog"),
        *("--resolution", "64", "--network_module", "networks.lora", "--network_dim", "16"),
        *("--network_alpha", "16", "--learning_rate", "1e-3", "--max_train_steps", str(STEPS)),
        *("--train_batch_size", "4", "--network_train_unet_only", "--mixed_precision", "no"),
        *("--seed", str(seed), "--log_with", "none", "--cache_latents", "--lr_scheduler", "cosine"),
        *(() if kind == "fp32" else ("--base_storage", kind)),
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        sd_train.main(arguments)
    return read_for_merge(next(out.glob("*.safetensors")))


@torch.no_grad()
def noise_error(bench: Bench) -> float:
    """Mean squared error of the noise that the pipeline's present denoiser predicts for the picture."""
    pipe, generator = bench.pipe, torch.Generator().manual_seed(7)
    with Image.open(next(CONTENT.glob("*.png"))) as picture:
        pixels = np.asarray(picture.convert("RGB").resize((64, 64), Image.Resampling.BOX))
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    latents = pipe.vae.encode(x).latent_dist.mean * pipe.vae.config.scaling_factor
    text = pipe.encode_prompt("a photo of a <c> dog", "cpu", 1, False)[0]
    noise = torch.randn(DRAWS, *latents.shape[1:], generator=generator)
    times = torch.randint(0, 1000, (DRAWS,), generator=generator)
    schedule = DDPMScheduler.from_config(dict(pipe.scheduler.config))
    noisy = schedule.add_noise(latents.expand(DRAWS, -1, -1, -1), noise, times)
    predicted = pipe.unet(noisy, times, text.expand(DRAWS, -1, -1)).sample
    return float((predicted - noise).square().mean())


def measure(bench: Bench, denoiser: Any, adapter: Adapter | None) -> dict[str, float]:
    """The noise error, and the share of right contents, of a denoiser with an adapter."""
    bench.pipe.unet = bench.denoiser = denoiser
    attached = Mixture([adapter]).attach(denoiser) if adapter else None
    if attached:
        attached.set([1.0])
    error = noise_error(bench)
    if attached:
        attached.restore()
    right = bench.draw([adapter] if adapter else [], [1.0], contents_prompts(PICTURES), 0)[1]
    return {"error": error, "content": report.share(right["content"])["share"]}


def stored(denoiser: Any, kind: str) -> Any:
    """A copy of a denoiser, stored in a kind."""
    twin = copy.deepcopy(denoiser).requires_grad_(False)
    if kind != "fp32":
        blocks.freeze_base(twin)
        blocks.store_base(twin, kind)
    return twin


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of storage, separated by commas")
    parser.add_argument("--seeds", type=int, default=3, help="trained adapters for each kind")
    options = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    bench = Bench("sd15", Path(), PICTURES)
    full = bench.denoiser
    results: dict[str, Any] = {"steps": STEPS, "kinds": {}}
    if RESULTS.is_file():
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds.split(","):
            same = stored(full, kind)
            result = results["kinds"].setdefault(kind, {"runs": []})
            if "base without adapter" not in result:
                result["base without adapter"] = measure(bench, same, None)
            for seed in range(len(result["runs"]), options.seeds):
                started = time.perf_counter()
                adapter = train(kind, seed, Path(folder) / f"{kind}-{seed}")
                run = {"same": measure(bench, same, adapter), "full": measure(bench, full, adapter)}
                result["runs"].append(run)
                print(kind, seed, run, f"{time.perf_counter() - started:.0f} s", flush=True)
                RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
