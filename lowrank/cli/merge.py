"""Style × content from the command line: a grid of pictures, an XY sheet, a merged adapter."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lowrank.adapters.targets import find
from lowrank.cli.base import base
from lowrank.cli.sheet import sheet
from lowrank.errors import Refused
from lowrank.files import writable_folder
from lowrank.models.family import Family, Models, release
from lowrank.models.flux import FLUX, FluxOptions
from lowrank.surfaces import INFERENCE_MERGE
from lowrank.train.watch import save_png
from lowrank.weights.merge import Adapter, Mixture
from lowrank.weights.residual import check_residual, residual_file


def main(argv: list[str] | None = None) -> int:
    """Draw every (α, β), write the sheet, save what was asked for. Raises `Refused`."""
    parsed = INFERENCE_MERGE.parse(argv)
    options = parsed.merge
    logging.basicConfig(level="INFO", format="%(message)s")
    names = _names(options)
    _check_sides(options)
    source = base(options.model_path, options.dtype, options.device)
    if options.residual_path:
        residual_file(options.residual_path)
    folder = writable_folder(options.output_dir)
    mixture = Mixture([Adapter(options.style_lora_path), Adapter(options.content_lora_path)])
    print(mixture.describe())
    models = FLUX.load(source, ())
    _check_base(mixture, FLUX, models)
    # text first, and gone before the denoiser comes: the peak is the denoiser, not the sum
    text = None if options.skip_images else _encode(options, mixture, FLUX, models)
    if options.residual_path:
        _check_residual(options.residual_path, mixture, FLUX, models)
    if text is not None:
        _draw(options, mixture, FLUX, models, text, folder, names)
    if options.save_merged:
        for pair, name in names.items():
            path = folder / f"merged_{name}.safetensors"
            mixture.save(path, pair, {"lowrank.command": parsed.command})
            print(path)
    return 0


def _names(options: Any) -> dict[tuple[float, float], str]:
    """Every pair of strengths and the part of file names that tells it from the others."""
    grid = [(a, b) for a in options.style_weights for b in options.content_weights]
    if len(set(grid)) < len(grid):
        raise Refused(
            "a pair of strengths is listed twice; give each once in --style_weights, --content_weights"
        )
    # two decimals where they do, else as many as are needed; 17 digits tell any two numbers apart
    for spec in [*(f".{decimals}f" for decimals in range(2, 17)), ".17g"]:
        names = [f"s{a:{spec}}_c{b:{spec}}" for a, b in grid]
        if len(set(names)) == len(grid):
            break
    return dict(zip(grid, names, strict=True))


def _check_sides(options: Any) -> None:
    step = FLUX.bucket_step
    for side in ("height", "width"):
        if (getattr(options, side) or 0) % step:
            raise Refused(f"--{side} {getattr(options, side)} is not a multiple of {step}; give one that is")


def _check_residual(path: str, mixture: Mixture, family: Family, models: Models) -> None:
    family.add(models, ("denoiser",))
    hosts = {t.native.removeprefix("transformer."): t.module for t in find("unet", models.denoiser)}
    checked = [check_residual(path, a.layers, a.metadata, hosts) for a in mixture.adapters]
    print("\n".join(dict.fromkeys(checked)))


def _switches(options: Any) -> FluxOptions:
    return FluxOptions(
        guidance_scale=options.guidance_scale, t5xxl_max_token_length=options.max_sequence_length
    )


def _encode(options: Any, mixture: Mixture, family: Family, models: Models) -> dict[str, Tensor]:
    """The prompt as the base encodes it; of the text encoders, those that are adapted stay in memory."""
    family.add(models, ("text",))
    text = family.stack_text(family.encode_text(models, [options.prompt], _switches(options)))
    if mixture.adapts_text:
        family.keep_trained_text(models)
    else:
        release(models, ("text",))
    return text


def _draw(
    options: Any,
    mixture: Mixture,
    family: Family,
    models: Models,
    text: dict[str, Tensor],
    folder: Path,
    names: dict[tuple[float, float], str],
) -> None:
    family.add(models, ("denoiser",))
    attached = mixture.attach(models.denoiser, models.text_encoders, models.source.dtype)
    family.add(models, ("vae",))
    own = models.configs["vae"].get("sample_size", 1024)
    height, width = options.height or own, options.width or own
    cells: dict[tuple[float, float], Image.Image] = {}
    for pair, name in tqdm(names.items(), desc="images"):
        attached.set(pair)
        if models.text_encoders:  # adapted too: what they say depends on the strengths
            with torch.no_grad():
                text |= family.trained_text(models, [options.prompt])
        for copy in range(options.num_images):
            seed = options.seed + copy
            image = family.sample(
                models,
                text,
                _switches(options),
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
