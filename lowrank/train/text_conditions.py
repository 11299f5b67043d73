"""Captions to the conditions of the denoiser: encoded once, or at every step where text encoders train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lowrank.config.command_line import Parsed
from lowrank.data.cache import Cache, key
from lowrank.data.loader import Loader
from lowrank.errors import Refused
from lowrank.files import cache_folder
from lowrank.models.family import Family, Models, align, release
from lowrank.train.base_weights import merged_hashes


class Text:
    """Captions to conditions: each encoded once where captions can be listed, else at every step.

    With `trains`, adapters change text encoders, and what these say is made at every step; nothing is cached
    where these are all encoders of the family. `captions` None are open-ended; `extra` are captions of
    pictures.
    """

    def __init__(
        self,
        parsed: Parsed,
        captions: tuple[str, ...] | None,
        family: Family,
        models: Models,
        options: Any,
        extra: tuple[str, ...],
        trains: bool,
        accelerator: Accelerator,
    ) -> None:
        self._family, self._models, self._options = family, models, options
        self._device, self.trains = accelerator.device, trains
        self.whole = trains and _trains_all(family, models)
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
        self._hash = (
            f"{family.model_hash(models, 'text')} {models.source.dtype} {spelling} {merged_hashes(parsed)}"
        )
        texts = [] if self.whole else list(dict.fromkeys([*(captions or ()), *extra]))
        with torch.no_grad():
            self._cache.fill(
                {self._key(text): text for text in texts},
                lambda batch: family.encode_text(models, batch, options),
                batch_size=parsed.value("text_encoder_batch_size") or parsed.value("train_batch_size"),
                title="caching captions",
                progress=accelerator.is_main_process,
            )
        self._held: dict[str, Mapping[str, Tensor]] = {}

    def keep(self) -> list[nn.Module]:
        """Let go of text encoders that have done their work; those that are trained are returned."""
        if self.trains and self.live and not self.whole:
            raise Refused(
                "--train_text_encoder needs captions that can be listed; leave out --shuffle_caption, "
                "--caption_tag_dropout_rate, --enable_wildcard and --token_warmup_step"
            )
        if self.trains:
            return self._family.keep_trained_text(self._models)
        if not self.live:
            release(self._models, ("text",))
        return []

    def _key(self, caption: str) -> str:
        return key("text", caption, self._hash, self._options)

    def __call__(self, captions: tuple[str, ...]) -> Mapping[str, Tensor]:
        """Conditions of a batch of captions, on the device."""
        trained = {}
        if self.trains:
            trained = self._family.trained_text(self._models, list(captions), self._options)
            if self.whole:
                return trained
        if self.live and any(self._cache.missing([self._key(caption)]) for caption in captions):
            with torch.no_grad():
                encoded = self._family.encode_text(self._models, list(captions), self._options)
        else:
            encoded = [self._entry(caption) for caption in captions]
        stacked = self._family.stack_text(encoded)
        return {name: value.to(self._device) for name, value in stacked.items()} | trained

    def _entry(self, caption: str) -> Mapping[str, Tensor]:
        if caption not in self._held:
            self._held[caption] = self._cache.get(self._key(caption))
        return self._held[caption]


def _trains_all(family: Family, models: Models) -> bool:
    """Whether adapters can go on every text encoder of the family, so that none of them can be let go."""
    return len(family.keep_trained_text(replace(models))) == len(models.text_encoders)


def all_captions(loaders: list[Loader]) -> tuple[str, ...] | None:
    """Every caption of several loaders, sorted; None when those of one are open-ended."""
    found = [loader.captions() for loader in loaders]
    return None if None in found else tuple(sorted({text for texts in found for text in texts or ()}))


class TextConditions:
    """Captions to conditions: what adapters can change is made at every call, the rest once.

    Of the text encoders those that adapters can train stay in memory where `trains`, as `encoders`.
    """

    def __init__(
        self, family: Family, models: Models, switches: Any, captions: Sequence[str], trains: bool
    ) -> None:
        family.add(models, ("text",))
        align(models)
        captions = list(dict.fromkeys(captions))
        self._held = dict(zip(captions, family.encode_text(models, captions, switches), strict=True))
        self._family, self._models, self._switches = family, models, switches
        self.encoders: list[nn.Module] = []
        if trains:
            self.encoders = family.keep_trained_text(models)
        else:
            release(models, ("text",))

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Conditions of a batch of captions; those of trained encoders with gradient."""
        said = self._family.stack_text([self._held[caption] for caption in captions])
        if not self.encoders:
            return said
        return said | self._family.trained_text(self._models, list(captions), self._switches)
