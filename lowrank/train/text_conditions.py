"""Captions to the conditions of the denoiser: encoded once, or at every step if text encoders train."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lowrank.data.cache import Cache, key
from lowrank.data.loader import Loader
from lowrank.errors import Refused
from lowrank.files import cache_folder
from lowrank.models.family import Family, FamilyOptions, Models, align, release
from lowrank.train.job import RunningJob

logger = logging.getLogger(__name__)


def stack_text(encoded: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The encoded texts of B captions as one dict of (B, …) tensors."""
    return {name: torch.stack([caption[name] for caption in encoded]) for name in encoded[0]}


class TextConditions:
    """Captions to conditions on the model's device: each encoded once where captions can be listed.

    With `trains`, adapters change text encoders, and the part of the conditions that these make is computed
    at every call; nothing is cached where these are all encoders of the family. `captions` None cannot be
    listed: they are encoded at every call, but for those of `extra`. `disk` keeps the encoded captions on
    disk, under a key that contains this text. `encoders` are the text encoders that adapters train. The other
    encoders are freed once they have done their work.
    """

    def __init__(
        self,
        family: Family,
        models: Models,
        switches: FamilyOptions,
        captions: Iterable[str] | None,
        trains: bool,
        *,
        extra: Iterable[str] = (),
        disk: str | None = None,
        batch_size: int = 1,
        progress: bool = False,
    ) -> None:
        family.add(models, ("text",))
        align(models)
        self._family, self._models, self._switches = family, models, switches
        self._device = torch.device(models.source.device)
        self._trains, self._listed = trains, captions is not None
        self._whole = trains and _trains_all(family, models, switches)
        if trains and not self._listed and not self._whole:
            raise Refused(
                "--train_text_encoder needs captions that can be listed; leave out --shuffle_caption, "
                "--caption_tag_dropout_rate, --enable_wildcard and --token_warmup_step"
            )
        self._cache, self._hash = Cache(None if disk is None else cache_folder("text")), ""
        if disk is not None:
            ids = [tokenizer("a <c> dog in <s> style, ünïcode").input_ids for tokenizer in models.tokenizers]
            self._hash = f"{family.model_hash(models, 'text')} {models.source.dtype} {ids} {disk}"
        texts = () if self._whole else dict.fromkeys([*(captions or ()), *extra])
        with torch.no_grad():
            self._cache.fill(
                {self._key(text): text for text in texts},
                lambda batch: family.encode_text(models, batch, switches),
                batch_size=batch_size,
                title="caching captions",
                progress=progress,
            )
        self._read: dict[str, Mapping[str, Tensor]] = {}
        self.encoders: list[nn.Module] = family.keep_trained_text(models, switches) if trains else []
        if self._listed and not trains:
            release(models, ("text",))

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Conditions of a batch of captions; those of trained encoders with gradient."""
        trained = {}
        if self._trains:
            trained = self._family.trained_text(self._models, list(captions), self._switches)
            if self._whole:
                return trained
        if not self._listed and self._cache.missing(self._key(caption) for caption in captions):
            with torch.no_grad():
                encoded = self._family.encode_text(self._models, list(captions), self._switches)
        else:
            encoded = [self._entry(caption) for caption in captions]
        return {name: value.to(self._device) for name, value in stack_text(encoded).items()} | trained

    def _key(self, caption: str) -> str:
        return key("text", caption, self._hash, self._switches)

    def _entry(self, caption: str) -> Mapping[str, Tensor]:
        if caption not in self._read:
            self._read[caption] = self._cache.get(self._key(caption))
        return self._read[caption]


def _trains_all(family: Family, models: Models, switches: FamilyOptions) -> bool:
    """Whether adapters can go on every text encoder of the family, so that none of them can be freed."""
    return len(family.keep_trained_text(replace(models), switches)) == len(models.text_encoders)


def log_cut(family: Family, models: Models, captions: Sequence[str], switches: FamilyOptions) -> None:
    """Warn once about the captions that are longer than the text encoder takes, also if they are cached."""
    encoder, limit, counts, way_out = family.token_counts(models, captions, switches)
    cut = [(count, text) for count, text in zip(counts, captions, strict=True) if count > limit]
    if cut:
        count, text = max(cut)
        logger.warning(
            "%d of %d captions are longer than the %d tokens of %s and are cut; the longest has %d: %.60s…%s",
            *(len(cut), len(captions), limit, encoder, count, text, f"; {way_out}" if way_out else ""),
        )


def text_conditions(
    job: RunningJob, models: Models, loaders: Sequence[Loader], drawn: Sequence[str]
) -> TextConditions:
    """The conditions of a run: of all captions of its loaders, and of `drawn`, which pictures show."""
    data, batch_size = job.options.data, job.options.train.train_batch_size
    listed = [loader.captions() for loader in loaders]
    captions = None if None in listed else sorted({text for texts in listed for text in texts or ()})
    job.family.add(models, ("text",))
    if job.accelerator.is_main_process:
        every = {text for loader in loaders for image in loader.placed for text in image.example.captions}
        log_cut(job.family, models, sorted(every) if captions is None else captions, job.switches)
    to_disk = data.cache_text_encoder_outputs_to_disk
    if captions is None and (to_disk or data.cache_text_encoder_outputs):
        raise Refused(
            "--cache_text_encoder_outputs needs captions that can be listed, and --shuffle_caption, "
            "--caption_tag_dropout_rate, --enable_wildcard or --token_warmup_step make new ones at every "
            "step; leave out one or the other"
        )
    return TextConditions(
        job.family,
        models,
        job.switches,
        captions,
        job.options.trains_text,
        extra=drawn,
        disk=str(job.base_weight_hashes) if to_disk else None,
        batch_size=data.text_encoder_batch_size or batch_size,
        progress=job.accelerator.is_main_process,
    )
