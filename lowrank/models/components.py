"""Parts of a diffusers folder, loaded so that what is broken is refused by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from lowrank.errors import Refused
from lowrank.models.family import (
    ROLES,
    Models,
    Source,
    complete,
    component_folder,
    fingerprint,
    finite,
    reading,
)

_HASHED = (".json", ".safetensors", ".sft", ".bin", ".ckpt", ".pt", ".model", ".txt")


def add_components(
    models: Models,
    roles: Iterable[str],
    *,
    tokenizers: Callable[[Models], tuple[Any, ...]],
    encoders: Callable[[Models], tuple[Any, ...]],
    vae: Callable[[Models], Any],
    denoiser: Callable[[Models], Any],
) -> None:
    """Load the named parts that are not there, each with its family's own function."""
    for role in roles:
        if role == "text" and not models.text_encoders:
            models.tokenizers = tuple(speaking(one) for one in tokenizers(models))
            models.text_encoders = encoders(models)
        elif role == "vae" and models.vae is None:
            models.vae = vae(models)
        elif role == "denoiser" and models.denoiser is None:
            models.denoiser = denoiser(models)
        elif role not in ROLES:
            raise ValueError(f"{role!r} is not one of {ROLES}")


_OTHERS = {  # folder of the denoiser: that of other models, and how those are trained
    "transformer": (
        "unet",
        "SD 1 and SD 2 are trained with train_network_ABM.py, SDXL with sdxl_train_network_ABM.py",
    ),
    "unet": ("transformer", "FLUX is trained with flux_train_qrlora.py"),
}


def check_denoiser(models: Models, name: str) -> None:
    """Refuse a model whose denoiser is of another family, told by the folder that it is in."""
    other, way_out = _OTHERS[name]
    if (models.root / other).is_dir() and not (models.root / name).is_dir():
        raise Refused(f"{models.source.path} holds a {other} and no {name}: {way_out}")


def config(kind: Any, root: Path, name: str, needed: str) -> Mapping[str, Any]:
    """The configuration of a component; `Refused` when it lacks `needed`, which tells whose it is."""
    folder = component_folder(root, name, kind.__name__)
    with reading(f"configuration of {name}", folder):
        facts = dict(kind.load_config(folder, local_files_only=True))
    if needed not in facts:
        raise Refused(
            f"the configuration in {folder} has no {needed}, so it is of another model; fetch the model again"
        )
    return facts


def load_component(kind: Any, source: Source, root: Path, name: str, **dtype: torch.dtype) -> nn.Module:
    """One component of a diffusers folder; the dtype's keyword differs between diffusers and transformers."""
    folder = component_folder(root, name, kind.__name__)
    with reading(name, folder), without_bars():
        module, info = kind.from_pretrained(
            folder, local_files_only=True, variant=source.variant, output_loading_info=True, **dtype
        )
    complete(name, folder, info)
    return ready(module, name, folder, source)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing a progress bar per file."""
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def ready(module: nn.Module, name: str, where: str | Path, source: Source) -> nn.Module:
    """The module on its device, frozen, evaluating; `Refused` when a value is not finite."""
    module = module.to(source.device).requires_grad_(False).eval()
    finite(module, name, where)
    return module


def folder_tokenizer(kind: Any, root: Path, name: str) -> Any:
    """The tokenizer in a component's folder."""
    folder = component_folder(root, name, kind.__name__)
    with reading(name, folder):
        return kind.from_pretrained(folder, local_files_only=True)


def speaking(tokenizer: Any) -> Any:
    """The tokenizer, after it told words apart: transformers makes an empty one where files are missing."""
    ids = tokenizer("a cat on the beach", add_special_tokens=False).input_ids
    if len(set(ids)) < 2:
        raise Refused(
            f"the {type(tokenizer).__name__} of {tokenizer.name_or_path} knows no words (vocabulary of "
            f"{len(tokenizer)}): its files are missing; give a whole model folder, or --tokenizer_cache_dir"
        )
    return tokenizer


def vae_place(given: str | None, root: Path) -> tuple[Path, str]:
    """The VAE's (parent folder, name), or (its file, ""): the model's own, or what --vae names."""
    if given is None:
        return (root, "") if root.is_file() else (root, "vae")
    if Path(given).is_file():
        return Path(given), ""
    folder = Path(given) / "vae" if (Path(given) / "vae").is_dir() else Path(given)
    return folder.parent, folder.name


def hash_of(places: Iterable[Path]) -> str:
    """The fingerprint of files, and of the files in folders, that make up one role."""
    files = (sorted(place.iterdir()) if place.is_dir() else [place] for place in places)
    return fingerprint(file for group in files for file in group if file.suffix in _HASHED)
