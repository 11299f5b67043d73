"""Checkpoints of one file: their tensors, read by another library's names, and what is kept beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig

from lowrank.errors import Refused
from lowrank.files import parse_json
from lowrank.models import components
from lowrank.models.components import complete, reading, without_bars
from lowrank.models.family import Source
from lowrank.tensors import read_tensors

SUFFIXES = (".safetensors", ".sft")
CONFIGS = "lowrank.configs"  # metadata: {part: configuration} where it is not as published
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# keys beside float8 weights, of ComfyUI and of kohya's scripts: scales, and what a product in float8 needs
_SCALE = re.compile(r"(.+)\.(?:scale_weight|weight_scale)$")
_UNREAD = re.compile(r"(?:^|\.)(?:scaled_fp8|scale_input|input_scale|comfy_quant)$")


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


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one file under names of their own; shapes are known before anything is read."""

    path: Path
    keys: Mapping[str, str]  # name here -> key in the file
    shapes: Mapping[str, tuple[int, ...]]
    configs: Mapping[str, Any] = field(default_factory=dict)  # {part: what its shapes do not tell}
    pickled: Mapping[str, Tensor] | None = None  # what was taken out of a pickle, which is read as a whole
    scales: Mapping[str, str] = field(default_factory=dict)  # key of a float8 weight -> key of its scales

    def under(self, *prefixes: str) -> Checkpoint:
        """The same file, seen through the first of the prefixes that occurs in it; empty if none does."""
        prefix = next((p for p in prefixes if any(name.startswith(p) for name in self.keys)), None)
        names = [name for name in self.keys if prefix is not None and name.startswith(prefix)]
        return replace(
            self,
            keys={name.removeprefix(prefix or ""): self.keys[name] for name in names},
            shapes={name.removeprefix(prefix or ""): self.shapes[name] for name in names},
        )

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors as stored, one at a time; scaled float8 weights in fp32."""
        if self.pickled is not None:
            yield from ((name, self.pickled[self.keys[name]]) for name in names)
            return
        with reading("checkpoint", self.path), safe_open(self.path, framework="pt") as file:
            for key, name in ((self.keys[name], name) for name in names):
                value, scale = file.get_tensor(key), self.scales.get(key)
                yield name, value if scale is None else _unscaled(value, file.get_tensor(scale))


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The table of a checkpoint file. Of a pickle only tensors are taken, never code."""
    path, configs, tensors, float8 = Path(path), {}, None, set()
    if path.suffix in SUFFIXES:
        with reading("checkpoint", path), safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            shapes = {key: tuple(value.get_shape()) for key, value in slices.items()}
            float8 = {key for key, value in slices.items() if value.get_dtype().startswith("F8")}
            configs = parse_json((file.metadata() or {}).get(CONFIGS, "{}"), f"{CONFIGS} of {path}")
    else:
        tensors, _ = read_tensors(path)
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    scales = {f"{match[1]}.weight": key for key in shapes if (match := _SCALE.match(key))}
    scales = {key: scale for key, scale in scales.items() if key in float8}
    shapes = {key: s for key, s in shapes.items() if key not in scales.values() and not _UNREAD.search(key)}
    components.check_scales(shapes, path)
    return Checkpoint(path, {key: key for key in shapes}, shapes, configs, tensors, scales)


def _unscaled(weight: Tensor, scale: Tensor) -> Tensor:
    """A float8 weight (O, I…) times its scales, in fp32: one number, one per row, or (O, n, 1) per group."""
    wide, scale = weight.float(), scale.float()
    if scale.dim() == 3:
        return wide.view(*scale.shape[:2], -1).mul_(scale).view(weight.shape)
    return wide.mul_(scale.reshape(-1, *(1,) * (wide.dim() - 1)))


def fill(
    model: nn.Module, where: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> nn.Module:
    """Give a model on the meta device its values, tensor by tensor; names that it has not are left out.

    A 1×1 convolution fills a linear layer of as many values. Raises `Refused` for a tensor that is missing or
    of another size.
    """
    empty, state, odd = model.state_dict(), {}, []
    for name, tensor in tensors:
        shape = empty[name].shape if name in empty else None
        if shape is None:
            continue
        if tensor.numel() != shape.numel() or tensor.shape[:1] != shape[:1]:
            odd.append(name)
        else:
            state[name] = tensor.reshape(shape).to(dtype).clone()
    missing = empty.keys() - state.keys() - set(odd)
    complete(type(model).__name__, where, {"missing_keys": missing, "mismatched_keys": odd})
    model.load_state_dict(state, assign=True)
    return model


# diffusers' names of an attention's layers before 0.15
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def under_diffusers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's tensors under diffusers' names, from the original ones or older ones of diffusers."""
    if any(".mid_block." in name for name in tensors):
        parts = ((name.rsplit(".", 2), value) for name, value in tensors.items())
        return {".".join([*a, _OLD_ATTENTION.get(b, b), c]): value for (*a, b, c), value in parts}
    levels = {name.split(".")[2] for name in tensors if name.startswith("encoder.down.")}
    blocks = dict.fromkeys(("down_block_types", "up_block_types"), sorted(levels))  # it counts them
    return convert_ldm_vae_checkpoint(dict(tensors), blocks)


def autoencoder_file(file: Checkpoint) -> Checkpoint:
    """A file of an autoencoder, or the autoencoder of a whole one, without a prefix."""
    return file.under("first_stage_model.", "vae.", "")


def autoencoder_config(file: Checkpoint, facts: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' configuration of an autoencoder from its tensors' shapes; `facts` are what these do not
    tell."""
    if "encoder.conv_out.weight" not in file.shapes:
        raise Refused(f"{file.path} holds no VAE (no encoder.conv_out.weight); give a file or folder of one")
    with reading("vae", file.path):
        empty = {name: torch.empty(shape, device="meta") for name, shape in file.shapes.items()}
        shapes = {name: tuple(value.shape) for name, value in under_diffusers_names(empty).items()}
        first = "encoder.down_blocks.{}.resnets.0.conv1.weight".format
        levels = len({name.split(".")[2] for name in shapes if name.startswith("encoder.down_blocks.")})
        widths = [shapes[first(level)][0] for level in range(levels)]
        layers = {k.split(".")[4] for k in shapes if k.startswith("encoder.down_blocks.0.resnets.")}
    return {
        **facts,
        "block_out_channels": widths,
        "layers_per_block": len(layers),
        "latent_channels": shapes["encoder.conv_out.weight"][0] // 2,
        "norm_num_groups": min(32, widths[0]),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        **file.configs.get("vae", {}),
    }


def autoencoder(file: Checkpoint, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """The autoencoder of `autoencoder_file` as diffusers' AutoencoderKL."""
    with reading("vae", file.path):
        with torch.device("meta"):
            model: Any = AutoencoderKL.from_config(dict(config))
        tensors = under_diffusers_names(dict(file.read(file.shapes)))
    return fill(model, file.path, tensors.items(), dtype)


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


def filled_encoder(
    kind: Any, config: Any, state: Mapping[str, Tensor], dtype: torch.dtype, where: Path
) -> nn.Module:
    """A text encoder of transformers with these tensors, in `dtype`; `Refused` where some are missing."""
    with reading(kind.__name__, where), without_bars():
        cast = {name: value.to(dtype).contiguous() for name, value in state.items()}
        model, info = kind.from_pretrained(
            None, config=config, state_dict=cast, dtype=dtype, output_loading_info=True
        )
    complete(kind.__name__, where, info)
    return model


def hub_tokenizer(
    kind: Any, name: str, source: Source, subfolder: str | None = None, beside: Path | None = None
) -> Any:
    """A tokenizer by its hub id: from the folder `beside` the model's file, if it is there.

    Otherwise from `--tokenizer_cache_dir`/<id with / as _>, fetched if absent.
    """
    if beside is not None and beside.is_dir():
        with reading(kind.__name__, beside):
            return kind.from_pretrained(beside, local_files_only=True)
    place = name.replace("/", "_")
    kept = Path(source.tokenizer_cache_dir) / place if source.tokenizer_cache_dir else None
    there = kept is not None and kept.is_dir()
    within = {"subfolder": subfolder} if subfolder and not there else {}
    try:
        model = kind.from_pretrained(
            kept if there else name, local_files_only=there, cache_dir=source.cache_dir, **within
        )
    except (OSError, ValueError) as error:
        raise Refused(
            f"the tokenizer {name} is not here and cannot be fetched; put its files into "
            f"{kept or '--tokenizer_cache_dir/' + place}{f' or {beside}' if beside else ''}"
        ) from error
    if kept is not None and not there:
        model.save_pretrained(kept)
    return model
