"""An adapter from two checkpoints: what comes back, what is lost, and what is left out."""

from __future__ import annotations

import pytest
import torch
from adapter_files import A
from safetensors.torch import load_file, save_file

from lowrank.cli import export, extraction
from lowrank.errors import Refused
from lowrank.formats.base_checkpoint import BaseCheckpoint
from lowrank.formats.delta import distance
from lowrank.formats.read import read_adapter
from lowrank.naming.places import places

Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_mid_block_resnets_0_conv1"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"


@pytest.fixture(scope="module")
def adapter(tiny_sd, tmp_path_factory):
    """A LoRA of rank 3 on a linear layer, two convolutions and CLIP, and changes of a norm and a bias."""
    base, state = BaseCheckpoint(tiny_sd), {}
    for name in (Q, A, CONV, TEXT):
        outs, ins, *kernel = base.shape(places(name)[0][0])
        torch.manual_seed(len(name))
        state |= {f"{name}.lora_down.weight": torch.randn(3, ins, *kernel)}
        state |= {
            f"{name}.lora_up.weight": torch.randn(outs, 3, *(1 for _ in kernel)),
            f"{name}.alpha": torch.tensor(3.0),
        }
    norm = Q.replace("attn1_to_q", "norm1")
    width = base.shape(places(norm)[0][0])[0]
    state |= {f"{norm}.w_norm": torch.ones(width), f"{norm}.b_norm": torch.ones(width)}
    path = tmp_path_factory.mktemp("extract") / "lora.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="module", params=["folder", "single"])
def checkpoints(request, adapter, tiny_sd, tmp_path_factory):
    """The base, and the base with the adapter merged."""
    base = tiny_sd if request.param == "folder" else tiny_sd / "single" / "model.safetensors"
    tuned = tmp_path_factory.mktemp("tuned") / ("model" if request.param == "folder" else "model.safetensors")
    assert export.main([str(adapter), str(tuned), "--to", "merged", "--model", str(base)]) == 0
    return base, tuned


def test_a_merged_lora_comes_back(checkpoints, adapter, tmp_path, capsys):
    base, tuned = checkpoints
    target = tmp_path / "back.safetensors"
    assert extraction.main([str(base), str(tuned), str(target), "--rank", "auto:sv_fro=0.9999,max=8"]) == 0
    printed = capsys.readouterr().out
    used = f"{tuned}: 4 of 6 differing weights and biases are used; left out: biases × 1, norm layers × 1"
    assert printed.splitlines()[-1] == used and "read back by" in printed
    wanted, found = (read_adapter(path, strict=False).layers for path in (adapter, target))
    assert found.keys() == wanted.keys()
    for place, layer in wanted.items():
        assert found[place].rank == 3 and found[place].kernel == layer.kernel
        assert distance(layer, found[place]) <= 1e-4 * layer.norm()  # W is fp32, and ΔW a difference of two
    facts = read_adapter(target).metadata
    assert facts["lowrank.base_model"] == base.name and "extract_lora" in facts["lowrank.command"]


def test_a_smaller_rank_states_its_loss(checkpoints, adapter, tmp_path, capsys):
    base, tuned = checkpoints
    target = tmp_path / "small.safetensors"
    call = [str(base), str(tuned), str(target), "--rank", "1", "--parts", "text", "--dtype", "fp16"]
    assert extraction.main(call) == 0
    layer = read_adapter(adapter, foreign=True).layers[places(TEXT)[0][0]]
    S = torch.linalg.svdvals(layer.delta().double())
    assert f"{float(S[1:].norm() / S.norm()):.2%} of ‖ΔW‖ is lost" in capsys.readouterr().out
    state = load_file(target)
    assert {key.partition(".")[0] for key in state} == {TEXT}
    assert state[f"{TEXT}.lora_down.weight"].dtype == torch.float16


def test_what_cannot_be_extracted(checkpoints, tiny_sd, tiny_sdxl, tmp_path):
    base, tuned = checkpoints
    target = tmp_path / "out.safetensors"
    with pytest.raises(Refused, match="have no layer that differs"):
        extraction.main([str(base), str(base), str(target)])
    with pytest.raises(Refused, match="give two checkpoints of one model"):
        extraction.main([str(tiny_sd), str(tiny_sdxl), str(target)])
    with pytest.raises(Refused, match="no layer that differs by more than 1000"):
        extraction.main([str(base), str(tuned), str(target), "--min_change", "1000"])
    with pytest.raises(Refused, match=r"is no \.safetensors name"):
        extraction.main([str(base), str(tuned), str(tmp_path / "folder")])
    assert not target.exists()


def test_nothing_stays_where_an_extraction_fails(checkpoints, tmp_path, monkeypatch):
    """A file that --strict refuses, and one that is not read back right; an older file is kept."""
    base, tuned = checkpoints
    call = [str(base), str(tuned), str(tmp_path / "out.safetensors"), "--rank", "4"]
    with pytest.raises(
        Refused, match=r"--strict, and .* in what a LoRA has not: biases × 1, norm layers × 1"
    ):
        extraction.main([*call, "--strict"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.safetensors").write_bytes(b"older")

    def fail(*_):
        raise Refused("it differs; use another format")

    monkeypatch.setattr("lowrank.formats.verify.check_export", fail)
    with pytest.raises(Refused, match="it differs"):
        extraction.main(call)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"older"]
