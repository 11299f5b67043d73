"""Load SD 1.x, SD 2.x and SDXL from a diffusers folder, a hub snapshot or one file, and hash the weights."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lowrank.errors import Refused
from lowrank.models import components, published, sd_single, single, stored_load
from lowrank.models.components import component_folder, local_folder
from lowrank.models.family import ROLES, Models, Source
from lowrank.models.samplers import scheduler_from

logger = logging.getLogger(__name__)

TEXT = (("text_encoder", "tokenizer", CLIPTextModel),)
TEXT_XL = (*TEXT, ("text_encoder_2", "tokenizer_2", CLIPTextModelWithProjection))
# hub ids (and folders in them) of the tokenizers that single files go without, by kind of model
TOKENIZERS = {
    "sd15": (("openai/clip-vit-large-patch14", None),),
    "sd2": (("stabilityai/stable-diffusion-2", "tokenizer"),),
    "sdxl": (
        ("openai/clip-vit-large-patch14", None),
        ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", None),
    ),
}


def takes_sizes(config: Mapping[str, Any]) -> bool:
    """Whether a U-Net's configuration has SDXL's added conditions."""
    return config.get("addition_embed_type") == "text_time"


def is_v2(models: Models) -> bool:
    """Whether this is SD 2.x: its U-Net projects with linear layers, SD 1's with convolutions."""
    config = models.configs["denoiser"]
    return bool(config.get("use_linear_projection")) and not takes_sizes(config)


def load_sd(source: Source, roles: Iterable[str] = ROLES, *, xl: bool = False) -> Models:
    """Find the model and load some of its components; `add_sd_components` and `release` change these later.

    Raises `Refused` naming the component that is missing, unreadable, incomplete or not finite, and for a
    model of another kind than `xl` and `source.v2` expect.
    """
    if source.vae is not None:
        single.check_file("vae", source.vae, pickles=True)
    if single.is_file(source.path):
        models = _open_file(source)
    else:
        download = (StableDiffusionXLPipeline if xl else StableDiffusionPipeline).download
        models = Models(source, local_folder(source, download))
        components.check_denoiser(models, "unet")
        models.configs["denoiser"] = components.config(
            UNet2DConditionModel, models.root, "unet", "cross_attention_dim"
        )
        models.configs["scheduler"] = components.config(
            DDPMScheduler, models.root, "scheduler", "num_train_timesteps"
        )
        models.configs["vae"] = _vae_config(models)
    _check_kind(models, xl)
    if source.v_parameterization:
        predicted = models.configs["scheduler"].get("prediction_type", "v_prediction")
        if predicted != "v_prediction" and not models.root.is_file():
            logger.warning(
                "--v_parameterization is given, and the configuration of %s has prediction type %s; "
                "velocities are trained",
                source.path,
                predicted,
            )
        models.configs["scheduler"] = {**models.configs["scheduler"], "prediction_type": "v_prediction"}
    models.scheduler = scheduler_from(DDPMScheduler, models.configs["scheduler"])
    add_sd_components(models, roles)
    return models


def add_sd_components(models: Models, roles: Iterable[str]) -> None:
    """Load the named parts that are not there, on `source.device`, frozen and in evaluation mode."""
    components.add_components(
        models, roles, tokenizers=_tokenizers, encoders=_text_encoders, vae=_vae, denoiser=_denoiser
    )


def _check_kind(models: Models, xl: bool) -> None:
    config, where = models.configs["denoiser"], models.source.path
    if takes_sizes(config) != xl:
        kind, script = ("SDXL", "sdxl_train_network") if not xl else ("SD 1 or SD 2", "train_network")
        raise Refused(f"{where} is {kind}; train it with {script}_ABM.py")
    if models.source.v2 and not is_v2(models):
        raise Refused(f"--v2 is given and {where} is {'SDXL' if xl else 'SD 1'}; leave it out")
    channels = models.configs["vae"]["latent_channels"]
    if config["in_channels"] != channels:
        raise Refused(
            f"the U-Net of {where} takes {config['in_channels']} channels and its VAE makes {channels}: an "
            "inpainting model, or another's VAE; give a text-to-image model"
        )


def _open_file(source: Source) -> Models:
    single.check_file("pretrained_model_name_or_path", source.path, pickles=True)
    models = Models(source, Path(source.path))
    file = _file(models)
    facts = published.configurations(_kind(models))
    unet = file.under(sd_single.UNET)
    config = sd_single.unet_config(unet) | {"sample_size": facts["unet"]["sample_size"]}
    config |= unet.configs.get("unet", {})
    if takes_sizes(config):  # six numbers, each embedded, and the pooled text
        pooled = file.shapes["conditioner.embedders.1.model.text_projection"][1]
        config["addition_time_embed_dim"] = (config["projection_class_embeddings_input_dim"] - pooled) // 6
    models.configs = {"denoiser": config, "scheduler": facts["scheduler"]}
    models.configs["vae"] = _vae_config(models)
    return models


def _file(models: Models) -> single.Checkpoint:
    """The whole checkpoint file, its table read once."""
    if "file" not in models.checkpoints:
        models.checkpoints["file"] = single.open_checkpoint(models.root)
    return models.checkpoints["file"]


def _kind(models: Models) -> str:
    return sd_single.kind_of(_file(models))


def _vae_file(models: Models, root: Path) -> single.Checkpoint:
    return single.autoencoder_file(_whole(models, root))


def _whole(models: Models, root: Path) -> single.Checkpoint:
    return _file(models) if root == models.root else single.open_checkpoint(root)


def _vae_config(models: Models) -> Mapping[str, Any]:
    """The VAE's configuration; `Refused` for one whose latents are of another scale than the model's."""
    given, known = models.source.vae, _published(models)["vae"]
    config = _vae_facts(models, given, known)
    own_config = models.root / "vae" / "config.json"
    expected = (_vae_facts(models, None, known) if own_config.is_file() else known)["scaling_factor"]
    if given and config["scaling_factor"] != expected:
        raise Refused(
            f"--vae {given} scales latents by {config['scaling_factor']} and {models.source.path} takes them "
            f"at {expected}, so it is a VAE of another kind of model; give one made for this kind"
        )
    return config


def _published(models: Models) -> Mapping[str, Any]:
    unet = models.configs["denoiser"]
    return published.configurations("sdxl" if takes_sizes(unet) else "sd2" if is_v2(models) else "sd15")


def _vae_facts(models: Models, given: str | None, known: Mapping[str, Any]) -> Mapping[str, Any]:
    root, name = components.vae_place(given, models.root)
    if name:  # configurations from before diffusers 0.11, as SD 1.5's own, leave the scale out
        scale = {"scaling_factor": known["scaling_factor"]}
        return scale | dict(components.config(AutoencoderKL, root, name, "latent_channels"))
    if sd_single.is_whole(file := _whole(models, root)):
        known = published.configurations(sd_single.kind_of(file))["vae"]
    return single.autoencoder_config(_vae_file(models, root), known)


def _vae(models: Models) -> nn.Module:
    root, name = components.vae_place(models.source.vae, models.root)
    dtype = models.source.vae_dtype or models.source.dtype
    if name:
        return components.load_component(AutoencoderKL, models.source, root, name, torch_dtype=dtype)
    model = single.autoencoder(_vae_file(models, root), models.configs["vae"], dtype)
    return components.ready(model, "vae", root, models.source)


def _denoiser(models: Models) -> nn.Module:
    source, root = models.source, models.root
    if source.storage:
        if (readers := _unet_readers(models)) is not None:
            empty = stored_load.empty_denoiser(UNet2DConditionModel, models.configs["denoiser"])
            named = partial(model_hash, models, "denoiser")
            return stored_load.load_stored(empty, readers, root, source, named)
        source = replace(source, device="cpu")
    if not root.is_file():
        return components.load_component(UNet2DConditionModel, source, root, "unet", torch_dtype=source.dtype)
    model = sd_single.unet(_file(models).under(sd_single.UNET), models.configs["denoiser"], source.dtype)
    return components.ready(model, "unet", root, source)


def _unet_readers(models: Models) -> stored_load.Readers | None:
    """The U-Net's tensors by name; None where only a library can read them."""
    if models.root.is_file():
        return sd_single.unet_readers(_file(models).under(sd_single.UNET), models.configs["denoiser"])
    folder = component_folder(models.root, "unet", "UNet2DConditionModel")
    if "quantization_config" in models.configs["denoiser"]:
        return None
    return stored_load.folder_readers(folder, models.source.variant)


def _encoders(models: Models) -> tuple[tuple[str, str, type], ...]:
    return TEXT_XL if takes_sizes(models.configs["denoiser"]) else TEXT


def _text_encoders(models: Models) -> tuple[nn.Module, ...]:
    source, root = models.source, models.root
    if not root.is_file():
        return tuple(
            components.load_component(kind, source, root, name, dtype=source.dtype)
            for name, _, kind in _encoders(models)
        )
    encoders = (
        sd_single.text_encoder(_file(models), _kind(models), index, source.dtype)
        for index in range(len(_encoders(models)))
    )
    return tuple(components.ready(encoder, "text encoder", root, source) for encoder in encoders)


def empty_text(models: Models) -> list[tuple[nn.Module, int]]:
    """Each text encoder on the meta device, and the most tokens that it takes."""
    empties = []
    for index, (name, _, kind) in enumerate(_encoders(models)):
        if models.root.is_file():
            facts = sd_single.text_config(_file(models), _kind(models), index)
        else:
            facts = components.text_config(kind, models.root, name)
        with torch.device("meta"):
            empties.append((kind(facts), facts.max_position_embeddings))
    return empties


def _tokenizers(models: Models) -> tuple[Any, ...]:
    if not models.root.is_file():
        return tuple(
            components.folder_tokenizer(CLIPTokenizer, models.root, name) for _, name, _ in _encoders(models)
        )
    tokenizers = tuple(
        single.hub_tokenizer(CLIPTokenizer, name, models.source, within, models.root.parent / folder)
        for (name, within), folder in zip(
            TOKENIZERS[_kind(models)], ("tokenizer", "tokenizer_2"), strict=False
        )
    )
    for second in tokenizers[1:]:  # OpenCLIP pads with 0, and its tokenizer on the hub with the end token
        if second.pad_token_id == second.eos_token_id:
            second.pad_token = second.convert_ids_to_tokens(0)
    return tokenizers


load_xl = partial(load_sd, xl=True)


def model_hash(model: Models | Source | str, role: str, *, xl: bool = False) -> str:
    """Hex SHA-256 that names the weights of one role: key of caches, and of files made for a base.

    Large weights are sampled (see `components.fingerprint`). The hash of a role in a single file covers the
    whole file and the name of the role.
    """
    if isinstance(model, Models):
        source, root = model.source, model.root
    else:
        source = Source(model) if isinstance(model, str) else model
        download = (StableDiffusionXLPipeline if xl else StableDiffusionPipeline).download
        root = Path(source.path) if single.is_file(source.path) else local_folder(source, download)
    if role == "vae":
        parent, name = components.vae_place(source.vae, root)
        places = [component_folder(parent, name, role) if name else parent]
    elif root.is_file():
        places = [root]
    elif role == "denoiser":
        places = [component_folder(root, "unet", role)]
    else:
        names = (name for entry in (TEXT_XL if xl else TEXT) for name in entry[:2])
        places = [component_folder(root, name, role) for name in names]
    weights = components.hash_of(places)
    if places == [root]:  # one file has all roles
        return hashlib.sha256(f"{role} {weights}".encode()).hexdigest()
    return weights


model_hash_xl = partial(model_hash, xl=True)
