"""Loading FLUX: parts of a diffusers folder or hub snapshot, single files in their place, and the hash that
names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from lowrank.models import flux_single
from lowrank.models.family import (
    ROLES,
    Models,
    Source,
    complete,
    component,
    fingerprint,
    finite,
    local_folder,
    reading,
)

FOLDERS = {
    "denoiser": ("transformer",),
    "vae": ("vae",),
    "text": ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
}
_HASHED = (".json", ".safetensors", ".sft", ".bin", ".model", ".txt")


def load(source: Source, roles: Iterable[str] = ROLES) -> Models:
    """Find the model and load some of its parts; `add` and `release` change later which ones are there.

    Text encoders and VAE first, cached and released, then the denoiser: the peak is the denoiser, not the
    sum. Raises `Refused` naming the component that is missing, unreadable, incomplete or not finite.
    """
    flux_single.check_companions(source)
    if flux_single.is_file(source.path):
        models = flux_single.open_models(source)
    else:
        models = Models(source, local_folder(source, FluxPipeline.download))
        schedule: Any = _config(FlowMatchEulerDiscreteScheduler, models.root, "scheduler", "shift")
        models.scheduler = FlowMatchEulerDiscreteScheduler.from_config(schedule)
        models.configs["denoiser"] = _config(
            FluxTransformer2DModel, models.root, "transformer", "guidance_embeds"
        )
    models.configs["vae"] = _vae_config(models)
    add(models, roles)
    return models


def add(models: Models, roles: Iterable[str]) -> None:
    """Load the named parts that are not there, on `source.device`, frozen and in evaluation mode."""
    for role in roles:
        if role == "text" and not models.text_encoders:
            models.tokenizers = tuple(_speaking(one) for one in _tokenizers(models))
            models.text_encoders = _text_encoders(models)
        elif role == "vae" and models.vae is None:
            models.vae = _vae(models)
        elif role == "denoiser" and models.denoiser is None:
            models.denoiser = _denoiser(models)
        elif role not in ROLES:
            raise ValueError(f"{role!r} is not one of {ROLES}")


def _config(kind: Any, root: Path, name: str, needed: str) -> Mapping[str, Any]:
    folder = component(root, name, kind.__name__)
    with reading(f"configuration of {name}", folder):
        facts = dict(kind.load_config(folder, local_files_only=True))
    if needed not in facts:
        raise Refused(
            f"the configuration in {folder} has no {needed}, so it is not FLUX's; fetch the model again"
        )
    return facts


def _vae_place(source: Source, root: Path) -> tuple[Path, str]:
    """The VAE's (parent folder, name), or (its file, ""): the model's own, or what --ae or --vae name."""
    given = source.ae or source.vae
    if given is None:
        return root, "vae"
    if flux_single.is_file(given):
        return Path(given), ""
    folder = Path(given) / "vae" if (Path(given) / "vae").is_dir() else Path(given)
    return folder.parent, folder.name


def _vae_config(models: Models) -> Mapping[str, Any]:
    root, name = _vae_place(models.source, models.root)
    return _config(AutoencoderKL, root, name, "scaling_factor") if name else flux_single.VAE_FACTS


def _vae(models: Models) -> nn.Module:
    root, name = _vae_place(models.source, models.root)
    dtype = models.source.vae_dtype or models.source.dtype
    if name:
        return _part(AutoencoderKL, models.source, root, name, torch_dtype=dtype)
    return _ready(flux_single.autoencoder(root, dtype), "vae", root, models.source)


def _denoiser(models: Models) -> nn.Module:
    source, root = models.source, models.root
    if flux_single.is_file(root):
        return _ready(flux_single.transformer(root, source.dtype), "transformer", root, source)
    return _part(FluxTransformer2DModel, source, root, "transformer", torch_dtype=source.dtype)


def _text_encoders(models: Models) -> tuple[nn.Module, nn.Module]:
    source = models.source

    def one(kind: type, name: str, given: str | None) -> nn.Module:
        if given is None:
            return _part(kind, source, models.root, name, dtype=source.dtype)
        return _ready(flux_single.text_encoder(kind, Path(given), source.dtype), name, given, source)

    return one(CLIPTextModel, "text_encoder", source.clip_l), one(
        T5EncoderModel, "text_encoder_2", source.t5xxl
    )


def _tokenizers(models: Models) -> tuple[Any, ...]:
    if flux_single.is_file(models.root):
        return flux_single.tokenizers(models.source)
    found = []
    for kind, name in ((CLIPTokenizer, "tokenizer"), (T5TokenizerFast, "tokenizer_2")):
        folder = component(models.root, name, kind.__name__)
        with reading(name, folder):
            found.append(kind.from_pretrained(folder, local_files_only=True))
    return tuple(found)


def _speaking(tokenizer: Any) -> Any:
    """The tokenizer, after it told words apart: transformers makes an empty one where files are missing."""
    ids = tokenizer("a cat on the beach", add_special_tokens=False).input_ids
    if len(set(ids)) < 2:
        raise Refused(
            f"the {type(tokenizer).__name__} of {tokenizer.name_or_path} knows no words (vocabulary of "
            f"{len(tokenizer)}): its files are missing; give a whole model folder, or --tokenizer_cache_dir"
        )
    return tokenizer


def _part(kind: type, source: Source, root: Path, name: str, **dtype: torch.dtype) -> nn.Module:
    """One component of a diffusers folder; the dtype's keyword differs between diffusers and transformers."""
    folder = component(root, name, kind.__name__)
    with reading(name, folder):
        module, info = kind.from_pretrained(
            folder, local_files_only=True, variant=source.variant, output_loading_info=True, **dtype
        )
    complete(name, folder, info)
    return _ready(module, name, folder, source)


def _ready(module: nn.Module, name: str, where: str | Path, source: Source) -> nn.Module:
    module = module.to(source.device).requires_grad_(False).eval()
    finite(module, name, where)
    return module


def model_hash(model: Models | Source | str, role: str) -> str:
    """Hex SHA-256 that names the weights of one role: key of caches, and of files made for a base.

    Large weights are sampled (see `fingerprint`), so it is quick enough to ask at every start.
    """
    if isinstance(model, Models):
        source, root = model.source, model.root
    else:
        source = Source(model) if isinstance(model, str) else model
        single = flux_single.is_file(source.path)
        root = Path(source.path) if single else local_folder(source, FluxPipeline.download)
    if role == "vae":
        parent, name = _vae_place(source, root)
        places = [component(parent, name, role) if name else parent]
    elif root.is_file():
        places = (
            [root] if role == "denoiser" else [Path(path) for path in (source.clip_l, source.t5xxl) if path]
        )
    else:
        given = [source.clip_l, source.t5xxl] if role == "text" else []
        places = [Path(path) for path in given if path] + [component(root, n, role) for n in FOLDERS[role]]
    files = (sorted(place.iterdir()) if place.is_dir() else [place] for place in places)
    return fingerprint(file for group in files for file in group if file.suffix in _HASHED)
