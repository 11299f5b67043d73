"""The parts of a model without values, from configurations: what a plan of memory runs on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from lowrank.models import components
from lowrank.models.family import Family, Models
from lowrank.tensors import has_values

_WORDS = 8  # tokens of a caption where no length is asked for; captions are padded


def hollow(family: Family) -> Family:
    """The family, loading parts without values; its tokenizers give tokens of the right number."""

    def add(models: Models, roles: Iterable[str]) -> None:
        texts = family.empty_text(models) if "text" in roles and not models.text_encoders else []
        components.add_components(
            models,
            roles,
            tokenizers=lambda models: tuple(_Tokenizer(length) for _, length in texts),
            encoders=lambda models: tuple(_placed(encoder, models) for encoder, _ in texts),
            vae=_vae,
            denoiser=lambda models: _placed(family.empty(models), models),
        )

    return replace(family, add=add)


def _vae(models: Models) -> nn.Module:
    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(dict(models.configs["vae"]))
    return _placed(vae, models, models.source.vae_dtype)


def _placed(module: nn.Module, models: Models, dtype: torch.dtype | None = None) -> nn.Module:
    """A module on the meta device with memory on the model's device, in the dtype of the model, frozen.

    A denoiser that will be stored in another kind or swapped is in host memory, where `adapt` expects it.
    Where tensors have values, they are random.
    """
    dtype, placed = dtype or models.source.dtype, {}
    device = "cpu" if models.source.storage else models.source.device

    def empty(value: Tensor) -> Tensor:
        """Memory of a tensor; layers that share one keep sharing it."""
        if id(value) not in placed:
            kind = dtype if value.is_floating_point() else value.dtype
            placed[id(value)] = torch.zeros(value.shape, dtype=kind, device=device), value
        return placed[id(value)][0]

    for part in module.modules():
        for name, value in part.named_parameters(recurse=False):
            part._parameters[name] = nn.Parameter(empty(value), requires_grad=False)
        for name, value in part.named_buffers(recurse=False):
            part._buffers[name] = empty(value)
    if has_values(next(module.parameters())):
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
    return module.eval()


class _Tokenizer:
    """A tokenizer of a text encoder without a vocabulary: captions have tokens, and no meaning."""

    bos_token_id, pad_token_id, eos_token_id = 1, 2, 3
    name_or_path = "without a vocabulary"

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __call__(
        self,
        text: str | list[str],
        *,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **_: Any,
    ) -> SimpleNamespace:
        ids = list(range(4, 4 + _WORDS))
        if return_tensors is None:
            return SimpleNamespace(input_ids=ids)
        rows, length = 1 if isinstance(text, str) else len(text), max_length or self.model_max_length
        tokens = torch.ones(rows, length, dtype=torch.long)
        return SimpleNamespace(input_ids=tokens, attention_mask=torch.ones_like(tokens))
