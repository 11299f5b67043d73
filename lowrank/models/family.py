"""A model family is a record: facts, and the functions that load, encode, denoise and sample. Nothing is
inherited.

The training loop, the cache and the command lines know a family only through `Family`; a new one is a module
that fills the record (`flux.py`) and nothing else. Shapes: B batch, C latent channels, h×w latent pixels, H×W
picture pixels.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lowrank.errors import Refused

log = logging.getLogger(__name__)

# Precisions by every name that an option gives them; "no" is accelerate's word for fp32.
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROLES = ("text", "vae", "denoiser")  # in the order a run needs them
_WHOLE = 64 << 20  # files up to this size are hashed byte for byte
_PIECE = 4096
_ALIGNED = 64  # bytes: torch's own allocations on the CPU, and what MKL asks for
_UNTOLD = ("transformers_version", "torch_dtype", "dtype")


class FamilyOptions:
    """A family's switches of text and denoiser: each family derives a frozen dataclass from it."""


@dataclass(frozen=True)
class Source:
    """Where a model is and how to load it. `path` is a diffusers folder, a hub id, or one checkpoint file."""

    path: str
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    dtype: torch.dtype = torch.bfloat16
    device: str | torch.device = "cpu"
    vae: str | None = None  # replaces the model's own: a folder or a file
    vae_dtype: torch.dtype | None = None  # None: as `dtype`; float32 is --no_half_vae
    clip_l: str | None = None
    t5xxl: str | None = None
    ae: str | None = None
    tokenizer_cache_dir: str | None = None
    v2: bool = False  # SD 2.x is expected; whether it is one is read off the model
    v_parameterization: bool = False  # predicts v, where no scheduler configuration says so


@dataclass
class Models:
    """What is loaded now. A part that is None was not asked for, or was released; `configs` stay."""

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
    held: dict[str, Any] = field(default_factory=dict)  # what loading remembers: a single file's table


@dataclass(frozen=True)
class Family:
    """Facts and functions of one model family. `options` is the family's frozen dataclass of switches."""

    name: str
    implementation: str  # modelspec.implementation
    options: type[FamilyOptions]
    prediction: Callable[[Models], str]  # "flow", "epsilon" or "v_prediction"
    bucket_step: Callable[[Models], int]  # picture sides must be multiples of it
    base_model_version: Callable[[Models], str]  # ss_base_model_version
    architecture: Callable[[Models], str]  # modelspec.architecture without "/lora"
    load: Callable[..., Models]  # (source, roles=ROLES)
    add: Callable[[Models, Iterable[str]], None]  # load parts that are missing
    encode_images: Callable[[Models, Tensor], Tensor]  # (B, 3, H, W) in [−1, 1] → moments (B, 2C, h, w)
    # moments → (B, C, h, w), drawn and scaled
    latents: Callable[[Models, Tensor, torch.Generator | None], Tensor]
    decode: Callable[[Models, Tensor], Tensor]  # (B, C, h, w) → (B, 3, H, W) in [−1, 1]
    # (models, captions, options) → one CPU dict per caption
    encode_text: Callable[..., list[dict[str, Tensor]]]
    # the encoders that adapters can train; the others go
    keep_trained_text: Callable[[Models], list[nn.Module]]
    # (models, captions, options) → their part of the conditions, with gradient
    trained_text: Callable[..., dict[str, Tensor]]
    empty: Callable[[Models], nn.Module]  # the denoiser without weights, on the meta device
    denoise: Callable[..., Tensor]  # (denoiser, noisy, timesteps, text, options) → prediction (B, C, h, w)
    pipeline: Callable[[Models], Any]  # the stock pipeline around the present denoiser
    # (models, text, options, *, height, width, steps, generator, negative=None, scale=1.0, guidance=None,
    # sampler=None) → PIL images
    sample: Callable[..., list]
    model_hash: Callable[[Models | Source | str, str], str]  # (…, role) → 64 hex digits
    # (original sizes, crops' top left corners, target sizes), each (B, 2) of y, x → more conditions;
    # None for a family whose denoiser is not conditioned on sizes
    size_conditions: Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]] | None = None


def latent_scale(models: Models) -> int:
    """Picture pixels per latent pixel: the VAE halves the sides between its levels."""
    return 2 ** (len(models.configs["vae"]["block_out_channels"]) - 1)


# ---------- parts in memory


def release(models: Models, roles: Iterable[str]) -> None:
    """Let go of parts ("text", "vae", "denoiser") and give their memory back; configurations stay known."""
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


# ---------- finding and reading


def local_folder(source: Source, download: Callable[..., str | os.PathLike]) -> Path:
    """The local folder of a diffusers model: `source.path` itself, or a hub id's snapshot fetched by
    `download`.

    A folder that is there is never looked up on the hub. Raises `Refused` for a path that is neither.
    """
    path = Path(source.path)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source.path) or source.path.startswith("."):
        raise Refused(
            f"the base model {source.path!r} is neither a folder nor a hub id like "
            "'black-forest-labs/FLUX.1-dev'; check the path"
        )
    try:
        return Path(
            download(
                source.path, revision=source.revision, variant=source.variant, cache_dir=source.cache_dir
            )
        )
    except (OSError, ValueError) as error:  # huggingface_hub's errors are one or the other
        raise Refused(
            f"there is no folder {source.path!r}, and the hub did not give a model of that name: "
            f"{_first_line(error)}; check the name, the network or your login"
        ) from error


def component_folder(root: Path, name: str, what: str) -> Path:
    """The folder `name` of a diffusers model; `Refused`, naming both, when it is missing or empty."""
    folder = root / name
    if not folder.is_dir() or not any(folder.iterdir()):
        raise Refused(
            f"{root} has no {name!r} ({what}); a diffusers model keeps it in {folder}, download it again or "
            "give another folder"
        )
    return folder


@contextlib.contextmanager
def reading(what: str, where: str | Path) -> Iterator[None]:
    """Turn a library's complaint about an unreadable file into one sentence; out-of-memory stays itself."""
    try:
        yield
    except (Refused, torch.OutOfMemoryError):
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        TypeError,  # this and the next: JSON that is a list where an object belongs
        AttributeError,
        SafetensorError,
    ) as error:
        raise Refused(
            f"the {what} in {where} cannot be read: {_first_line(error)}; it may be half-downloaded or of "
            "another model, fetch it again"
        ) from error


def complete(what: str, where: str | Path, info: Mapping[str, Any]) -> None:
    """Refuse weights with tensors missing or of another shape: libraries fill those with random numbers."""
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        found = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info.get(problem) or ())
        if found:
            raise Refused(
                f"the {what} in {where} does not fit its configuration: {len(found)} × "
                f"{problem.split('_')[0]}, the first is {found[0]}; fetch the model again"
            )


def finite(module: nn.Module, what: str, where: str | Path) -> None:
    """Refuse a module with a NaN or an infinity, naming the tensor. One pass over the memory."""
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not value.is_meta:
            if value.dtype.itemsize == 1:
                value = value.to(torch.float16)  # float8 has no sum
            # the sum is not finite if one element is not
            if not torch.isfinite(value.sum(dtype=torch.float32)):
                if torch.isfinite(value).all():
                    continue  # …but a sum may overflow where no element does
                raise Refused(
                    f"{name} of the {what} in {where} holds NaN or infinite values; fetch the file again"
                )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


# ---------- hashes


def fingerprint(files: Iterable[Path]) -> str:
    """One SHA-256 over files in the given order: names and bytes, of large ones a sample of each tensor.

    A safetensors file above 64 MiB counts with its size, header and three 4 KiB pieces of every tensor, so
    that 24 GB take a moment and a change of any tensor by training or merging is still seen. JSON counts
    without its layout and without the versions that wrote it.
    """
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        for piece in _pieces(path):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    if path.suffix == ".json":
        facts = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(facts, dict):  # who saved it, and with which version, does not matter
            facts = {k: v for k, v in facts.items() if not k.startswith("_") and k not in _UNTOLD}
        yield json.dumps(facts, sort_keys=True).encode()
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE or path.suffix not in (".safetensors", ".sft"):
            while block := file.read(1 << 20):
                yield block
            return
        yield size.to_bytes(8, "little")
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        yield header
        for _, tensor in sorted((k, v) for k, v in json.loads(header).items() if k != "__metadata__"):
            start, end = tensor["data_offsets"]
            for at in (start, (start + end - _PIECE) // 2, end - _PIECE):
                file.seek(8 + length + max(at, start))
                yield file.read(min(_PIECE, end - start))
