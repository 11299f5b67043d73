"""Compare LoRA training of kohya sd-scripts and lowrank with equal start, latents, noise and timesteps.

    export SD_SCRIPTS=/path/to/sd-scripts SD_SCRIPTS_PYTHON=/path/to/its/venv/bin/python
    python benchmarks/kohya_equal.py                                     # a tiny SD 1.5
    python benchmarks/kohya_equal.py --model v1-5-pruned.safetensors --tokenizers folder --side 512

Three runs of SD 1.5's U-Net and text encoder in fp32: kohya's trainer with kohya's LoRA, kohya's trainer with
our LoRA, our trainer with our LoRA. Random numbers come from a tape, instead of each trainer's generator.
Prints the largest difference of a weight and how far training moved the weights, and writes
benchmarks/results/kohya_equal.json for the tiny model. Exits with 1 if SGD's difference is above --tolerance.
AdamW divides by the gradient's magnitude, which magnifies rounding where a gradient is nearly zero.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowrank.objective.diffusion import alpha_bars

ROOT = Path(__file__).resolve().parents[1]
OPTIMIZERS = {"SGD": 0.1, "AdamW": 1e-4}  # with the learning rate
BATCH, RANK, ALPHA = 2, 4, 2.0
OURS = "lora_of_lowrank"  # module name of our networks/lora.py in kohya's trainer


# ---------- inside one training


def taped(tape: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (noisy latents, noise, timesteps) of each step from a tape."""
    tensors = load_file(tape)
    yield from zip(tensors["noisy"], tensors["noise"], tensors["timesteps"], strict=True)


def train(trainer: str, tape: Path, tiny: bool, line: list[str]) -> None:
    """Run one training command with the tape instead of random numbers."""
    steps = taped(tape)
    if trainer == "kohya":
        kohya = importlib.import_module("tools.tiny_kohya")
        if tiny:
            kohya.shrink()
        else:
            sys.path.insert(0, str(kohya.CHECKOUT))
        util: Any = importlib.import_module("library.train_util")

        def drawn(*_: Any) -> tuple:
            noisy, noise, timesteps = next(steps)
            return noise, noisy, timesteps

        util.get_noise_noisy_latents_and_timesteps = drawn
        script = kohya.CHECKOUT / "train_network.py"
    else:
        ddpm: Any = importlib.import_module("lowrank.objective.diffusion")

        def draw(objective: Any, _latents: Any, _generator: Any, at: float | None = None) -> Any:
            assert at is None  # no validation here
            noisy, noise, timesteps = next(steps)
            alpha_bar = objective.alpha_bar(timesteps)
            return ddpm.Draw(noisy, noise, (1 - alpha_bar).sqrt().float(), timesteps.float())

        ddpm.Diffusion.draw = draw
        script = ROOT / "train_network_ABM.py"
    sys.argv = [str(script), *line]
    runpy.run_path(str(script), run_name="__main__")


# ---------- three trainings


def child(python: str, folder: Path, *words: object) -> None:
    """Run a Python script in a new process that can import our tree and the module `OURS`."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [python, *map(str, words)], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if finished.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{(finished.stdout + finished.stderr)[-4000:]}")


def main(argv: list[str] | None = None) -> int:
    """Train three times and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="SD 1.5 as a file or a diffusers folder (default: a tiny one)")
    parser.add_argument("--tokenizers", help="tokenizer_cache_dir of both trainers")
    parser.add_argument("--steps", type=int, default=10, help="training steps")
    parser.add_argument(
        "--side", type=int, default=256, help="side in pixels of the images behind the latents"
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="largest allowed difference of a weight with SGD"
    )
    options = parser.parse_args(argv)
    kohya_python = os.environ.get("SD_SCRIPTS_PYTHON", sys.executable)
    if "SD_SCRIPTS" not in os.environ:
        sys.exit("SD_SCRIPTS is not set; set it to a checkout of kohya sd-scripts")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        child(kohya_python, folder, ROOT / "tools" / "tiny_kohya.py", "make", folder)
        (folder / f"{OURS}.py").write_text(_alias())
        save_file(_tape(options.steps, options.side // 8), folder / "tape.safetensors")
        line = {
            "pretrained_model_name_or_path": options.model or folder / "sd15",
            "tokenizer_cache_dir": options.tokenizers or folder / "tokenizers",
            "train_data_dir": folder / "data",
            "resolution": "64,64" if options.model is None else f"{options.side},{options.side}",
            "caption_extension": ".txt",
            "max_train_steps": options.steps,
            "train_batch_size": BATCH,
            "network_dim": RANK,
            "network_alpha": ALPHA,
            "seed": 1,
            "max_data_loader_n_workers": 0,
            "output_dir": folder,
            "mixed_precision": "no",
        }
        words = [str(w) for key, value in line.items() for w in (f"--{key}", value)]
        tiny = options.model is None

        def run(python: str, trainer: str, module: str, name: str, *more: object) -> dict[str, torch.Tensor]:
            options = ("--network_module", module, "--output_name", name, *more)
            job = json.dumps([trainer, str(folder / "tape.safetensors"), tiny, [*words, *map(str, options)]])
            child(python, folder, Path(__file__).resolve(), "--child", job)
            trained = load_file(folder / f"{name}.safetensors")
            # safetensors 0.8 returns views of the file, which a later run of this name overwrites
            return {key: value.clone() for key, value in trained.items()}

        # a start whose ups are not zero, so that both factors have gradients from the first step
        start = run(
            sys.executable, "ours", "networks.lora", "start", *_optimizer("AdamW"), "--max_train_steps", 1
        )
        save_file(start, folder / "begin.safetensors")
        trained = {}
        for optimizer in OPTIMIZERS:
            more = ("--network_weights", folder / "begin.safetensors", *_optimizer(optimizer))
            trained[optimizer] = {
                "kohya's LoRA in kohya's trainer": run(kohya_python, "kohya", "networks.lora", "a", *more),
                "our LoRA in kohya's trainer": run(kohya_python, "kohya", OURS, "b", *more),
                "our LoRA in our trainer": run(sys.executable, "ours", "networks.lora", "c", *more),
            }
    return _report(start, trained, options)


def _alias() -> str:
    return (
        "import importlib.util, sys\n"
        f"file = {str(ROOT / 'networks' / 'lora.py')!r}\n"
        f"spec = importlib.util.spec_from_file_location('{OURS}_file', file)\n"
        "module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "create_network = module.create_network\n"
        "create_network_from_weights = module.create_network_from_weights\n"
    )


def _tape(steps: int, side: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    # with fewer pixels the tiny model's deepest group norms have one pixel, which magnifies differences
    shape = (steps, BATCH, 4, side, side)
    latents, noise = torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)
    timesteps = torch.randint(0, 1000, (steps, BATCH), generator=rng)
    alpha_bar = alpha_bars()[timesteps][:, :, None, None, None]
    noisy = (alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise).float()
    return {"noisy": noisy, "noise": noise, "timesteps": timesteps}


def _optimizer(name: str) -> tuple:
    return ("--optimizer_type", name, "--learning_rate", OPTIMIZERS[name])


Tensors = dict[str, torch.Tensor]


def _report(start: Tensors, runs: dict[str, dict[str, Tensors]], options: Any) -> int:
    result: dict[str, Any] = {"steps": options.steps, "keys": len(start)}
    for optimizer, trained in runs.items():
        first, *others = trained
        moved = max(_differences(trained[first], start))
        result[optimizer] = {"moved": moved}
        print(
            f"{optimizer}: {options.steps} steps move a weight by up to {moved:.2e}; compared with {first}:"
        )
        for name in others:
            differences = _differences(trained[name], trained[first])
            median = float(torch.tensor(differences).median())
            result[optimizer][name] = {"largest": max(differences), "median of tensors": median}
            print(
                f"    {name}: differs by up to {max(differences):.2e}, in half of the tensors by {median:.1e}"
            )
    if options.model is None:
        (ROOT / "benchmarks" / "results" / "kohya_equal.json").write_text(json.dumps(result, indent=1) + "\n")
    sgd = (entry["largest"] for entry in result["SGD"].values() if isinstance(entry, dict))
    return int(max(sgd) > options.tolerance)


def _differences(first: Tensors, second: Tensors) -> list[float]:
    """Return the largest difference in each tensor."""
    assert first.keys() == second.keys()
    return [float((value - second[key]).abs().max()) for key, value in first.items()]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        trainer, tape, tiny, line = json.loads(sys.argv[2])
        train(trainer, Path(tape), tiny, line)
    else:
        sys.exit(main())
