"""Find, read, check and hash the parts of a diffusers model; a broken part is refused by name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging

from lowrank.errors import Refused
from lowrank.files import MODEL_JSON, TOKENIZER_BITS, parse_json, read_json
from lowrank.models import published
from lowrank.models.family import ROLES, Models, Source

_WHOLE = 64 << 20  # files up to this size are hashed byte for byte
_PIECE = 4096  # bytes
_VERSIONS = ("transformers_version", "torch_dtype", "dtype")  # keys of JSON that are not hashed
# keys of scales beside quantised weights, of several programs
_QUANTISED = re.compile(r"scale_weight$|weight_scale(_2)?$|quant_state|\.absmax$|qweight$|scale_inv$")
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
    """Load the named parts that are not loaded, each with the function of its family."""
    for role in roles:
        if role == "text" and not models.text_encoders:
            models.tokenizers = tuple(with_vocabulary(tokenizer) for tokenizer in tokenizers(models))
            models.text_encoders = encoders(models)
        elif role == "vae" and models.vae is None:
            models.vae = vae(models)
        elif role == "denoiser" and models.denoiser is None:
            models.denoiser = denoiser(models)
        elif role not in ROLES:
            raise ValueError(f"{role!r} is not one of {ROLES}")


_OTHERS = {  # folder of the denoiser: that of other families, and how those are trained
    "transformer": (
        "unet",
        "SD 1 and SD 2 are trained with train_network_ABM.py, SDXL with sdxl_train_network_ABM.py",
    ),
    "unet": ("transformer", "FLUX is trained with flux_train_qrlora.py"),
}


def check_denoiser(models: Models, name: str) -> None:
    """Refuse a model whose denoiser is in the folder of another family."""
    other, way_out = _OTHERS[name]
    if (models.root / other).is_dir() and not (models.root / name).is_dir():
        raise Refused(f"{models.source.path} holds a {other} and no {name}: {way_out}")


def config(kind: Any, root: Path, name: str, needed: str) -> Mapping[str, Any]:
    """The configuration of a component; `Refused` when it lacks `needed`, a key of this kind of model."""
    folder = component_folder(root, name, kind.__name__)
    with reading(f"configuration of {name}", folder):
        facts = dict(kind.load_config(folder, local_files_only=True))
    if needed not in facts:
        raise Refused(f"the configuration in {folder} has no {needed}: another model's; download it again")
    return facts


def load_component(kind: Any, source: Source, root: Path, name: str, **dtype: torch.dtype) -> nn.Module:
    """One component of a diffusers folder; the dtype's keyword differs between diffusers and transformers."""
    folder = component_folder(root, name, kind.__name__)
    with reading(name, folder), without_bars():
        module, info = kind.from_pretrained(
            folder, local_files_only=True, variant=source.variant, output_loading_info=True, **dtype
        )
    complete(name, folder, info)
    check_scales(info.get("unexpected_keys") or (), folder)
    return ready(module, name, folder, source)


def text_config(kind: Any, root: Path, name: str) -> Any:
    """The configuration of a text encoder of class `kind` in a diffusers folder."""
    folder = component_folder(root, name, kind.__name__)
    with reading(f"configuration of {name}", folder):
        return kind.config_class.from_pretrained(folder, local_files_only=True)


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


def with_vocabulary(tokenizer: Any) -> Any:
    """The tokenizer. Raises `Refused` without a vocabulary: transformers makes an empty one without files."""
    ids = tokenizer("a cat on the beach", add_special_tokens=False).input_ids
    if len(set(ids)) < 2:
        raise Refused(
            f"the {type(tokenizer).__name__} of {tokenizer.name_or_path} has no words (vocabulary of "
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


# ---------- finding and reading


def local_folder(source: Source, download: Callable[..., str | os.PathLike]) -> Path:
    """The local folder of a diffusers model: `source.path`, or the snapshot of a hub id from `download`.

    An existing folder is never looked up on the hub. Without `source.weights` only configurations are
    fetched. Raises `Refused` for a path that is neither.
    """
    path = Path(source.path)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source.path) or source.path.startswith("."):
        raise Refused(
            f"the base model {source.path!r} is neither a folder nor a hub id like "
            "'black-forest-labs/FLUX.1-dev'; check the path"
        )
    if not source.weights:
        download = _configurations
    try:
        return Path(
            download(
                source.path, revision=source.revision, variant=source.variant, cache_dir=source.cache_dir
            )
        )
    except (OSError, ValueError) as error:  # huggingface_hub's errors are one or the other
        raise Refused(
            f"there is no folder {source.path!r}, and the hub gave no model of this name: "
            f"{_first_line(error)}; check the name, the network or your login"
        ) from error


def _configurations(repository: str, *, revision: str | None, cache_dir: str | None, **_: Any) -> str:
    """The folder of a hub model's configurations: from `configs/models` if it is there, else fetched."""
    if repository in published.KINDS:
        return str(published.folder(repository))
    return snapshot_download(
        repository, revision=revision, cache_dir=cache_dir, allow_patterns=["*.json", "*/*.json"]
    )


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
    """Turn a library's error for an unreadable file into a `Refused`, except out-of-memory errors."""
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
            f"the {what} in {where} cannot be read: {_first_line(error)}; the file may be incomplete or of "
            "another model, download it again"
        ) from error


def complete(what: str, where: str | Path, info: Mapping[str, Any]) -> None:
    """Refuse weights with tensors missing or of another shape: libraries fill those with random numbers."""
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        keys = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info.get(problem) or ())
        if keys:
            raise Refused(
                f"the {what} in {where} does not fit its configuration: {len(keys)} × "
                f"{problem.split('_')[0]}, the first is {keys[0]}; download the model again"
            )


def check_scales(names: Iterable[str], where: str | Path) -> None:
    """Refuse weights that are quantised with scales beside them which no reader uses."""
    if (key := next((name for name in names if _QUANTISED.search(name)), None)) is not None:
        raise Refused(
            f"{where} is quantised in a way that is not read here (it has {key}); give weights in bf16, fp16 "
            "or float8, and quantise them with --base_storage"
        )


def finite(module: nn.Module, what: str, where: str | Path) -> None:
    """Refuse a module with a NaN or an infinity, naming the tensor. One pass over the memory."""
    for name, value in module.state_dict().items():
        finite_value(name, value, what, where)


def finite_value(name: str, value: Tensor, what: str, where: str | Path) -> None:
    """Refuse a tensor with a NaN or an infinity."""
    if not value.is_floating_point() or value.is_meta:
        return
    if value.dtype.itemsize == 1:
        value = value.to(torch.float16)  # float8 has no sum
    # the sum is not finite if one element is not, but a sum may overflow where no element does
    if not torch.isfinite(value.sum(dtype=torch.float32)) and not torch.isfinite(value).all():
        raise Refused(
            f"{name} of the {what} in {where} holds NaN or infinite values; download the file again"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


# ---------- hashes


def fingerprint(files: Iterable[Path]) -> str:
    """One SHA-256 over files in the given order: names and bytes, of large ones a sample of each tensor.

    A safetensors file above 64 MiB counts with its size, header and three 4 KiB pieces of every tensor, so
    that 24 GB take a moment and a change of any tensor by training or merging still changes the hash. JSON is
    hashed without its layout and without the versions that wrote it.
    """
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        for piece in _pieces(path):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    if path.suffix == ".json":
        facts = read_json(path, "model configuration", MODEL_JSON, bits=TOKENIZER_BITS)
        if isinstance(facts, dict):  # the program and version that saved it do not matter
            facts = {k: v for k, v in facts.items() if not k.startswith("_") and k not in _VERSIONS}
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
        for _, tensor in sorted((k, v) for k, v in parse_json(header, path).items() if k != "__metadata__"):
            start, end = tensor["data_offsets"]
            for at in (start, (start + end - _PIECE) // 2, end - _PIECE):
                file.seek(8 + length + max(at, start))
                yield file.read(min(_PIECE, end - start))
