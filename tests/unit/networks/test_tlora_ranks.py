"""T-LoRA where a layer is smaller than the rank: it has fewer ranks, open in proportion, and none is dead."""

from __future__ import annotations

import re

import pytest
import torch
from flux_adapters import flux, made
from tlora_reference import LIKE_LYCORIS, TIMES, at_each, export, out, own_presets
from toys import shake

from lowrank.adapter_file import read_adapter_file
from lowrank.adapters.gate import Schedule
from lowrank.combine.mixture import read_mixture
from lowrank.combine.pipeline import timestep_ranks
from lowrank.errors import Refused
from lowrank.formats.tlora import schedule_of
from lowrank.tensors import read_tensors
from lowrank.train.network_module import find_module

__all__ = ["flux", "own_presets"]  # fixtures
R, LEAST = 24, 12
# the tiny FLUX' layers that have fewer ranks than that: min(out, in), and their share ⌊12·r/24⌋ of R_min
SOME = r"^x_embedder|^proj_out|text_embedder\.linear_1|^transformer_blocks.*to_q$|proj_mlp"
SMALL = {"x_embedder": (16, 8), "proj_out": (16, 8), "text_embedder.linear_1": (20, 10)}


def clamped(model, rank=R, **arguments):
    return made("tlora", model, None, rank, **{"target": SOME, "tlora_min_rank": str(LEAST)} | arguments)


def small(net):
    """The layers that were lowered, by the end of their path."""
    paths = {name: target.path for name, target in net.targets.items()}
    return {
        end: layer
        for layer in net.layers()
        for end in SMALL
        if paths[layer.name].endswith(end) and "single" not in paths[layer.name]
    }


def test_schedule_share():
    whole = Schedule(12, 1.0).for_rank(24)
    assert [whole.least(rank) for rank in (24, 16, 20, 3, 1, 48)] == [12, 8, 10, 1, 1, 24]
    assert (
        Schedule().for_rank(7).least(7) == 3 and Schedule(12).least(16) == 12
    )  # of an older file's layers: 12
    opened = whole.open(torch.tensor([float(t) for t in TIMES]), 16)
    assert opened.tolist() == [8 * (1000 - t) // 1000 + 8 for t in TIMES]
    pairs = Schedule(12, 1.0, group=2, max_rank=24)
    assert torch.equal(pairs.open(torch.tensor(TIMES), 32), 2 * opened)
    with pytest.raises(Refused, match="tlora_min_rank 25 is not between 1 and rank 24"):
        Schedule(25).for_rank(24)


@pytest.mark.parametrize("orthogonal", ["True", "False"])
def test_ranks_of_small_layers(orthogonal, flux, caplog):
    base = out(flux, [500, 999], False)
    net = clamped(flux, orthogonal=orthogonal, alpha=12.0)
    assert "rank 24 exceeds min(out, in) of" in caplog.text
    assert caplog.text.count("open ranks in proportion") == 1
    assert torch.equal(out(flux, [500, 999], False), base)
    assert {end: layer.rank for end, layer in small(net).items()} == {k: r for k, (r, _) in SMALL.items()}
    assert {layer.scale for layer in net.layers()} == {0.5}  # of all layers, as asked: alpha 12 of rank 24
    shake(net)
    for t in (0.0, 400.0, 999.0):
        net.zero_grad()
        out(flux, [t, t]).square().sum().backward()
        for end, layer in small(net).items():
            rank, least = SMALL[end]
            opened = int((1000 - t) * (rank - least) // 1000) + least
            rows = layer.roles()["q_layer" if orthogonal == "True" else "down"].grad.abs().sum(1)
            assert bool((rows[:opened] > 0).all()) and not rows[opened:].any(), (end, t)
    if orthogonal == "True":
        for layer in small(clamped_again(net, flux)).values():
            frame = layer.q_layer @ layer.q_layer.T  # of full rank: LyCORIS pads with rows that stay zero
            torch.testing.assert_close(frame, torch.eye(layer.rank), rtol=0, atol=1e-5)


def clamped_again(net, model):
    net.restore()
    return clamped(model)


@pytest.mark.parametrize("orthogonal", ["True", "False"])
def test_readers_agree_on_ranks(orthogonal, flux, tmp_path, capsys):
    source, plain, baked = (tmp_path / f"{name}.safetensors" for name in "abc")
    net = shake(clamped(flux, orthogonal=orthogonal, tlora_alpha="2"), 0.05)
    net.save_weights(str(source), None, {})
    want = [out(flux, [t, t], False) for t in TIMES]
    net.restore()
    told = read_tensors(source)[1]
    assert (told["tlora_max_rank"], told["tlora_min_rank"]) == ("24", "12")
    again, held = find_module("tlora").create_network_from_weights(1.0, str(source), None, [], flux)
    again.apply_to([], flux, False, True)
    again.load_state_dict(held, False)
    assert all(torch.equal(out(flux, [t, t], False), one) for t, one in zip(TIMES, want, strict=True))
    again.restore()
    assert export([str(source), str(plain), "--to", "diffusers"]) == 0
    for file in (source, plain):
        with timestep_ranks(flux, file):
            for t, one in zip(TIMES, want, strict=True):
                torch.testing.assert_close(out(flux, [t, t], False), one, rtol=1e-5, atol=1e-5)
        assert export([str(file), str(baked), "--to", "diffusers", "--at-timestep", "750"]) == 0
        attached = read_mixture([baked]).attach(flux)
        attached.set([1.0])
        torch.testing.assert_close(out(flux, [750, 750], False), want[3], rtol=1e-5, atol=1e-5)
        attached.restore()
    assert export([str(source), str(tmp_path / "l.safetensors"), "--to", "lycoris-tlora"]) == 1
    assert re.search("several ranks|no orthogonal", capsys.readouterr().err)
    with pytest.raises(Refused, match=r"max_rank 16 is not that of .*, which has rank 24"):
        schedule_of(source, read_adapter_file(source).layers, told, {"max_rank": 16})


def test_lycoris_ranks_with_equal_layers(flux, tmp_path, own_presets):
    """Rank 40 on layers of 32: a file of rank 32 whose schedule LyCORIS' mask of 32 ranks can say."""
    import json

    import lycoris

    source, target = tmp_path / "a.safetensors", tmp_path / "out" / "b.safetensors"
    target.parent.mkdir()
    start = {**LIKE_LYCORIS, "tlora_min_rank": "10", "target": r"attn\.to_[qkv]$"}
    net = shake(clamped(flux, 40, **start), 0.05)
    net.save_weights(str(source), None, {})
    want = [out(flux, [t, t], False) for t in TIMES]
    net.restore()
    assert export([str(source), str(target), "--to", "lycoris-tlora"]) == 0
    config = json.loads((target.parent / "lycoris_config.json").read_text())
    assert (config["linear_dim"], config["tlora_min_rank"]) == (32, 8)
    theirs, _ = lycoris.create_lycoris_from_weights(1.0, str(target), flux)
    theirs.apply_to()
    for one, other in zip(at_each(flux, 32, 8), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    theirs.restore()
    with timestep_ranks(flux, target):  # R 40 and R_min 10 in its metadata, 32 and 8 beside it: the same
        for t, one in zip(TIMES, want, strict=True):
            torch.testing.assert_close(out(flux, [t, t], False), one, rtol=1e-5, atol=1e-5)


def test_plain_lora_is_refused(flux):
    with pytest.raises(Refused, match="rank 24 does not fit"):
        made("lora", flux, None, R, target="x_embedder")


DAMAGED = {
    "a text": ({"tlora_T": "1000", "tlora_alpha": "1", "tlora_min_rank": "few"}, "tlora_min_rank 'few'"),
    "a horizon of nothing": ({"tlora_T": "0", "tlora_alpha": "1"}, "tlora_T '0', which is no number above 0"),
    "NaN": ({"tlora_T": "1000", "tlora_alpha": "nan"}, "tlora_alpha 'nan'"),
    "a group of nothing": ({"tlora_group": "0"}, "tlora_group '0'"),
    "R_min above R": (
        {"tlora_T": "1000", "tlora_min_rank": "9", "tlora_max_rank": "8"},
        "tlora_min_rank 9 is not between 1 and rank 8",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_schedule_error(what, tmp_path):
    metadata, words = DAMAGED[what]
    pair = {"transformer.x_embedder": {"down": torch.ones(8, 16), "up": torch.ones(32, 8)}}
    with pytest.raises(Refused, match=words):
        schedule_of(tmp_path / "a.safetensors", pair, metadata)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        (
            '{"algo": "tlora", "linear_dim": 64}',
            "is for rank 64 and .* has rank 8; put the adapter's own configuration beside it",
        ),
        ('{"algo": "tlora", "tlora_min_rank": []}', r"tlora_min_rank \[\]"),
    ],
)
def test_sidecar_of_another_file_error(text, words, tmp_path):
    (tmp_path / "lycoris_config.json").write_text(text)
    layer = {"x": {"q_layer": torch.ones(8, 16), "p_layer": torch.ones(32, 8), "lambda_layer": torch.ones(8)}}
    with pytest.raises(Refused, match=words):
        schedule_of(tmp_path / "a.safetensors", layer, {})
