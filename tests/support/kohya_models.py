"""SD 1.5 and SDXL with kohya's layers and few channels."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SD15 = {"cross_attention_dim": 768}  # the rest are diffusers' defaults


SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}


SMALL = {"norm_num_groups": 4, "sample_size": 8, "attention_head_dim": 4}


TINY_SD = {**SMALL, "cross_attention_dim": 32, "block_out_channels": [8, 8, 16, 16]}


TINY_SDXL = {
    **SDXL,
    **SMALL,
    "addition_time_embed_dim": 4,
    "block_out_channels": [8, 16, 16],
    "cross_attention_dim": 64,
    "projection_class_embeddings_input_dim": 32 + 6 * 4,
    "transformer_layers_per_block": [1, 1, 2],
}


def clip(kind: type, width: int, layers: int, heads: int, **more):
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    return kind(CLIPTextConfig(num_hidden_layers=layers, num_attention_heads=heads, **sizes, **more))


def tiny(family: str):
    """(text encoders, U-Net) with the paths of the family and a few channels, each time the same values."""
    small = {"vocab_size": 99, "eos_token_id": 98, "bos_token_id": 97, "pad_token_id": 96}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        encoders = [clip(CLIPTextModel, 32, 1, 2, **small)]
        if family == "sdxl":
            encoders.append(clip(CLIPTextModelWithProjection, 32, 1, 2, **small))
        unet = UNet2DConditionModel(**(TINY_SD if family == "sd" else TINY_SDXL))
    for model in (*encoders, unet):
        model.requires_grad_(False).eval()
    return encoders, unet
