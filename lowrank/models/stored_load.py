"""Read a denoiser from its file into its storage, tensor by tensor, and keep the quantised one on disk.

Host memory needs the stored model and two of the largest tensors, whatever the precision of the file. A
quantised model is kept in the cache folder under a hash of the base, the kind and the precision, so that the
second start reads a quarter or half of the bytes and quantises nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lowrank.errors import Refused
from lowrank.files import atomic, cache_folder, read_json
from lowrank.models import blocks, frozen
from lowrank.models.components import check_scales, complete, finite_value, reading
from lowrank.models.family import Source
from lowrank.models.storage import PLAIN, Format

VERSION = "base-1"  # part of every key: change it if a kind stores other bytes
Readers = Mapping[str, Callable[[], Tensor]]  # a model's tensors by name, each read when it is called

logger = logging.getLogger(__name__)


def load_stored(
    empty: nn.Module, readers: Readers, where: Path, source: Source, base_hash: Callable[[], str]
) -> nn.Module:
    """Give a denoiser on the meta device its weights, stored as `source.storage`, in host memory.

    Each stored layer can read its weight as it was before (`original`). Raises `Refused` for a tensor that is
    missing, of another size, or not finite.
    """
    kind, dtype = source.storage, source.dtype
    assert kind is not None
    shapes = {name: value.shape for name, value in empty.state_dict().items()}
    complete(type(empty).__name__, where, {"missing_keys": shapes.keys() - readers.keys()})
    blocks.freeze_base(empty)
    layers: dict[str, Any] = {
        f"{name}.weight": layer for name, layer in empty.named_modules() if frozen.is_frozen(layer)
    }
    path = None if kind in PLAIN else _cache_file(base_hash(), kind, dtype)
    cached = None if path is None else _read_cache(path, layers, kind, dtype)
    state = {}
    for name, shape in shapes.items():
        original = partial(_checked, readers[name], name, shape, where, source)
        if name not in layers:
            state[name] = original().to("cpu").clone()
            continue
        layer = layers[name]
        layer.original = original
        if cached is None:
            frozen.pack(layer, original(), kind, dtype)
            layer.packed, layer.row_norms = layer.packed.cpu(), layer.row_norms.cpu()
        else:
            layer.format = Format(kind, tuple(shape), dtype)
            layer.packed, layer.row_norms = cached[name]
    empty.load_state_dict(state, assign=True, strict=False)
    if path and cached is None:
        _write_cache(path, layers)
    return empty.requires_grad_(False).eval()


def empty_denoiser(kind: Any, config: Mapping[str, Any]) -> nn.Module:
    """A denoiser of a class of diffusers on the meta device."""
    with torch.device("meta"):
        return kind.from_config(dict(config))


def _checked(read: Callable[[], Tensor], name: str, shape: torch.Size, where: Path, source: Source) -> Tensor:
    """A tensor on the device and in the dtype that compute; `Refused` if its size or its values are wrong."""
    value = read()
    if value.numel() != shape.numel() or value.shape[:1] != shape[:1]:
        complete("denoiser", where, {"mismatched_keys": [name]})
    value = value.to(source.device).reshape(shape)
    value = value.to(source.dtype) if value.is_floating_point() else value
    finite_value(name, value, "denoiser", where)
    return value


# ---------- the cache on disk


def _cache_file(base_hash: str, kind: str, dtype: torch.dtype) -> Path:
    facts = json.dumps([VERSION, base_hash, kind, str(dtype)])
    return cache_folder("base") / f"{hashlib.sha256(facts.encode()).hexdigest()}.safetensors"


def _write_cache(path: Path, layers: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: layer.packed for name, layer in layers.items()}
    tensors |= {f"{name}.rows": layer.row_norms for name, layer in layers.items()}
    with atomic(path) as part:
        save_file(tensors, part, {"lowrank.base": path.stem})
    logger.info("wrote the quantised base to %s", path)


def _read_cache(
    path: Path, layers: Mapping[str, Any], kind: str, dtype: torch.dtype
) -> dict[str, tuple[Tensor, Tensor]] | None:
    """The stored weights and row lengths by name; None without a file, or with one of another model."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("lowrank.base") != path.stem:
                raise Refused("its name does not fit its content")
            values = {name: (file.get_tensor(name), file.get_tensor(f"{name}.rows")) for name in layers}
        for name, (packed, _) in values.items():
            if packed.numel() != Format(kind, layers[name].format.shape, dtype).bytes:
                raise Refused(f"{name} has another size")
    except (SafetensorError, Refused) as error:
        logger.warning("%s is damaged or of another model (%s); quantising again", path, error)
        return None
    logger.info("read the quantised base from %s", path)
    return values


# ---------- tensors by name


def folder_readers(folder: Path, variant: str | None) -> Readers | None:
    """The tensors of a component's folder by name; None if it has no safetensors files of this variant."""
    middle = f".{variant}" if variant else ""
    index = folder / f"diffusion_pytorch_model.safetensors.index{middle}.json"
    single = folder / f"diffusion_pytorch_model{middle}.safetensors"
    with reading("weights", folder):
        if index.is_file():
            parts = read_json(index, "index of weights")["weight_map"]
        elif single.is_file():
            with safe_open(single, framework="pt") as file:
                parts = dict.fromkeys(file.keys(), single.name)
        else:
            return None
    check_scales(parts, folder)
    return {name: partial(_read, folder / part, name) for name, part in parts.items()}


def _read(path: Path, name: str) -> Tensor:
    with reading("weights", path), safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
