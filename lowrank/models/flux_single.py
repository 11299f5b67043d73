"""FLUX from single checkpoint files, as kohya's and ComfyUI's users keep them: DiT, `--ae`, `--clip_l`,
`--t5xxl`.

Names and layout of the DiT and autoencoder files are Black Forest Labs' (github.com/black-forest-labs/flux,
model.py). No configuration file comes with them, and none is needed: every size is read off the tensors'
shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5TokenizerFast,  # pyright: ignore[reportAttributeAccessIssue]  # an alias made at import
)

from lowrank.errors import Refused
from lowrank.models.components import reading
from lowrank.models.family import Models, Source
from lowrank.models.single import Checkpoint, check_file, clip_config, fill, filled_encoder, open_checkpoint
from lowrank.naming import flux as flux_names

VAE_FACTS = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024}  # FLUX.1's autoencoder
TOKENIZERS = {CLIPTokenizer: "openai/clip-vit-large-patch14", T5TokenizerFast: "google/t5-v1_1-xxl"}

_OTHERS = ("logit_scale", "text_projection", "decoder.")  # tensors that are not the encoder's
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)\.(weight|bias|scale)$")


def check_companions(source: Source) -> None:
    """Refuse --clip_l, --t5xxl, --ae and --vae that are not there; only a VAE may be a folder."""
    for option in ("clip_l", "t5xxl", "ae", "vae"):
        if (path := getattr(source, option)) is None:
            continue
        check_file(option, path)
        if option in ("clip_l", "t5xxl") and Path(path).is_dir():
            raise Refused(f"--{option} {path!r} is a folder; give the .safetensors file of the text encoder")


def open_models(source: Source) -> Models:
    """The `Models` of a single-file source, nothing loaded yet; `Refused` when a companion is not named."""
    for option, path in (
        ("pretrained_model_name_or_path", source.path),
        ("clip_l", source.clip_l),
        ("t5xxl", source.t5xxl),
        ("ae", source.ae or source.vae),
    ):
        if path is None:
            raise Refused(
                f"{source.path} is a single file and holds only the transformer; name its companion with "
                f"--{option}, or give a diffusers folder"
            )
        check_file(option, path)
    config = transformer_config(_file(source.path))
    dev = config["guidance_embeds"]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev)
    return Models(source, Path(source.path), scheduler=scheduler, configs={"denoiser": config})


def _file(path: str | Path) -> Checkpoint:
    return open_checkpoint(path).under("model.diffusion_model.", "")


def transformer_config(file: Checkpoint) -> dict[str, Any]:
    """diffusers' configuration from the shapes of a BFL checkpoint; `Refused` when it is not one."""
    shapes = file.shapes
    blocks = [(match[1], int(match[2])) for key in shapes if (match := _BLOCK.match(key))]
    head_of = "single_blocks.0.norm.query_norm.scale"
    needed = ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", head_of)
    for key in needed:
        if key not in shapes:
            ours = "x_embedder.weight" in shapes
            hint = "it is in diffusers' layout: give its folder" if ours else "it is another model"
            raise Refused(
                f"{file.path} is no FLUX transformer of Black Forest Labs' layout (no {key}); {hint}"
            )
    width, head = shapes["img_in.weight"][0], shapes[head_of][0]
    return {
        "patch_size": 1,
        "in_channels": shapes["img_in.weight"][1],
        "num_layers": len({n for kind, n in blocks if kind == "double"}),
        "num_single_layers": len({n for kind, n in blocks if kind == "single"}),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": (head // 8, head * 7 // 16, head * 7 // 16),  # FLUX.1: 16, 56, 56 of 128
    }


def to_diffusers(key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The diffusers tensors that one BFL tensor becomes; nothing for a name that is not the transformer's."""
    module, _, kind = key.rpartition(".")
    for ours, piece in flux_names.modules(module):
        rows = value.shape[0] // piece.total
        part = value[piece.start * rows : piece.stop * rows] if piece.total > 1 else value
        if module == flux_names.SWAPPED:
            part = torch.cat(value.chunk(2)[::-1])
        yield f"{ours}.{'weight' if kind == 'scale' else kind}", part


def transformer(path: Path, dtype: torch.dtype) -> nn.Module:
    """The DiT file as diffusers' FluxTransformer2DModel in `dtype`; float8 files are widened."""
    file = _file(path)
    with torch.device("meta"):
        model = FluxTransformer2DModel(**transformer_config(file))
    tensors = (piece for key, value in file.read(file.shapes) for piece in to_diffusers(key, value))
    return fill(model, path, tensors, dtype)


def transformer_readers(path: Path) -> dict[str, Callable[[], Tensor]]:
    """The tensors of a DiT file under diffusers' names, each read when it is called."""
    file = _file(path)
    return {
        name: partial(_piece, file, key, name)
        for key, shape in file.shapes.items()
        for name, _ in to_diffusers(key, torch.empty(shape, device="meta"))
    }


def _piece(file: Checkpoint, key: str, name: str) -> Tensor:
    ((_, value),) = file.read([key])
    return dict(to_diffusers(key, value))[name]


def text_encoder(kind: Any, path: Path, dtype: torch.dtype) -> nn.Module:
    """CLIP-L or T5-XXL from one file in transformers' names (clip_l.safetensors, t5xxl_fp16.safetensors)."""
    with reading(kind.__name__, path):
        file = open_checkpoint(path)
        names = [name for name in file.shapes if not name.startswith(_OTHERS)]
        state = {name: value.to(dtype) for name, value in file.read(names)}
    return filled_encoder(kind, text_config(kind, path), state, dtype, path)


def text_config(kind: Any, path: Path) -> Any:
    """The configuration of CLIP-L or T5-XXL in one file, from the shapes in its table."""
    with reading(kind.__name__, path):
        shapes = open_checkpoint(path).shapes
        configure = {CLIPTextModel: clip_config}.get(kind, t5_config)
        return configure({name: shape for name, shape in shapes.items() if not name.startswith(_OTHERS)})


def t5_config(shapes: Mapping[str, tuple[int, ...]]) -> T5Config:
    """T5 v1.1's configuration."""
    layer = "encoder.block.0.layer"
    buckets, heads = shapes[f"{layer}.0.SelfAttention.relative_attention_bias.weight"]
    inner, width = shapes[f"{layer}.0.SelfAttention.q.weight"]
    embedding = "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"
    vocabulary = shapes[embedding][0]
    return T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=inner // heads,
        d_ff=shapes[f"{layer}.1.DenseReluDense.wi_0.weight"][0],
        num_layers=len({k.split(".")[2] for k in shapes if k.startswith("encoder.block.")}),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,  # pyright: ignore[reportCallIssue]  # read from **kwargs
    )
