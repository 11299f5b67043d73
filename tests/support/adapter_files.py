"""Files of one or two layers, whole and damaged."""

from __future__ import annotations

import torch

from lowrank.formats.delta import Delta
from lowrank.formats.read import Adapter
from lowrank.naming.places import LayerPath


def _random(outs: int, ins: int, rank: int, scale: float = 0.5, seed: int = 0) -> Delta:
    generator = torch.Generator().manual_seed(seed + outs + rank)
    return Delta(
        torch.randn(outs, rank, generator=generator), torch.randn(rank, ins, generator=generator), scale
    )


def _flux(layers: dict[str, Delta]) -> Adapter:
    return Adapter("probe", "flux", {LayerPath("unet", path): layer for path, layer in layers.items()})


A, B = "lora_unet_mid_block_attentions_0_proj_in", "lora_unet_mid_block_attentions_0_proj_out"


def whole(name: str, rank: int = 2, outs: int = 64, ins: int = 64, dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(0)
    down, up = (
        torch.randn(rank, ins, 1, 1, generator=generator),
        torch.randn(outs, rank, 1, 1, generator=generator),
    )
    return {
        f"{name}.lora_down.weight": down.to(dtype),
        f"{name}.lora_up.weight": up.to(dtype),
        f"{name}.alpha": torch.tensor(1.0),
    }


def without(state: dict, ending: str) -> dict:
    return {key: value for key, value in state.items() if not key.endswith(ending)}


FLUX_KEY = "lora_unet_double_blocks_0_img_attn_proj"


UP, DOWN = f"{A}.lora_up.weight", f"{A}.lora_down.weight"


TWICE = {key.replace("lora_unet", "lycoris"): value for key, value in whole(A).items()}


HOSTILE = {
    "half a layer": ({**whole(A), **without(whole(B), "up.weight")}, "has no up"),
    "factors that do not fit": ({**whole(A), UP: torch.ones(64, 3)}, "do not belong together"),
    "rank 0": ({**whole(A), UP: torch.ones(64, 0), DOWN: torch.ones(0, 64)}, "rank 1 or more"),
    "NaN": ({**whole(A), UP: torch.full((64, 2), torch.nan)}, "NaN"),
    "infinite alpha": ({**whole(A), f"{A}.alpha": torch.tensor(torch.inf)}, "NaN"),
    "alpha of two numbers": ({**whole(A), f"{A}.alpha": torch.ones(2)}, "one number"),
    "three axes": ({**whole(A), UP: torch.ones(64, 2, 1)}, "neither a matrix"),
    "whole numbers": ({**whole(A), UP: torch.ones(64, 2, dtype=torch.int8)}, "no plain floating-point"),
    "two models": ({**whole(A), **whole(FLUX_KEY)}, "two models at once"),
    "one layer twice": ({**whole(A), **TWICE}, "twice"),
    "half a LoHa": ({f"{A}.hada_w1_a": torch.ones(2, 2)}, "LoHa and has no hada_w1_b"),
    "not ours": (
        {"layer.lora_down.weight": torch.ones(2, 4), "layer.lora_up.weight": torch.ones(4, 2)},
        "no layer of SD",
    ),
    "a length for each input": (
        {**whole(A, ins=32), f"{A}.dora_scale": torch.ones(1, 32, 1, 1)},
        "wd_on_output",
    ),
    "joined rows that are no shares": (whole("lora_unet_double_blocks_0_img_attn_qkv"), "equal shares"),
}


class Code:
    def __reduce__(self):
        return print, ("run",)


# ---------- layers that are no pair of factors

NORM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_norm1"
Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def lokr(name: str, outs: int, ins: int, factor: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    small = {
        "lokr_w1": torch.randn(factor, factor, generator=generator),
        "lokr_w2_a": torch.randn(outs // factor, 2, generator=generator) / 8,
        "lokr_w2_b": torch.randn(2, ins // factor, generator=generator) / 8,
        "alpha": torch.tensor(1.0),
    }
    return {f"{name}.{key}": value for key, value in small.items()}
