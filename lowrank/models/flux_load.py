"""Load FLUX from a diffusers folder, a hub snapshot or single files, and hash its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]  # an alias made at import
)

from lowrank.errors import Refused
from lowrank.files import TOKENIZER_BITS, read_json
from lowrank.models import components, flux_single, single, stored_load
from lowrank.models.components import component_folder, local_folder
from lowrank.models.family import ROLES, Models, Source

T5_TOKENS = 512  # the tokenizer of FLUX.1-dev cuts captions there
FOLDERS = {
    "denoiser": ("transformer",),
    "vae": ("vae",),
    "text": ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
}


def load_flux(source: Source, roles: Iterable[str] = ROLES) -> Models:
    """Find the model and load some of its components; `add_flux_components` and `release` change these later.

    Text encoders and VAE first, cached and released, then the denoiser: the peak is the denoiser, not the
    sum. Raises `Refused` naming the component that is missing, unreadable, incomplete or not finite.
    """
    flux_single.check_companions(source)
    if single.is_file(source.path):
        models = flux_single.open_models(source)
    else:
        models = Models(source, local_folder(source, FluxPipeline.download))
        components.check_denoiser(models, "transformer")
        schedule: Any = components.config(FlowMatchEulerDiscreteScheduler, models.root, "scheduler", "shift")
        models.scheduler = FlowMatchEulerDiscreteScheduler.from_config(schedule)
        models.configs["denoiser"] = components.config(
            FluxTransformer2DModel, models.root, "transformer", "guidance_embeds"
        )
    models.configs["vae"] = _vae_config(models)
    packed, channels = models.configs["denoiser"]["in_channels"], models.configs["vae"]["latent_channels"]
    if packed != 4 * channels:
        raise Refused(
            f"the transformer of {source.path} takes {packed // 4} latent channels and the VAE makes "
            f"{channels}: they belong to different models; give the VAE of this model"
        )
    add_flux_components(models, roles)
    return models


def add_flux_components(models: Models, roles: Iterable[str]) -> None:
    """Load the named parts that are not there, on `source.device`, frozen and in evaluation mode."""
    components.add_components(
        models, roles, tokenizers=_tokenizers, encoders=_text_encoders, vae=_vae, denoiser=_denoiser
    )


def _vae_file(path: Path) -> single.Checkpoint:
    return single.autoencoder_file(single.open_checkpoint(path))


def _vae_config(models: Models) -> Mapping[str, Any]:
    root, name = components.vae_place(models.source.ae or models.source.vae, models.root)
    if name:
        return components.config(AutoencoderKL, root, name, "scaling_factor")
    return single.autoencoder_config(_vae_file(root), flux_single.VAE_FACTS)


def _vae(models: Models) -> nn.Module:
    root, name = components.vae_place(models.source.ae or models.source.vae, models.root)
    dtype = models.source.vae_dtype or models.source.dtype
    if name:
        return components.load_component(AutoencoderKL, models.source, root, name, torch_dtype=dtype)
    model = single.autoencoder(_vae_file(root), models.configs["vae"], dtype)
    return components.ready(model, "vae", root, models.source)


def _denoiser(models: Models) -> nn.Module:
    source, root = models.source, models.root
    if source.storage:
        if (readers := _transformer_readers(models)) is not None:
            empty: Any = stored_load.empty_denoiser(FluxTransformer2DModel, models.configs["denoiser"])
            named = partial(model_hash, models, "denoiser")
            return stored_load.load_stored(empty, readers, root, source, named)
        source = replace(source, device="cpu")
    if single.is_file(root):
        return components.ready(flux_single.transformer(root, source.dtype), "transformer", root, source)
    return components.load_component(
        FluxTransformer2DModel, source, root, "transformer", torch_dtype=source.dtype
    )


def _transformer_readers(models: Models) -> stored_load.Readers | None:
    """The transformer's tensors by name; None where only a library can read them."""
    if single.is_file(models.root):
        return flux_single.transformer_readers(models.root)
    folder = component_folder(models.root, "transformer", "FluxTransformer2DModel")
    if "quantization_config" in models.configs["denoiser"]:
        return None
    return stored_load.folder_readers(folder, models.source.variant)


def _text_encoders(models: Models) -> tuple[nn.Module, nn.Module]:
    source = models.source

    def load(kind: type, name: str, given: str | None) -> nn.Module:
        if given is None:
            return components.load_component(kind, source, models.root, name, dtype=source.dtype)
        return components.ready(
            flux_single.text_encoder(kind, Path(given), source.dtype), name, given, source
        )

    return load(CLIPTextModel, "text_encoder", source.clip_l), load(
        T5EncoderModel, "text_encoder_2", source.t5xxl
    )


def empty_text(models: Models) -> list[tuple[nn.Module, int]]:
    """CLIP-L and T5 on the meta device, each with the most tokens that it takes."""

    def config(kind: Any, name: str, given: str | None) -> Any:
        if given is None:
            return components.text_config(kind, models.root, name)
        return flux_single.text_config(kind, Path(given))

    clip = config(CLIPTextModel, "text_encoder", models.source.clip_l)
    t5 = config(T5EncoderModel, "text_encoder_2", models.source.t5xxl)
    tokenizer = models.root / "tokenizer_2" / "tokenizer_config.json"
    facts = read_json(tokenizer, "tokenizer", bits=TOKENIZER_BITS) if tokenizer.is_file() else {}
    with torch.device("meta"):
        return [
            (CLIPTextModel(clip), clip.max_position_embeddings),
            (T5EncoderModel(t5), min(facts.get("model_max_length", T5_TOKENS), T5_TOKENS)),
        ]


def _tokenizers(models: Models) -> tuple[Any, ...]:
    if single.is_file(models.root):
        return tuple(
            single.hub_tokenizer(kind, name, models.source, beside=Path(models.root).parent / folder)
            for (kind, name), folder in zip(
                flux_single.TOKENIZERS.items(), ("tokenizer", "tokenizer_2"), strict=True
            )
        )
    folders = ((CLIPTokenizer, "tokenizer"), (T5TokenizerFast, "tokenizer_2"))
    return tuple(components.folder_tokenizer(kind, models.root, name) for kind, name in folders)


def model_hash(model: Models | Source | str, role: str) -> str:
    """Hex SHA-256 that names the weights of one role: key of caches, and of files made for a base.

    Large weights are sampled (see `fingerprint`), so that it is fast enough for every start.
    """
    if isinstance(model, Models):
        source, root = model.source, model.root
    else:
        source = Source(model) if isinstance(model, str) else model
        is_file = single.is_file(source.path)
        root = Path(source.path) if is_file else local_folder(source, FluxPipeline.download)
    if role == "vae":
        parent, name = components.vae_place(source.ae or source.vae, root)
        return components.hash_of([component_folder(parent, name, role) if name else parent])
    if root.is_file():
        return components.hash_of(
            [root] if role == "denoiser" else [Path(path) for path in (source.clip_l, source.t5xxl) if path]
        )
    given = [source.clip_l, source.t5xxl] if role == "text" else []
    return components.hash_of(
        [Path(path) for path in given if path]
        + [component_folder(root, name, role) for name in FOLDERS[role]]
    )
