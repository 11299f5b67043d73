"""A model family as a record: facts, and the functions that load, encode, denoise and sample.

The training loop, the cache and the command lines use a family only through `Family`; a new family is a
module that fills the record, as `flux.py` does. Shapes: B batch, C latent channels, h×w latent pixels, H×W
image pixels.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from PIL.Image import Image
from torch import Tensor, nn

# Precisions by every name that an option gives them; "no" is accelerate's word for fp32.
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROLES = ("text", "vae", "denoiser")  # in the order a run needs them
_ALIGNED = 64  # bytes: torch's own allocations on the CPU, and what MKL asks for


class FamilyOptions:
    """Options of text encoders and denoiser; each family derives a frozen dataclass from this class."""


Options = TypeVar("Options", bound=FamilyOptions)
OptionsIn = TypeVar("OptionsIn", bound=FamilyOptions, contravariant=True)


@dataclass(frozen=True)
class Source:
    """Where a model is and how to load it. `path` is a diffusers folder, a hub id, or one checkpoint file."""

    path: str
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    dtype: torch.dtype = torch.bfloat16
    device: str | torch.device = "cpu"
    storage: str | None = None  # the denoiser goes into host memory tensor by tensor, in this kind
    vae: str | None = None  # replaces the model's own: a folder or a file
    vae_dtype: torch.dtype | None = None  # None: as `dtype`; float32 is --no_half_vae
    clip_l: str | None = None
    t5xxl: str | None = None
    ae: str | None = None
    tokenizer_cache_dir: str | None = None
    v2: bool = False  # SD 2.x is expected, and another model is refused
    v_parameterization: bool = False  # predicts v, where no scheduler configuration says so
    weights: bool = True  # False: configurations are enough, and no weights are downloaded


@dataclass
class Models:
    """The loaded parts of a model. A part that is None is not loaded yet, or was released; `configs` stay."""

    source: Source
    root: Path  # the local folder, or the checkpoint file
    # Any: diffusers' and transformers' own classes, whose attributes nn.Module does not declare
    scheduler: Any = None
    denoiser: Any = None
    vae: Any = None
    text_encoders: tuple[Any, ...] = ()
    tokenizers: tuple[Any, ...] = ()
    # "denoiser", "vae", and of some families "scheduler": known without their weights
    configs: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    checkpoints: dict[str, Any] = field(default_factory=dict)  # single files that loading has opened


class TokenCounts(NamedTuple):
    """The tokens of captions, and how many of them a text encoder takes; the others are cut."""

    encoder: str
    limit: int
    counts: list[int]
    way_out: str  # an option that takes more tokens, or an empty text


class Load(Protocol):
    """Find a model and load parts of it."""

    def __call__(self, source: Source, roles: Iterable[str] = ROLES) -> Models:
        """The model with its configurations and the parts named by `roles`."""
        raise NotImplementedError


class Sample(Protocol[OptionsIn]):
    """Draw images with the stock pipeline of the family."""

    def __call__(
        self,
        models: Models,
        text: Mapping[str, Tensor],
        options: OptionsIn,
        *,
        height: int,
        width: int,
        steps: int,
        generator: torch.Generator,
        negative: Mapping[str, Tensor] | None = None,
        scale: float = 1.0,
        guidance: float | None = None,
        sampler: str | None = None,
    ) -> list[Image]:
        """One image per caption of `text`, with guidance of strength `scale` against `negative`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Family(Generic[Options]):
    """Facts and functions of one model family; `options` is the class of the family's options."""

    name: str
    implementation: str  # modelspec.implementation
    options: type[Options]
    prediction: Callable[[Models], str]  # "flow", "epsilon" or "v_prediction"
    bucket_step: Callable[[Models], int]  # image sides must be multiples of it
    base_model_version: Callable[[Models], str]  # ss_base_model_version
    architecture: Callable[[Models], str]  # modelspec.architecture without "/lora"
    load: Load
    add: Callable[[Models, Iterable[str]], None]  # load parts that are missing
    encode_images: Callable[[Models, Tensor], Tensor]  # (B, 3, H, W) in [−1, 1] → moments (B, 2C, h, w)
    # moments → (B, C, h, w), drawn and scaled
    latents: Callable[[Models, Tensor, torch.Generator | None], Tensor]
    decode: Callable[[Models, Tensor], Tensor]  # (B, C, h, w) → (B, 3, H, W) in [−1, 1]
    encode_text: Callable[[Models, Sequence[str], Options], list[dict[str, Tensor]]]  # CPU, by caption
    token_counts: Callable[[Models, Sequence[str], Options], TokenCounts]
    # keep only the encoders that adapters can train
    keep_trained_text: Callable[[Models, Options], list[nn.Module]]
    # the part of the conditions that comes from trained encoders, with gradient
    trained_text: Callable[[Models, Sequence[str], Options], dict[str, Tensor]]
    empty: Callable[[Models], nn.Module]  # the denoiser without weights, on the meta device
    # each text encoder without weights, on the meta device, and the most tokens that it takes
    empty_text: Callable[[Models], list[tuple[nn.Module, int]]]
    # (denoiser, noisy, timesteps, text, options) → prediction (B, C, h, w)
    denoise: Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor], Options], Tensor]
    pipeline: Callable[[Models], Any]  # the stock pipeline around the present denoiser
    sample: Sample[Options]
    model_hash: Callable[[Models | Source | str, str], str]  # (…, role) → 64 hex digits
    # (original sizes, crops' top left corners, target sizes), each (B, 2) of y, x → more conditions;
    # None for a family whose denoiser is not conditioned on sizes
    size_conditions: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]] | None = None


def latent_scale(models: Models) -> int:
    """Image pixels per latent pixel: the VAE halves the sides between its levels."""
    return 2 ** (len(models.configs["vae"]["block_out_channels"]) - 1)


# ---------- parts in memory


def release(models: Models, roles: Iterable[str]) -> None:
    """Drop parts ("text", "vae", "denoiser") and free their memory; configurations stay."""
    for role in roles:
        if role == "text":
            models.text_encoders = models.tokenizers = ()
        else:
            setattr(models, _known(role), None)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def move(models: Models, roles: Iterable[str], device: str | torch.device) -> None:
    """Move parts that are loaded to a device, for example the VAE to the CPU between previews."""
    for role in roles:
        for module in models.text_encoders if role == "text" else (getattr(models, _known(role)),):
            if module is not None:
                module.to(device)


def align(models: Models) -> None:
    """Copy weights on the CPU that do not begin at a multiple of 64 bytes to where they do.

    A safetensors file is mapped into memory, and its header shifts every tensor. MKL adds in another order
    there, so that equal weights of two files, or of two processes, give sums that differ in the last bit.
    """
    for role in ROLES:
        for module in models.text_encoders if role == "text" else (getattr(models, role),):
            for tensor in () if module is None else (*module.parameters(), *module.buffers()):
                plain = type(tensor) in (Tensor, nn.Parameter)  # a quantised one has its own storage
                if plain and tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNED:
                    tensor.data = tensor.data.clone()


def _known(role: str) -> str:
    if role not in ROLES:
        raise ValueError(f"{role!r} is not one of {ROLES}")
    return role
