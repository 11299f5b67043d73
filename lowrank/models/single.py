"""Checkpoints of one file: their tensors, read by another library's names, and what is kept beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig

from lowrank.errors import Refused
from lowrank.models.family import Source, complete, reading
from lowrank.naming import unet as unet_names
from lowrank.tensors import read_tensors

SUFFIXES = (".safetensors", ".sft")
CONFIGS = "lowrank.configs"  # metadata: {part: configuration} where it is not as published
PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def is_file(path: str | Path | None) -> bool:
    """Whether `path` names a checkpoint file rather than a folder or a hub id."""
    return path is not None and (Path(path).is_file() or Path(path).suffix in (*SUFFIXES, *PICKLES))


def check_file(option: str, path: str, pickles: bool = False) -> None:
    """Refuse a path that is not there, and a checkpoint file that is a pickle unless these are read."""
    if not Path(path).exists():
        raise Refused(f"--{option} {path!r} does not exist; check the path")
    if not pickles and is_file(path) and Path(path).suffix not in SUFFIXES:
        raise Refused(
            f"--{option} {path!r} is no .safetensors file, and pickled checkpoints are not opened; convert it"
        )


class Checkpoint:
    """The tensors of one file under names without `prefixes`; shapes are known before anything is read.

    `told` are parts of configurations that a file says of itself (tools/single_file.py).
    """

    def __init__(self, path: str | Path, prefixes: tuple[str, ...] = ("",)) -> None:
        self.path, self._held, self.told = Path(path), None, {}
        if self.path.suffix in SUFFIXES:
            with reading("checkpoint", path), safe_open(path, framework="pt") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
                self.told = json.loads((file.metadata() or {}).get(CONFIGS, "{}"))
        else:  # only tensors are taken out of a pickle, never code
            self._held, _ = read_tensors(path)
            shapes = {key: tuple(value.shape) for key, value in self._held.items()}
        self._keys: dict[str, str] = {}
        for prefix in prefixes:
            for key in shapes:
                if key.startswith(prefix):
                    self._keys.setdefault(key.removeprefix(prefix), key)
        self.shapes = {name: shapes[key] for name, key in self._keys.items()}

    def under(self, *prefixes: str) -> Checkpoint:
        """The same file, seen through the first of the prefixes that occurs in it; empty if none does."""
        other = object.__new__(Checkpoint)
        other.path, other._held, other.told = self.path, self._held, self.told
        found = next((p for p in prefixes if any(name.startswith(p) for name in self._keys)), None)
        other._keys = {
            name.removeprefix(found): key
            for name, key in self._keys.items()
            if found is not None and name.startswith(found)
        }
        other.shapes = {name: self.shapes[f"{found}{name}"] for name in other._keys}
        return other

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors as stored, one at a time."""
        if self._held is not None:
            yield from ((name, self._held[self._keys[name]]) for name in names)
            return
        with reading("checkpoint", self.path), safe_open(self.path, framework="pt") as file:
            yield from ((name, file.get_tensor(self._keys[name])) for name in names)


def fill(model: nn.Module, file: Checkpoint, spelled: Callable[[str], str], dtype: torch.dtype) -> nn.Module:
    """Give a model on the meta device its values: of each tensor what the file holds under `spelled(name)`.

    A 1×1 convolution fills a linear layer of as many values. Raises `Refused` for a tensor that is missing or
    of another size.
    """
    empty = model.state_dict()
    wanted = {spelled(name): name for name in empty}
    missing = [theirs for theirs in wanted if theirs not in file.shapes]
    complete(type(model).__name__, file.path, {"missing_keys": missing})
    odd, state = [], {}
    for theirs, tensor in file.read(wanted):
        shape = empty[wanted[theirs]].shape
        if tensor.numel() != shape.numel() or tensor.shape[:1] != shape[:1]:
            odd.append(theirs)
        else:
            state[wanted[theirs]] = tensor.reshape(shape).to(dtype).clone()
    complete(type(model).__name__, file.path, {"mismatched_keys": odd})
    model.load_state_dict(state, assign=True)
    return model


def autoencoder_config(file: Checkpoint, facts: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' configuration of an autoencoder from the shapes of its original tensors; `facts` are what
    shapes do not tell."""
    shapes = file.shapes
    if "encoder.conv_out.weight" not in shapes:
        raise Refused(f"{file.path} holds no VAE (no encoder.conv_out.weight); give a file or folder of one")
    with reading("vae", file.path):
        levels = 1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("encoder.down."))
        widths = [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)]
        layers = len({key.split(".")[4] for key in shapes if key.startswith("encoder.down.0.block.")})
        channels = shapes["encoder.conv_out.weight"][0] // 2
    return {
        **facts,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": channels,
        "norm_num_groups": min(32, widths[0]),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        **file.told.get("vae", {}),
    }


def autoencoder(file: Checkpoint, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """An autoencoder's original tensors as diffusers' AutoencoderKL."""
    levels = len(config["block_out_channels"])
    with reading("vae", file.path), torch.device("meta"):
        model: Any = AutoencoderKL.from_config(dict(config))
    return fill(model, file, lambda name: unet_names.vae_name(name, levels), dtype)


def original_vae(file: Checkpoint) -> Checkpoint:
    """A file of an autoencoder under the original names: without a prefix, and out of diffusers' names."""
    file = file.under("first_stage_model.", "vae.", "")
    ups = [key for key in file.shapes if key.startswith("decoder.up_blocks.")]
    if ups:
        levels = 1 + max(int(key.split(".")[2]) for key in ups)
        file._keys = {unet_names.vae_name(name, levels): key for name, key in file._keys.items()}
        file.shapes = {unet_names.vae_name(name, levels): shape for name, shape in file.shapes.items()}
    return file


def clip_config(shapes: Mapping[str, tuple[int, ...]], **facts: Any) -> CLIPTextConfig:
    """CLIP's configuration from transformers' names and shapes; heads are 64 wide in every CLIP text model
    that FLUX, SD and SDXL use."""
    root = "text_model." if any(key.startswith("text_model.") for key in shapes) else ""
    vocabulary, width = shapes[f"{root}embeddings.token_embedding.weight"]
    projection = shapes.get("text_projection.weight", (width,))[0]
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        projection_dim=projection,
        num_attention_heads=max(1, width // 64),
        intermediate_size=shapes[f"{root}encoder.layers.0.mlp.fc1.weight"][0],
        max_position_embeddings=shapes[f"{root}embeddings.position_embedding.weight"][0],
        num_hidden_layers=len({k.split(".layers.")[1].split(".")[0] for k in shapes if ".layers." in k}),
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
        **facts,
    )


def hub_tokenizer(kind: Any, name: str, source: Source, subfolder: str | None = None) -> Any:
    """A tokenizer by its hub id: from `--tokenizer_cache_dir`/<id with / as _>, fetched if absent."""
    place = name.replace("/", "_")
    kept = Path(source.tokenizer_cache_dir) / place if source.tokenizer_cache_dir else None
    there = kept is not None and kept.is_dir()
    within = {"subfolder": subfolder} if subfolder and not there else {}
    try:
        found = kind.from_pretrained(
            kept if there else name, local_files_only=there, cache_dir=source.cache_dir, **within
        )
    except (OSError, ValueError) as error:
        raise Refused(
            f"the tokenizer {name} is not here and cannot be fetched; put its files into "
            f"{kept or '--tokenizer_cache_dir/' + place}"
        ) from error
    if kept is not None and not there:
        found.save_pretrained(kept)
    return found
