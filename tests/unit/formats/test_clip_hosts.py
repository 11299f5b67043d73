"""Text encoders of exports, loaded into the installed transformers' CLIP by diffusers and by PEFT."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from lowrank.cli.export import flat_clip
from lowrank.errors import Refused
from lowrank.formats import verify
from lowrank.formats.delta import Delta
from lowrank.formats.read import Adapter
from lowrank.formats.write import write
from lowrank.formats.writers import Choices
from lowrank.naming.places import LayerPath

UNET = {"flux": "transformer_blocks.0.attn.to_out.0"}
PARTS = {"sd15": ("te1",), "sdxl": ("te1", "te2"), "flux": ("te1",)}


def adapter(family: str, dora: bool = False, second: int = 2) -> Adapter:
    """Layers of CLIP of ranks 4 and `second`, and one of the denoiser."""
    torch.manual_seed(0)

    def layer(outs: int, ins: int, rank: int) -> Delta:
        magnitude = torch.rand(outs) + 1 if dora else None
        return Delta(torch.randn(outs, rank), torch.randn(rank, ins), 0.5, magnitude)

    path = UNET.get(family, "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    layers = {LayerPath("unet", path): layer(32, 32, 4)}
    for part in PARTS[family]:
        layers[LayerPath(part, "text_model.encoder.layers.0.self_attn.q_proj")] = layer(32, 32, 4)
        layers[LayerPath(part, "text_model.encoder.layers.1.mlp.fc1")] = layer(64, 32, second)
    return Adapter("probe", family, layers)


@pytest.mark.parametrize("second", [4, 2], ids=["one-rank", "two-ranks"])
@pytest.mark.parametrize("to", ["diffusers", "peft"])
@pytest.mark.parametrize("family", PARTS)
def test_text_encoders_are_read_back(family, to, second, tmp_path):
    made = adapter(family, second=second)
    target = tmp_path / ("out" if to == "peft" else "out.safetensors")
    choices = Choices(flat_clip=flat_clip())
    write(made, to, target, choices)
    checked = verify.check_export(made, to, target, choices)
    assert sum(result.layers for result in checked) == len(made.layers)
    assert all(result.worst <= 1e-6 and not result.note for result in checked)


def test_header_fits_the_clip_of_every_transformers(tmp_path):
    """transformers 5 has no level `text_model`; PEFT compares these names with the ends of paths."""
    write(adapter("sd15"), "diffusers", tmp_path / "out.safetensors", Choices())
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert header["text_encoder.target_modules"] == [
        "encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1"
    ]  # fmt: skip
    assert header["text_encoder.rank_pattern"] == {"encoder.layers.1.mlp.fc1": 2}


@pytest.mark.parametrize("family", PARTS)
def test_dora_of_text_encoders(family, tmp_path):
    """diffusers 0.42 puts the lengths nowhere; PEFT and LyCORIS read them."""
    made, target = adapter(family, dora=True), tmp_path / "out.safetensors"
    write(made, "diffusers", target, Choices())
    with pytest.raises(
        Refused, match="does not load the lengths of their rows; use --to peft, or --to kohya"
    ):
        verify.check_export(made, "diffusers", target, Choices())
    for to, path in (("kohya", target), ("peft", tmp_path / "folder")):
        choices = Choices(flat_clip=flat_clip())
        write(made, to, path, choices)
        assert all(result.worst <= 1e-6 for result in verify.check_export(made, to, path, choices))


def test_what_diffusers_does_not_read_of_kohya_files_is_a_note(tmp_path, monkeypatch):
    made, target = adapter("sd15"), tmp_path / "out.safetensors"
    write(made, "kohya", target, Choices())
    monkeypatch.setattr(verify, "text_by_diffusers", lambda *_: verify.Checked("x", 2, 0.5))
    checked = verify.check_export(made, "kohya", target, Choices())
    assert [result.note[:9] for result in checked if result.note] == ["diffusers"]
    monkeypatch.setattr(verify, "text_by_diffusers", lambda *_: verify.Checked("x", 2, 1e-7))
    assert not any(result.note for result in verify.check_export(made, "kohya", target, Choices()))
