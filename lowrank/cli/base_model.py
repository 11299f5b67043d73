"""The base model of a script: its family, path, dtype and device."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import hf_hub_download

from lowrank.errors import Refused
from lowrank.files import read_json
from lowrank.models.components import local_folder, reading
from lowrank.models.family import DTYPES, Family, Models, Source, latent_scale
from lowrank.models.flux import FLUX
from lowrank.models.sd import SD15
from lowrank.models.sd_single import kind_of
from lowrank.models.sdxl import SDXL
from lowrank.models.single import check_file, is_file, open_checkpoint

INDEX = "model_index.json"
# the pipelines that a model folder may name
FAMILIES = {"FluxPipeline": FLUX, "StableDiffusionPipeline": SD15, "StableDiffusionXLPipeline": SDXL}


def base(
    path: str,
    dtype: str,
    device: str | None,
    tokenizer_cache_dir: str | None = None,
    flag: str = "model_path",
) -> Source:
    """The source that the model's flag, --dtype and --device name. Raises `Refused` before loading."""
    if is_file(path):
        check_file(flag, path, pickles=True)
    device = device_of(device)
    return Source(path, dtype=DTYPES[dtype], device=device, tokenizer_cache_dir=tokenizer_cache_dir)


def check_folder(path: str) -> None:
    """Raise `Refused` for a single file, which has the transformer only."""
    if is_file(path):
        raise Refused(
            f"{path} is a single file, and text encoders and VAE are needed beside the "
            "transformer; give the folder of a diffusers model"
        )


def model_family(source: Source) -> Family:
    """The family of a model folder, a hub id or an SD checkpoint file. Raises `Refused`."""
    if is_file(source.path):
        file = open_checkpoint(source.path)
        if any("double_blocks." in key for key in file.shapes):
            check_folder(source.path)
        return SDXL if kind_of(file) == "sdxl" else SD15
    path = local_folder(source, lambda name, **_: Path(hf_hub_download(name, INDEX)).parent) / INDEX
    with reading("list of parts", path):
        kind = str(read_json(path, "list of parts")["_class_name"])
    if kind not in FAMILIES:
        raise Refused(
            f"{source.path} is a model for {kind}, which is none of {', '.join(FAMILIES)}; give one of these"
        )
    return FAMILIES[kind]


def own_side(models: Models) -> int:
    """The side of the images that the model was trained on, in pixels, from its configuration."""
    latents = models.configs["denoiser"].get("sample_size")
    if latents:
        return latents * latent_scale(models)
    return models.configs["vae"].get("sample_size", 1024)


def device_of(name: str | None) -> str:
    """The named device, by default a GPU where there is one. Raises `Refused` for a device not present."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    known = ["cpu", *(["cuda", *gpus] if torch.cuda.is_available() else [])]
    known += ["mps"] if torch.backends.mps.is_available() else []
    device = name or ("cuda" if "cuda" in known else "cpu")
    if device not in known:
        raise Refused(f"--device {device} is not on this machine; give one of {', '.join(known)}")
    return device
