"""From options to what goes in: datasets, class images, cached latents."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lowrank.config.command_line import Parsed
from lowrank.data.cache import Cache
from lowrank.data.dataset import DATASET_FIELDS, SUBSET_FIELDS, Dataset
from lowrank.data.dataset_config import from_config
from lowrank.data.images import suffixes
from lowrank.data.loader import Batch, Loader
from lowrank.data.sources import from_folders, from_instance, from_metadata
from lowrank.files import cache_folder, writable_folder
from lowrank.models.family import DTYPES, Family, Models, Source, release
from lowrank.train.prompts import Prompt
from lowrank.train.watch import describe, save_png

logger = logging.getLogger(__name__)


def _values(parsed: Parsed) -> dict[str, Any]:
    """Options that datasets and subsets know, under their names there."""
    known = set(DATASET_FIELDS) | set(SUBSET_FIELDS)
    values = {name: value for name, value in parsed.values().items() if name in known and value is not None}
    return values | {"batch_size": parsed.value("train_batch_size")}


def training_datasets(parsed: Parsed) -> tuple[Dataset, ...]:
    """The datasets of the one source that is named; masks of a folder only with --masked_loss."""
    found = _datasets(parsed)
    if parsed.value("masked_loss"):
        return found
    if any(subset.conditioning_data_dir for dataset in found for subset in dataset.subsets):
        logger.warning("conditioning_data_dir has no effect without --masked_loss")
    return tuple(
        replace(
            dataset, subsets=tuple(replace(subset, conditioning_data_dir=None) for subset in dataset.subsets)
        )
        for dataset in found
    )


def _datasets(parsed: Parsed) -> tuple[Dataset, ...]:
    values, repeats = _values(parsed), parsed.value("dataset_repeats")
    if parsed.value("dataset_config"):
        return from_config(
            parsed.value("dataset_config"),
            values | {"num_repeats": repeats},
            allow_unknown=parsed.value("allow_unknown_config_keys"),
        )
    if parsed.value("in_json"):
        values["num_repeats"] = repeats
        return from_metadata(parsed.value("in_json"), parsed.value("train_data_dir"), **values)
    if parsed.value("train_data_dir"):
        return from_folders(parsed.value("train_data_dir"), parsed.value("reg_data_dir"), **values)
    prior = parsed.value("with_prior_preservation")
    return from_instance(
        parsed.value("instance_data_dir"),
        parsed.value("instance_prompt"),
        parsed.value("class_data_dir") if prior else None,
        parsed.value("class_prompt") if prior else None,
        repeats=repeats,
        **values,
    )


def draw_picture(
    family: Family,
    models: Models,
    options: Any,
    text: Callable[[tuple[str, ...]], Mapping[str, Tensor]],
    prompt: Prompt,
    seed: int,
) -> Image.Image:
    """One picture of the models as they are; `text` gives the conditions of captions."""
    against = text((prompt.negative_prompt or "",)) if prompt.scale > 1 else None
    return family.sample(
        models,
        text((prompt.prompt,)),
        options,
        height=prompt.height,
        width=prompt.width,
        steps=prompt.sample_steps,
        generator=torch.Generator().manual_seed(seed),
        negative=against,
        scale=prompt.scale,
        guidance=prompt.guidance_scale,
        sampler=prompt.sample_sampler,
    )[0]


def draw_files(
    family: Family, models: Models, options: Any, files: Mapping[Path, tuple[Prompt, int]], title: str
) -> None:
    """Draw a picture for each file from its prompt and seed; the whole model is there before, none after."""
    prompts = [prompt for prompt, _ in files.values()]
    texts = dict.fromkeys(text for one in prompts for text in (one.prompt, one.negative_prompt or ""))
    said = {text: family.stack_text(family.encode_text(models, [text], options)) for text in texts}
    release(models, ("text",))
    for path, (prompt, seed) in tqdm(files.items(), desc=title):
        image = draw_picture(family, models, options, lambda captions: said[captions[0]], prompt, seed)
        save_png(path, image, describe(prompt, seed))
    release(models, ("vae", "denoiser"))


def make_class_images(
    parsed: Parsed,
    family: Family,
    source: Source,
    options: Any,
    default: Prompt,
    accelerator: Accelerator,
) -> None:
    """Draw the class images that are missing with the base model, one seed each; on the main process."""
    if not parsed.value("with_prior_preservation") or not parsed.value("instance_data_dir"):
        return
    folder, wanted = Path(parsed.value("class_data_dir")), parsed.value("num_class_images")
    writable_folder(folder, "--class_data_dir")
    have = sum(file.suffix.lower() in suffixes() for file in folder.iterdir())
    if accelerator.is_main_process and have < wanted:
        logger.info("%s has %d of %d class images; drawing the others with the base", folder, have, wanted)
        width, height = parsed.value("resolution")
        prompt = replace(default, prompt=parsed.value("class_prompt"), width=width, height=height)
        dtype = DTYPES.get(parsed.value("prior_generation_precision"), source.dtype)
        models = family.load(replace(source, dtype=dtype))
        seeds = ((index, (parsed.value("seed") or 0) + index) for index in range(have, wanted))
        files = {folder / f"class_{index:05d}_{seed}.png": (prompt, seed) for index, seed in seeds}
        draw_files(family, models, options, files, "class images")
    accelerator.wait_for_everyone()


def encode_latents(
    parsed: Parsed, loader: Loader, family: Family, models: Models, accelerator: Accelerator
) -> Loader:
    """The loader, every image through the VAE once; unchanged where augmentation makes new pixels."""
    fresh = any(one.subset.color_aug or one.subset.random_crop for one in loader.placed)
    asked = parsed.value("cache_latents") or parsed.value("cache_latents_to_disk")
    if fresh and not asked:
        return loader.decodable()
    disk = cache_folder("latents") if parsed.value("cache_latents_to_disk") else None
    return loader.encode_all(
        lambda pixels: family.encode_images(models, pixels),
        model_hash=f"{family.model_hash(models, 'vae')} {models.source.vae_dtype or models.source.dtype}",
        cache=Cache(disk),
        batch_size=parsed.value("vae_batch_size"),
        progress=accelerator.is_main_process,
        wait=accelerator.wait_for_everyone,
    )


def latents_of(
    family: Family, models: Models, device: torch.device
) -> Callable[[Batch, torch.Generator], Tensor]:
    """Latents (B, C, h, w) of a batch: each step draws its own sample of the VAE's distribution."""

    def latents(batch: Batch, generator: torch.Generator) -> Tensor:
        moments = batch.encoded
        if moments is None:
            assert batch.pixels is not None  # a batch has one or the other
            with torch.no_grad():
                moments = family.encode_images(models, batch.pixels)
        return family.latents(models, moments.to(device), generator)

    return latents


def batch_size_conditions(family: Family, device: torch.device) -> Callable[[Batch], dict[str, Tensor]]:
    """The conditions of a batch that are about its pictures' sizes; none for most families."""

    def conditions(batch: Batch) -> dict[str, Tensor]:
        told = family.size_conditions(batch.original_sizes, batch.crop_top_lefts, batch.target_sizes)
        return {name: value.to(device) for name, value in told.items()}

    return conditions
