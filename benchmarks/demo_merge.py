"""Quality of merged adapters on a demo model for each method, with controls.

    python benchmarks/demo_merge.py flux                 # controls, single adapters, grids, every method
    python benchmarks/demo_merge.py flux --methods lora  # one method

Content is trained from the picture in assets/cnt, style from the one in assets/sty. Every method gets equal
steps, and the best of three learning rates, chosen by what single adapters achieve with separate seeds: the
content on new backgrounds and in known styles named in the prompt, the style on other contents.

A picture counts if the scorer finds both content and style right. Controls: one adapter trained on both at
once, and the content adapter with known styles named in the prompt. Only if these succeed does the grid show
something about merging. Numbers are fractions with 95 % Wilson intervals, written to
benchmarks/results/demo_merge_<family>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowrank.cli import flux_train, sd_train
from lowrank.combine.mixture import Mixture
from lowrank.formats.read import Adapter
from tools.glyph_world import report, scorer
from tools.glyph_world.world import BACKGROUNDS, SEEN_STYLES, Scene, caption

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "assets/demo"
CONTENT, STYLE = ROOT / "assets/cnt/dog", ROOT / "assets/sty/cat"
# ranks with about equal trained parameters: ΔR and ΔR-triu train rank × inputs, LoRA both sides
METHODS = {"delta_r_triu": 32, "delta_r": 32, "qrlora": 16, "lora": 16}
RATES = {
    "delta_r_triu": (5e-4, 1e-3, 2e-3),
    "delta_r": (5e-4, 1e-3, 2e-3),
    "qrlora": (1e-4, 3e-4, 1e-3),
    "lora": (5e-4, 1e-3, 2e-3),
}
STEPS = {CONTENT: 150, STYLE: 250}
STRENGTHS = (0.7, 1.0, 1.3)
GUIDANCE = 2.0  # with adapters; lower than in the model cards
MAINS = {"flux": flux_train.main, "sd15": sd_train.main, "sdxl": sd_train.main_sdxl}


def train(
    family: str, method: str, rate: float, pictures: Path, prompt: str, out: Path, steps: int, rank: int
) -> float:
    """Train one adapter with the training script; returns the seconds it took."""
    arguments = [
        *("--pretrained_model_name_or_path", str(DEMO / family), "--output_dir", str(out)),
        *("--instance_data_dir", str(pictures), "--instance_prompt", prompt, "--resolution", "64"),
        *("--network_module", f"networks.{method}", "--network_dim", str(rank), "--network_alpha", str(rank)),
        *("--learning_rate", str(rate), "--max_train_steps", str(steps), "--train_batch_size", "4"),
        *("--network_train_unet_only", "--mixed_precision", "no", "--seed", "0", "--log_with", "none"),
        *("--cache_latents", "--lr_scheduler", "cosine"),
        *(("--guidance_scale", "1", "--discrete_flow_shift", "1.0") if family == "flux" else ()),
    ]
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        MAINS[family](arguments)
    return time.perf_counter() - started


class Bench:
    """A loaded pipeline, the scorer, and a folder for adapters."""

    def __init__(self, family: str, folder: Path, seeds: int):
        from diffusers import DiffusionPipeline

        self.family, self.folder, self.seeds = family, folder, seeds
        self.pipe: Any = DiffusionPipeline.from_pretrained(DEMO / family, dtype=torch.float32)
        self.judge = scorer.load(DEMO / "scorer")
        self.call = report.CALL[family] | {"guidance_scale": GUIDANCE}
        self.denoiser = self.pipe.transformer if family == "flux" else self.pipe.unet

    def adapter(self, method: str, rate: float, pictures: Path, prompt: str) -> Adapter:
        """Train an adapter, or read the file of an earlier call with equal arguments."""
        steps = STEPS.get(pictures, STEPS[STYLE])
        out = self.folder / f"{method}-{rate:g}-{pictures.name}-{steps}"
        file = out / "pytorch_lora_weights.safetensors"
        if not file.is_file():
            seconds = train(self.family, method, rate, pictures, prompt, out, steps, METHODS[method])
            print(f"trained {out.name} in {seconds:.0f} s", file=sys.stderr, flush=True)
        return Adapter(next(out.glob("*.safetensors")))

    def draw(
        self,
        adapters: Sequence[Adapter],
        weights: Sequence[float],
        prompts: Sequence[tuple[Scene, str]],
        seed: int,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Generate pictures (N, 64, 64, 3) with adapters, and score their content, style and background."""
        attached = Mixture(adapters).attach(self.denoiser) if adapters else None
        if attached:
            attached.set(weights)
        drawn = report.pictures(self.pipe, [prompt for _, prompt in prompts], seed, self.call)
        if attached:
            attached.restore()
        return drawn, scorer.score(self.judge, drawn, [scene for scene, _ in prompts])


def contents_prompts(count: int) -> list[tuple[Scene, str]]:
    """Return prompts for the new content as a photo, on all backgrounds except that of its training."""
    backgrounds = [b for b in BACKGROUNDS if b != "meadow"]
    scenes = [Scene("poodle", "photo", backgrounds[i % len(backgrounds)]) for i in range(count)]
    return [(s, caption(s).replace("poodle", "<c> dog")) for s in scenes]


def style_prompts(count: int) -> list[tuple[Scene, str]]:
    """Return prompts for known contents, except cat, in the new style."""
    names = ("dog", "car", "house", "bird", "fish", "tree", "horse", "mushroom")
    return [
        (Scene(names[i % len(names)], "stained glass", "white"), f"a {names[i % len(names)]} in <s> style")
        for i in range(count)
    ]


def both_prompts(count: int) -> list[tuple[Scene, str]]:
    """Return prompts for the new content in the new style, which no adapter was trained on together."""
    return [(Scene("poodle", "stained glass", "white"), "a <c> dog in <s> style")] * count


def word_prompts(count: int) -> list[tuple[Scene, str]]:
    """Return prompts for the new content in known styles, named in the prompt."""
    styles = [s for s in SEEN_STYLES if s != "photo"]
    scenes = [Scene("poodle", styles[i % len(styles)], "white") for i in range(count)]
    return [(s, f"a <c> dog in {s.style} style") for s in scenes]


def joint(right: dict[str, np.ndarray]) -> np.ndarray:
    """Return for each picture whether content and style are both right."""
    return right["content"] & right["style"]


def shares(right: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the fractions of right contents, right styles, and both, with intervals."""
    both = {"content": right["content"], "style": right["style"], "both": joint(right)}
    return {name: report.share(values) for name, values in both.items()}


def tuned(bench: Bench, method: str) -> dict[str, tuple[float, Adapter]]:
    """Choose the learning rate of each single adapter, by its success with separate seeds."""
    chosen = {}
    for what, pictures, prompt, prompts in (
        ("content", CONTENT, "a photo of a <c> dog", contents_prompts(10) + word_prompts(10)),
        ("style", STYLE, "a cat in <s> style", style_prompts(16)),
    ):
        trials = []
        for rate in RATES[method]:
            adapter = bench.adapter(method, rate, pictures, prompt)
            right = bench.draw([adapter], [1.0], prompts, 50_000)[1]
            trials.append((float(joint(right).mean()), rate, adapter))
        best = max(trials, key=lambda trial: trial[0])
        chosen[what] = (best[1], best[2])
    return chosen


def method_results(bench: Bench, method: str, sheets: Path) -> dict[str, Any]:
    """Measure single adapters and the grid of strengths of one method; save a sheet of the grid."""
    chosen = tuned(bench, method)
    content, style = chosen["content"][1], chosen["style"][1]
    n = bench.seeds
    result: dict[str, Any] = {
        "rank": METHODS[method],
        "learning rates": {what: rate for what, (rate, _) in chosen.items()},
        "content alone": shares(bench.draw([content], [1.0], contents_prompts(n), 0)[1]),
        "style alone": shares(bench.draw([style], [1.0], style_prompts(n), 0)[1]),
        "content with known styles": shares(bench.draw([content], [1.0], word_prompts(n), 0)[1]),
    }
    grid, rows = {}, []
    for a in STRENGTHS:
        row = []
        for b in STRENGTHS:
            drawn, right = bench.draw([style, content], [a, b], both_prompts(n), 0)
            grid[f"style {a:g}, content {b:g}"] = shares(right)
            row.append(np.concatenate(list(drawn[:3]), 1))
        rows.append(np.concatenate(row, 1))
    Image.fromarray(np.concatenate(rows)).save(sheets / f"{bench.family}-{method}.png")
    result["merge"] = grid
    result["best cell"] = max(grid.items(), key=lambda item: item[1]["both"]["share"])
    return result


def control(bench: Bench, method: str = "lora") -> dict[str, Any]:
    """Measure one adapter trained on the held-out content in the held-out style, from one picture."""
    from tools.glyph_world.draw import render  # needs the font

    pictures = bench.folder / "both"
    pictures.mkdir(exist_ok=True)
    scene = Scene("poodle", "stained glass", "meadow")
    Image.fromarray(render(scene, np.random.default_rng(1))).save(pictures / "both.png")
    trials = []
    for rate in RATES[method]:
        adapter = bench.adapter(method, rate, pictures, "a <c> dog in <s> style")
        result = shares(bench.draw([adapter], [1.0], both_prompts(bench.seeds), 0)[1])
        trials.append((result["both"]["share"], rate, result))
    best = max(trials, key=lambda trial: trial[0])
    return {"learning rate": best[1], **best[2]}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("family", choices=list(MAINS), help="demo model")
    parser.add_argument("--methods", default=",".join(METHODS), help="methods, separated by commas")
    parser.add_argument("--seeds", type=int, default=64, help="pictures per number")
    parser.add_argument(
        "--folder", type=Path, help="folder to keep the adapters in (default: a temporary folder)"
    )
    options = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.family, folder, options.seeds)
    results: dict[str, Any] = {"steps": list(STEPS.values()), "batch": 4, "guidance": GUIDANCE}
    results["control: one adapter for both"] = control(bench)
    print(json.dumps(results), flush=True)
    for method in options.methods.split(","):
        results[method] = method_results(bench, method, folder)
        print(json.dumps({method: results[method]}), flush=True)
    out = ROOT / "benchmarks/results" / f"demo_merge_{options.family}.json"
    out.write_text(json.dumps(results, indent=2) + "\n")
    if not options.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
