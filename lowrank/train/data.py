"""The data that a run makes: class images, cached latents."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from lowrank.data.cache import Cache
from lowrank.data.images import suffixes
from lowrank.data.loader import Loader
from lowrank.files import cache_folder, writable_folder
from lowrank.models.family import DTYPES, Models, Source
from lowrank.train.job import RunningJob
from lowrank.train.preview import draw_files

logger = logging.getLogger(__name__)


def make_class_images(job: RunningJob, source: Source) -> None:
    """Draw the class images that are missing with the base model, one seed each; on the main process."""
    prior, accelerator = job.options.prior, job.accelerator
    if not (prior.with_prior_preservation and job.options.data.instance_data_dir):
        return
    assert prior.class_data_dir and prior.class_prompt  # --with_prior_preservation needs both
    folder, wanted = Path(prior.class_data_dir), prior.num_class_images
    writable_folder(folder, "--class_data_dir")
    have = sum(file.suffix.lower() in suffixes() for file in folder.iterdir())
    if accelerator.is_main_process and have < wanted:
        logger.info("%s has %d of %d class images; drawing the others with the base", folder, have, wanted)
        width, height = job.options.sizes.resolution
        prompt = replace(job.script.prompt, prompt=prior.class_prompt, width=width, height=height)
        precision = prior.prior_generation_precision
        models = job.family.load(replace(source, dtype=DTYPES[precision] if precision else source.dtype))
        first = job.options.train.seed or 0
        files = {
            folder / f"class_{index:05d}_{first + index}.png": (prompt, first + index)
            for index in range(have, wanted)
        }
        draw_files(job.family, models, job.switches, files, "class images")
    accelerator.wait_for_everyone()


def encode_latents(job: RunningJob, loader: Loader, models: Models) -> Loader:
    """The loader, every image through the VAE once; unchanged where augmentation makes new pixels."""
    data, family, accelerator = job.options.data, job.family, job.accelerator
    augmentations = [image.subset.augmentation for image in loader.placed]
    fresh = any(augmentation.color_aug or augmentation.random_crop for augmentation in augmentations)
    if fresh and not job.options.caches_latents:
        return loader.decodable()
    return loader.encode_all(
        lambda pixels: family.encode_images(models, pixels),
        model_hash=f"{family.model_hash(models, 'vae')} {models.source.vae_dtype or models.source.dtype}",
        cache=Cache(cache_folder("latents") if data.cache_latents_to_disk else None),
        batch_size=data.vae_batch_size,
        progress=accelerator.is_main_process,
        wait=accelerator.wait_for_everyone,
    )
