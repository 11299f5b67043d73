"""From options to what goes in: datasets, class images, cached latents and captions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from lowrank.data.cache import Cache, key
from lowrank.data.images import suffixes
from lowrank.data.loader import Batch, Loader
from lowrank.data.records import DATASET_FIELDS, SUBSET_FIELDS, Dataset
from lowrank.data.scan import from_config, from_folders, from_instance
from lowrank.errors import Refused
from lowrank.files import cache_folder, writable_folder
from lowrank.models.family import DTYPES, Family, Models, Source, release
from lowrank.options import Parsed
from lowrank.train.prompts import Prompt
from lowrank.train.watch import describe, save_png

logger = logging.getLogger(__name__)


def _values(parsed: Parsed) -> dict[str, Any]:
    """Options that datasets and subsets know, under their names there."""
    known = set(DATASET_FIELDS) | set(SUBSET_FIELDS)
    values = {name: value for name, value in parsed.values().items() if name in known and value is not None}
    return values | {"batch_size": parsed.value("train_batch_size")}


def datasets(parsed: Parsed) -> tuple[Dataset, ...]:
    """The datasets of the one source that was named. Raises `Refused` for none, two, or half of a prior."""
    sources = ("dataset_config", "train_data_dir", "instance_data_dir")
    named = [name for name in sources if parsed.value(name)]
    if len(named) != 1:
        told = " and ".join(parsed.flag(name) for name in named) or "nothing"
        raise Refused(
            f"one source of images is needed and {told} was given; give --instance_data_dir with "
            "--instance_prompt, or --train_data_dir, or --dataset_config"
        )
    values = _values(parsed)
    if named[0] == "dataset_config":
        return from_config(
            parsed.value("dataset_config"), values, allow_unknown=parsed.value("allow_unknown_config_keys")
        )
    if named[0] == "train_data_dir":
        return from_folders(parsed.value("train_data_dir"), parsed.value("reg_data_dir"), **values)
    prior = parsed.value("with_prior_preservation")
    if prior and not (parsed.value("class_data_dir") and parsed.value("class_prompt")):
        raise Refused(
            "--with_prior_preservation needs --class_data_dir and --class_prompt: where the class images are "
            "(or are to be made), and what they show"
        )
    folder = parsed.value("class_data_dir") if prior else None
    return from_instance(
        parsed.value("instance_data_dir"),
        parsed.value("instance_prompt"),
        folder,
        parsed.value("class_prompt") if prior else None,
        repeats=parsed.value("dataset_repeats"),
        **values,
    )


def make_class_images(
    parsed: Parsed, family: Family, source: Source, options: Any, accelerator: Accelerator
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
        prompt = Prompt(parsed.value("class_prompt"), width=width, height=height)
        dtype = DTYPES.get(parsed.value("prior_generation_precision"), source.dtype)
        models = family.load(replace(source, dtype=dtype))
        switches = replace(options, guidance_scale=prompt.guidance_scale)
        text = family.stack_text(family.encode_text(models, [prompt.prompt], switches))
        release(models, ("text",))
        for index in tqdm(range(have, wanted), desc="class images"):
            seed = (parsed.value("seed") or 0) + index
            image = family.sample(
                models,
                text,
                switches,
                height=height,
                width=width,
                steps=prompt.sample_steps,
                generator=torch.Generator().manual_seed(seed),
            )[0]
            save_png(folder / f"class_{index:05d}_{seed}.png", image, describe(prompt, seed))
        release(models, ("vae", "denoiser"))
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


class Text:
    """Captions to conditions: each encoded once where captions can be listed, else at every step."""

    def __init__(
        self,
        parsed: Parsed,
        loader: Loader,
        family: Family,
        models: Models,
        options: Any,
        extra: tuple[str, ...],
        accelerator: Accelerator,
    ) -> None:
        self._family, self._models, self._options = family, models, options
        self._device = accelerator.device
        captions = loader.captions()
        to_disk = parsed.value("cache_text_encoder_outputs_to_disk")
        self.live = captions is None
        if self.live and (to_disk or parsed.value("cache_text_encoder_outputs")):
            raise Refused(
                "--cache_text_encoder_outputs needs captions that can be listed, and --shuffle_caption, "
                "--caption_tag_dropout_rate, --enable_wildcard or --token_warmup_step make new ones at every "
                "step; leave out one or the other"
            )
        self._cache = Cache(cache_folder("text") if to_disk else None)
        spelling = [tokenizer("a <c> dog in <s> style, ünïcode").input_ids for tokenizer in models.tokenizers]
        self._hash = f"{family.model_hash(models, 'text')} {models.source.dtype} {spelling}"
        texts = list(dict.fromkeys([*(captions or ()), *extra]))
        with torch.no_grad():
            self._cache.fill(
                {self._key(text): text for text in texts},
                lambda batch: family.encode_text(models, batch, options),
                batch_size=parsed.value("text_encoder_batch_size") or parsed.value("train_batch_size"),
                title="caching captions",
                progress=accelerator.is_main_process,
            )
        self._held: dict[str, Mapping[str, Tensor]] = {}
        self.trained = False  # whether adapters change a text encoder, whose part is then made at every step

    def _key(self, caption: str) -> str:
        return key("text", caption, self._hash, self._options)

    def __call__(self, captions: tuple[str, ...]) -> Mapping[str, Tensor]:
        """Conditions of a batch of captions, on the device."""
        if self.live and any(self._cache.missing([self._key(caption)]) for caption in captions):
            with torch.no_grad():
                encoded = self._family.encode_text(self._models, list(captions), self._options)
        else:
            encoded = [self._entry(caption) for caption in captions]
        conditions = {
            name: value.to(self._device) for name, value in self._family.stack_text(encoded).items()
        }
        return conditions | (self._family.trained_text(self._models, list(captions)) if self.trained else {})

    def _entry(self, caption: str) -> Mapping[str, Tensor]:
        if caption not in self._held:
            self._held[caption] = self._cache.get(self._key(caption))
        return self._held[caption]
