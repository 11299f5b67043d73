"""LyCORIS' T-LoRA and the authors' names as references."""

from __future__ import annotations

import sys

import lycoris
import pytest
import torch
from lycoris.modules.tlora import compute_timestep_mask, set_timestep_mask
from lycoris.wrapper import LycorisNetwork

from lowrank.cli.export import main as tool
from lowrank.errors import Refused

TIMES = (0, 250, 500, 750, 999)


LIKE_LYCORIS = {"sig_type": "principal", "use_data_init": "True", "tlora_min_rank": "1"}


def out(model, times, grad=True):
    """The tiny FLUX' output for samples at these timesteps, each with inputs of its own."""
    B = len(times)
    drawn = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(4, 6, 16, generator=drawn)[:B],
        "encoder_hidden_states": torch.randn(4, 5, 24, generator=drawn)[:B],
        "pooled_projections": torch.randn(4, 20, generator=drawn)[:B],
        "timestep": torch.tensor([float(t) for t in times]) / 1000,
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.ones(B),
    }
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
        inputs[name] = inputs[name].to(model.dtype)
    with torch.set_grad_enabled(grad):
        return model(**inputs, return_dict=False)[0]


def export(arguments: list[str]) -> int:
    """The export tool's exit code, its one sentence on stderr."""
    try:
        return tool(arguments)
    except Refused as refused:
        print(refused, file=sys.stderr)
        return 1


@pytest.fixture
def own_presets(monkeypatch):
    """LyCORIS keeps its preset on the class; it is put back. It collects garbage for each layer; not here."""
    monkeypatch.setattr("lycoris.modules.tlora.gc.collect", lambda: 0)
    before = {k: v for k, v in vars(LycorisNetwork).items() if k.isupper()}
    yield
    for key, value in before.items():
        setattr(LycorisNetwork, key, value)
    lycoris.clear_timestep_mask()


def at_each(model, rank, least=1, alpha=1.0):
    """A LyCORIS network's outputs at TIMES under its own masks."""
    outputs = []
    for t in TIMES:
        set_timestep_mask(compute_timestep_mask(t, 1000, rank, least, alpha))
        outputs.append(out(model, [t, t], False))
    lycoris.clear_timestep_mask()
    return outputs


AUTHORS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"} | {
    f"add_{one}_proj": f"to_{one}_proj" for one in "qkv"
}
