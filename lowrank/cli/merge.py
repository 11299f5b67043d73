"""Style × content from the command line: a grid of pictures, an XY sheet, a merged adapter."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from lowrank.adapters.targets import find
from lowrank.cli.sheet import sheet
from lowrank.errors import Refused
from lowrank.models.family import Family, Models, Source, release
from lowrank.models.flux import FLUX, FluxOptions
from lowrank.surfaces import INFERENCE_MERGE
from lowrank.train.watch import save_png
from lowrank.weights.merge import Adapter, Mixture
from lowrank.weights.residual import check_residual

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(argv: list[str] | None = None) -> int:
    """Draw every (α, β), write the sheet, save what was asked for. Raises `Refused`."""
    parsed = INFERENCE_MERGE.parse(argv)
    options = parsed.merge
    logging.basicConfig(level="INFO", format="%(message)s")
    folder = Path(options.output_dir)
    grid = [(a, b) for a in options.style_weights for b in options.content_weights]
    names = {pair: "s{}_c{}".format(*labels) for pair, labels in zip(grid, _labels(grid), strict=True)}
    mixture = Mixture([Adapter(options.style_lora_path), Adapter(options.content_lora_path)])
    print(mixture.describe())
    if not options.skip_images or options.residual_path:
        _draw(options, mixture, folder, names)
    if options.save_merged:
        for pair, name in names.items():
            path = folder / f"merged_{name}.safetensors"
            mixture.save(path, pair, {"lowrank.command": parsed.command})
            print(path)
    return 0


def _labels(grid: list[tuple[float, float]]) -> list[tuple[str, str]]:
    """Two decimals where they tell all weights apart, else as many as needed: no file overwrites another."""
    for digits in range(2, 17):
        labels = [(f"{a:.{digits}f}", f"{b:.{digits}f}") for a, b in grid]
        if len(set(labels)) == len(set(grid)):
            if len(set(grid)) < len(grid):
                raise Refused(
                    "a pair of strengths is listed twice; "
                    "give each once in --style_weights, --content_weights"
                )
            return labels
    raise AssertionError("floats differ within 16 digits")


def _draw(options: Any, mixture: Mixture, folder: Path, names: dict[tuple[float, float], str]) -> None:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    family, dtype = FLUX, DTYPES[options.dtype]
    models = family.load(Source(options.model_path, dtype=dtype, device=device), ())
    _check_base(mixture, family, models)
    switches = FluxOptions(
        guidance_scale=options.guidance_scale, t5xxl_max_token_length=options.max_sequence_length
    )
    text = None
    if not options.skip_images:
        family.add(models, ("text",))
        with torch.no_grad():
            text = family.stack_text(family.encode_text(models, [options.prompt], switches))
        release(models, ("text",))
    family.add(models, ("denoiser",))
    if options.residual_path:
        hosts = {t.native.removeprefix("transformer."): t.module for t in find("unet", models.denoiser)}
        for adapter in mixture.adapters:
            print(check_residual(options.residual_path, adapter.layers, adapter.metadata, hosts))
    attached = mixture.attach(models.denoiser, dtype=dtype)
    if text is None:
        return
    family.add(models, ("vae",))
    own = models.configs["vae"].get("sample_size", 1024)
    height, width = options.height or own, options.width or own
    cells: dict[tuple[float, float], Image.Image] = {}
    for pair, name in tqdm(names.items(), desc="images"):
        attached.set(pair)
        for copy in range(options.num_images):
            seed = options.seed + copy
            image = family.sample(
                models,
                text,
                switches,
                height=height,
                width=width,
                steps=options.num_inference_steps,
                generator=torch.Generator().manual_seed(seed),
            )[0]
            path = folder / (f"inference_{name}.png" if copy == 0 else f"inference_{name}_{copy}.png")
            save_png(path, image, _settings(options, mixture, pair, seed, width, height))
            cells.setdefault(pair, image)
    path = folder / "sheet.png"
    title = f"{options.prompt}    (seed {options.seed}, {options.num_inference_steps} steps)"
    save_png(
        path,
        sheet(cells, title),
        f"{options.prompt}\nrows: style {options.style_weights}, columns: content {options.content_weights}",
    )
    print(f"{len(cells)} pairs of strengths; the sheet of all is {path}")


def _check_base(mixture: Mixture, family: Family, models: Models) -> None:
    """Adapters that name their base must name this one."""
    here = family.model_hash(models, "denoiser")
    for adapter in mixture.adapters:
        there = adapter.fact("base_hash")
        if there and there != here:
            raise Refused(
                f"{adapter.path} was trained on {adapter.fact('base_model')} ({there[:12]}), and "
                f"{models.source.path} is {here[:12]}; give the model it was trained on with --model_path"
            )


def _settings(
    options: Any, mixture: Mixture, pair: tuple[float, float], seed: int, width: int, height: int
) -> str:
    style, content = (adapter.path for adapter in mixture.adapters)
    return (
        f"{options.prompt}\nSteps: {options.num_inference_steps}, Guidance: {options.guidance_scale:g}, "
        f"Seed: {seed}, Size: {width}x{height}, Style: {style.parent.name}/{style.name} × {pair[0]:g}, "
        f"Content: {content.parent.name}/{content.name} × {pair[1]:g}, Precision: {options.dtype}, "
        f"Model: {options.model_path}"
    )
