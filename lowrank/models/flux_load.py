"""Load FLUX or Chroma from a diffusers folder, a hub snapshot or single files, and hash the weights.

`Parts` names the classes and folders of a family; each function has it as first argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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


class Encoder(NamedTuple):
    """A text encoder, and its tokenizer."""

    kind: Any  # transformers' class
    folder: str
    tokenizer: Any  # transformers' class
    tokenizer_folder: str
    option: str  # field of `Source` and command-line option that names a file of it


@dataclass(frozen=True)
class Parts:
    """The parts of a family that has FLUX's blocks, T5 as its last encoder, and an AutoencoderKL."""

    transformer: Any  # diffusers' class
    pipeline: Any  # diffusers' class
    marker: str  # a key of the transformer's configuration that other families lack
    encoders: tuple[Encoder, ...]
    # the transformer's configuration from the tensors' shapes of a single file
    single_config: Callable[[single.Checkpoint], dict[str, Any]]

    @property
    def folders(self) -> dict[str, tuple[str, ...]]:
        """The folders of a diffusers model by role."""
        texts = [encoder.folder for encoder in self.encoders]
        texts += [encoder.tokenizer_folder for encoder in self.encoders]
        return {"denoiser": ("transformer",), "vae": ("vae",), "text": tuple(texts)}


T5 = Encoder(T5EncoderModel, "text_encoder_2", T5TokenizerFast, "tokenizer_2", "t5xxl")
FLUX_PARTS = Parts(
    FluxTransformer2DModel,
    FluxPipeline,
    "guidance_embeds",
    (Encoder(CLIPTextModel, "text_encoder", CLIPTokenizer, "tokenizer", "clip_l"), T5),
    flux_single.transformer_config,
)


def load_flux(parts: Parts, source: Source, roles: Iterable[str] = ROLES) -> Models:
    """Find the model and load some of its components; `add_flux_components` and `release` change these later.

    Text encoders and VAE first, cached and released, then the denoiser: the peak is the denoiser, not the
    sum. Raises `Refused` naming the component that is missing, unreadable, incomplete or not finite.
    """
    flux_single.check_companions(source)
    if single.is_file(source.path):
        options = [encoder.option for encoder in parts.encoders]
        models = flux_single.open_models(source, options, parts.single_config)
    else:
        models = Models(source, local_folder(source, parts.pipeline.download))
        components.check_denoiser(models, "transformer")
        schedule: Any = components.config(FlowMatchEulerDiscreteScheduler, models.root, "scheduler", "shift")
        models.scheduler = FlowMatchEulerDiscreteScheduler.from_config(schedule)
        models.configs["denoiser"] = components.config(
            parts.transformer, models.root, "transformer", parts.marker
        )
    models.configs["vae"] = _vae_config(models)
    packed, channels = models.configs["denoiser"]["in_channels"], models.configs["vae"]["latent_channels"]
    if packed != 4 * channels:
        raise Refused(
            f"the transformer of {source.path} takes {packed // 4} latent channels and the VAE makes "
            f"{channels}: they belong to different models; give the VAE of this model"
        )
    add_flux_components(parts, models, roles)
    return models


def add_flux_components(parts: Parts, models: Models, roles: Iterable[str]) -> None:
    """Load the named parts that are not there, on `source.device`, frozen and in evaluation mode."""
    components.add_components(
        models,
        roles,
        tokenizers=partial(_tokenizers, parts),
        encoders=partial(_text_encoders, parts),
        vae=_vae,
        denoiser=partial(_denoiser, parts),
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


def _denoiser(parts: Parts, models: Models) -> nn.Module:
    source, root = models.source, models.root
    if source.storage:
        if (readers := _transformer_readers(parts, models)) is not None:
            empty: Any = stored_load.empty_denoiser(parts.transformer, models.configs["denoiser"])
            named = partial(model_hash, parts, models, "denoiser")
            return stored_load.load_stored(empty, readers, root, source, named)
        source = replace(source, device="cpu")
    if single.is_file(root):
        model = flux_single.transformer(root, source.dtype, parts.transformer, models.configs["denoiser"])
        return components.ready(model, "transformer", root, source)
    return components.load_component(parts.transformer, source, root, "transformer", torch_dtype=source.dtype)


def _transformer_readers(parts: Parts, models: Models) -> stored_load.Readers | None:
    """The transformer's tensors by name; None where only a library can read them."""
    if single.is_file(models.root):
        return flux_single.transformer_readers(models.root)
    folder = component_folder(models.root, "transformer", parts.transformer.__name__)
    if "quantization_config" in models.configs["denoiser"]:
        return None
    return stored_load.folder_readers(folder, models.source.variant)


def _text_encoders(parts: Parts, models: Models) -> tuple[nn.Module, ...]:
    source = models.source

    def load(encoder: Encoder) -> nn.Module:
        kind, name, given = encoder.kind, encoder.folder, getattr(source, encoder.option)
        if given is None:
            return components.load_component(kind, source, models.root, name, dtype=source.dtype)
        return components.ready(
            flux_single.text_encoder(kind, Path(given), source.dtype), name, given, source
        )

    return tuple(map(load, parts.encoders))


def empty_text(parts: Parts, models: Models) -> list[tuple[nn.Module, int]]:
    """The text encoders on the meta device, each with the most tokens that it takes."""
    texts = []
    for encoder in parts.encoders:
        given = getattr(models.source, encoder.option)
        if given is None:
            config = components.text_config(encoder.kind, models.root, encoder.folder)
        else:
            config = flux_single.text_config(encoder.kind, Path(given))
        tokenizer = models.root / encoder.tokenizer_folder / "tokenizer_config.json"
        facts = read_json(tokenizer, "tokenizer", bits=TOKENIZER_BITS) if tokenizer.is_file() else {}
        most = min(facts.get("model_max_length", T5_TOKENS), T5_TOKENS)
        with torch.device("meta"):
            texts.append((encoder.kind(config), getattr(config, "max_position_embeddings", most)))
    return texts


def _tokenizers(parts: Parts, models: Models) -> tuple[Any, ...]:
    if not single.is_file(models.root):
        return tuple(
            components.folder_tokenizer(encoder.tokenizer, models.root, encoder.tokenizer_folder)
            for encoder in parts.encoders
        )
    beside = Path(models.root).parent
    return tuple(
        single.hub_tokenizer(
            encoder.tokenizer,
            flux_single.TOKENIZERS[encoder.tokenizer],
            models.source,
            beside=beside / encoder.tokenizer_folder,
        )
        for encoder in parts.encoders
    )


def model_hash(parts: Parts, model: Models | Source | str, role: str) -> str:
    """Hex SHA-256 that names the weights of one role: key of caches, and of files made for a base.

    Large weights are sampled (see `fingerprint`), so that it is fast enough for every start.
    """
    if isinstance(model, Models):
        source, root = model.source, model.root
    else:
        source = Source(model) if isinstance(model, str) else model
        is_file = single.is_file(source.path)
        root = Path(source.path) if is_file else local_folder(source, parts.pipeline.download)
    if role == "vae":
        parent, name = components.vae_place(source.ae or source.vae, root)
        return components.hash_of([component_folder(parent, name, role) if name else parent])
    given = [getattr(source, encoder.option) for encoder in parts.encoders] if role == "text" else []
    files = [Path(path) for path in given if path]
    if root.is_file():
        return components.hash_of([root] if role == "denoiser" else files)
    return components.hash_of(files + [component_folder(root, name, role) for name in parts.folders[role]])
