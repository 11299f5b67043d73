"""Compare networks.lora_flux of kohya sd-scripts and of lowrank, each in its own trainer, on a tiny FLUX.

    export SD_SCRIPTS=/path/to/sd-scripts SD_SCRIPTS_PYTHON=/path/to/its/venv/bin/python
    python benchmarks/kohya_flux_equal.py

Both train the transformer, CLIP-L and, in one of the cases, T5 in fp32 from one seed, with latents, noise and
timesteps from a tape. Prints for each case whether keys and shapes are equal, how far training moved ΔW and
the largest difference of ΔW, and writes benchmarks/results/kohya_flux_equal.json. Exits with 1 if keys or
shapes differ, or if a difference is above --tolerance. The optimizer is SGD: AdamW divides by the gradient's
magnitude, which magnifies rounding where a gradient is nearly zero.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from kohya_equal import BATCH, ROOT, child
from safetensors.torch import load_file, save_file

SEED, RANK, ALPHA = 3, 4, 2.0
CASES: dict[str, tuple[str, ...]] = {
    "all blocks": (),
    "as guides write it": ("train_double_block_indices=all", "train_single_block_indices=all"),
    "some blocks, T5": (
        *("train_double_block_indices=0,2", "train_single_block_indices=1-2", "train_t5xxl=True"),
        *("img_mlp_dim=2", "single_mod_dim=0", "in_dims=[2,2,0,2,2]"),
    ),
    "ranks and rates by name": (
        *("network_reg_dims=linear2=3,te1=1", "network_reg_lrs=img_mlp=4,te1=2"),
        *("train_blocks=all", "loraplus_unet_lr_ratio=2"),
    ),
}


def train(trainer: str, tape: Path, line: list[str]) -> None:
    """Run one training command with the tape in place of latents, noise and timesteps."""
    tensors = load_file(tape)
    steps = iter(zip(tensors["latents"], tensors["noise"], tensors["sigma"], strict=True))
    if trainer == "kohya":
        kohya = importlib.import_module("tools.tiny_kohya")
        kohya.shrink()
        utils: Any = importlib.import_module("library.flux_train_utils")

        def drawn(_args: Any, _scheduler: Any, latents: Any, noise: Any, *_: Any) -> tuple:
            taped_latents, taped_noise, sigma = next(steps)
            latents.copy_(taped_latents)  # the trainer computes its target from these two tensors
            noise.copy_(taped_noise)
            column = sigma[:, None, None, None]
            return (1 - column) * latents + column * noise, 1000 * sigma, column

        utils.get_noisy_model_input_and_timesteps = drawn
        module: Any = importlib.import_module("networks.lora_flux")
        assert str(kohya.CHECKOUT) in str(module.__file__)
        create = module.create_network

        def seeded(*words: Any, **named: Any) -> Any:
            torch.manual_seed(SEED)
            return create(*words, **named)

        module.create_network = seeded
        script = kohya.CHECKOUT / "flux_train_network.py"
    else:
        flow: Any = importlib.import_module("lowrank.objective.flow")

        def draw(_flow: Any, _latents: Any, _generator: Any, at: float | None = None) -> Any:
            assert at is None  # no validation here
            x0, noise, sigma = next(steps)
            return flow.Draw(flow.interpolate(x0, noise, sigma), noise - x0, sigma, 1000 * sigma)

        flow.Flow.draw = draw
        script = ROOT / "flux_train_qrlora.py"
    sys.argv = [str(script), *line]
    runpy.run_path(str(script), run_name="__main__")


def main(argv: list[str] | None = None) -> int:
    """Train each case twice and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5, help="training steps")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest allowed difference of ΔW")
    options = parser.parse_args(argv)
    if "SD_SCRIPTS" not in os.environ:
        sys.exit("SD_SCRIPTS is not set; set it to a checkout of kohya sd-scripts")
    kohya_python, result, worst = os.environ.get("SD_SCRIPTS_PYTHON", sys.executable), {}, 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        child(kohya_python, folder, ROOT / "tools" / "tiny_kohya.py", "make", folder)
        save_file(_tape(options.steps), folder / "tape.safetensors")
        for case, arguments in CASES.items():
            files = {}
            for trainer, python in (("kohya", kohya_python), ("ours", sys.executable)):
                line = _line(folder, options.steps, trainer, arguments)
                job = json.dumps([trainer, str(folder / "tape.safetensors"), line])
                child(python, folder, Path(__file__).resolve(), "--child", job)
                files[trainer] = load_file(folder / f"{trainer}.safetensors")
            result[case] = compared = _compare(files["kohya"], files["ours"])
            worst = max(worst, compared["largest difference"])
            print(f"{case}: {compared}")
    target = ROOT / "benchmarks" / "results" / "kohya_flux_equal.json"
    target.write_text(json.dumps({"steps": options.steps, **result}, indent=1) + "\n")
    return int(worst > options.tolerance)


def _line(folder: Path, steps: int, name: str, arguments: tuple[str, ...]) -> list[str]:
    parts = {"kohya": ("", ""), "ours": ("model.safetensors", "model.safetensors")}[name]
    values = {
        "pretrained_model_name_or_path": folder / "flux" / "flux1-dev.safetensors",
        "clip_l": folder / "parts" / "text_encoder" / parts[0],
        "t5xxl": folder / "parts" / "text_encoder_2" / parts[1],
        "ae": folder / "flux" / "ae.safetensors",
        "tokenizer_cache_dir": folder / "tokenizers",
        "t5xxl_max_token_length": 32,
        "train_data_dir": folder / "data",
        "resolution": "64,64",
        "caption_extension": ".txt",
        "max_train_steps": steps,
        "train_batch_size": BATCH,
        "network_module": "networks.lora_flux",
        "network_dim": RANK,
        "network_alpha": ALPHA,
        "optimizer_type": "SGD",
        "learning_rate": 10,
        "model_prediction_type": "raw",
        "guidance_scale": 1,
        "mixed_precision": "no",
        "seed": SEED,
        "max_data_loader_n_workers": 0,
        "output_dir": folder,
        "output_name": name,
    }
    words = [str(word) for key, value in values.items() for word in (f"--{key}", value)]
    return [*words, *(["--network_args", *arguments] if arguments else [])]


def _tape(steps: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shape = (steps, BATCH, 16, 8, 8)
    return {
        "latents": torch.randn(shape, generator=rng),
        "noise": torch.randn(shape, generator=rng),
        "sigma": torch.rand((steps, BATCH), generator=rng),
    }


def _compare(kohya: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return how keys, shapes and ΔW = alpha/rank · U·D of two files differ."""
    same = kohya.keys() == ours.keys() and all(kohya[key].shape == ours[key].shape for key in kohya)
    if not same:
        return {"keys and shapes": "differ", "largest difference": float("inf")}
    layers = [key.removesuffix(".alpha") for key in kohya if key.endswith(".alpha")]
    moved, difference = 0.0, 0.0
    for layer in layers:
        first, second = (
            state[f"{layer}.alpha"]
            / len(state[f"{layer}.lora_down.weight"])
            * state[f"{layer}.lora_up.weight"]
            @ state[f"{layer}.lora_down.weight"]
            for state in (kohya, ours)
        )
        moved, difference = (
            max(moved, float(first.abs().max())),
            max(difference, float((first - second).abs().max())),
        )
    return {
        "keys and shapes": "equal",
        "layers": len(layers),
        "largest ΔW": moved,
        "largest difference": difference,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        trainer, tape, line = json.loads(sys.argv[2])
        train(trainer, Path(tape), line)
    else:
        sys.exit(main())
