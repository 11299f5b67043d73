"""T-LoRA files of LyCORIS and of the authors as native ones: the same at every timestep, or one sentence."""

from __future__ import annotations

import json

import files
import lycoris
import pytest
import torch
from lycoris.modules.tlora import compute_timestep_mask, set_timestep_mask
from lycoris.wrapper import LycorisNetwork
from safetensors.torch import load_file, save_file
from tlora_reference import AUTHORS, TIMES, own_presets

from lowrank.cli import importing
from lowrank.combine.mixture import Entry, read_mixture
from lowrank.errors import Refused
from lowrank.formats.base_checkpoint import BaseCheckpoint
from lowrank.formats.read import read_adapter
from lowrank.naming.places import places
from lowrank.tensors import read_tensors, write_tensors
from lowrank.train.network_module import find_module

__all__ = ["own_presets"]  # a fixture
ATTENTION = {
    "sdxl": r"^mid_block\.attentions\.0\.transformer_blocks\.0\.attn[12]\.to_",
    "flux": r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj)$",
}
FOLDER = {"sdxl": "unet", "flux": "transformer"}


def masked(family, model, network) -> list[torch.Tensor]:
    """The model's answers with a network's ranks of TIMES open."""
    told = []
    for t in TIMES:
        with network.denoise_at(torch.tensor([float(t)])):
            told.append(files.answer(family, model))
    return told


def native(path, family, model) -> list[torch.Tensor]:
    """The same of a native file, loaded without another word about it."""
    network, _ = find_module("tlora").create_network_from_weights(1.0, str(path), None, [], model)
    network.apply_to([], model, False, True)
    assert not any(network.load_weights(str(path)))
    told = masked(family, model, network)
    network.restore()
    return told


def same(got, want) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(want[0], want[-1], atol=1e-3)  # which a dead mask would not see


def authors_state(network) -> dict[str, torch.Tensor]:
    """The network's tensors as the authors' processors name them; they have no alpha, which is the rank."""
    found = {}
    for layer in network.layers():
        parent, _, child = network.targets[layer.name].path.rpartition("attn")
        digit, _, name = child.partition(".")
        for role, value in layer.tensors().items():
            end = {"up": "up.weight", "down": "down.weight"}.get(role)
            end = end or (role if "lambda" in role else f"{role}.weight")
            if role != "alpha":
                value = value.reshape(1, -1) if "lambda" in role else value
                found[f"{parent}attn{digit}.processor.{AUTHORS[name]}_lora.{end}"] = value.clone()
    return found


def _apart(said: str) -> float:
    return float(said.partition("at most ")[2].partition(" ")[0])


@pytest.mark.parametrize("orthogonal", ["True", "False"])
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_the_authors_files_become_native(family, orthogonal, tmp_path, capsys):
    model, start = (
        files.denoiser(family),
        {"orthogonal": orthogonal, "tlora_min_rank": "3", "tlora_alpha": "2"},
    )
    network = files.network(family, "tlora", model, target=ATTENTION[family], **start)
    for layer in network.layers():
        layer.scale = 1.0  # files.network asks for half of it
    state = authors_state(network)
    if family == "flux":  # projections that no single block runs
        dead = "single_transformer_blocks.0.attn.processor.to_k_proj_lora"
        state |= {key.replace(key.partition("_lora")[0], dead.removesuffix("_lora")): torch.ones_like(value)
                  for key, value in state.items() if "transformer_blocks.0.attn.processor.to_q_lora" in key
                  and not key.startswith("single")}  # fmt: skip
    want = masked(family, model, network)
    network.restore()
    theirs, ours = tmp_path / "lora.pt", tmp_path / "native.safetensors"
    torch.save(state, theirs)
    line = [str(theirs), str(ours), "--base", family]
    with pytest.raises(Refused, match="schedule"):
        importing.main([*line, "--method", "tlora"])
    with pytest.raises(Refused, match="give --tlora_min_rank too"):
        importing.main([*line, "--tlora_alpha", "2"])
    assert importing.main([*line, "--tlora_min_rank", "3", "--tlora_alpha", "2"]) == 0
    said = capsys.readouterr().out
    assert f"layers of {family} as tlora" in said and _apart(said) < 1e-12
    same(native(ours, family, model), want)
    assert read_tensors(ours)[1]["tlora_max_rank"] == "4"


@pytest.fixture
def lycoris_file(tmp_path, own_presets):
    """(base folder, LyCORIS' file, what the model answers with it at TIMES) of a family, R_min 2, α 2."""

    def make(family: str, rank: int = 8):
        model = files.denoiser(family)
        model.save_pretrained(tmp_path / "base" / FOLDER[family])
        kind = "FluxAttention" if family == "flux" else "Attention"
        LycorisNetwork.apply_preset({"target_module": [kind]})
        network = lycoris.create_lycoris(model, 1.0, rank, rank / 2, algo="tlora", train_norm=False)
        network.apply_to()
        noise = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for one in network.parameters():
                one.add_(torch.randn(one.shape, generator=noise) * 0.1)
        want = []
        for t in TIMES:
            set_timestep_mask(compute_timestep_mask(t, 1000, rank, 2, 2.0))
            want.append(files.answer(family, model))
        lycoris.clear_timestep_mask()
        path = tmp_path / "theirs" / "pytorch_lora_weights.safetensors"
        path.parent.mkdir()
        network.save_weights(str(path), torch.float32, {})
        network.restore()
        config = {"algo": "tlora", "linear_dim": rank, "tlora_min_rank": 2, "tlora_alpha": 2.0}
        (path.parent / "lycoris_config.json").write_text(json.dumps(config))
        return tmp_path / "base", path, want

    return make


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_lycoris_files_become_native(family, lycoris_file, tmp_path, capsys):
    base, theirs, want = lycoris_file(family)
    ours = tmp_path / "native.safetensors"
    line = [str(theirs), str(ours), "--base", family]
    with pytest.raises(Refused, match=r"has no start for .* with --model"):
        importing.main(line)
    assert not ours.exists()
    assert importing.main([*line, "--model", str(base)]) == 0
    assert _apart(capsys.readouterr().out) <= 1e-5
    model = files.denoiser(family)
    same(native(ours, family, model), want)
    facts = read_tensors(ours)[1]
    assert (facts["tlora_min_rank"], facts["tlora_alpha"]) == ("2", "2")
    options = json.loads(facts["lowrank.options"])
    assert (options["sig_type"], options["use_data_init"]) == ("principal", True)
    # in a mixture with the base at hand, also baked; by itself it says what to do
    weights = BaseCheckpoint(base)
    stored = lambda module: weights.weight(places(module)[0][0])  # noqa: E731
    for at, index in ((None, 2), (250, 1)):
        attached = read_mixture([Entry(theirs)], at, stored).attach(model)
        attached.set([1.0])
        got = files.answer(family, model) if family == "sdxl" or at else None  # at t = 500 there, 400 on FLUX
        if got is not None:
            torch.testing.assert_close(got, want[index], rtol=1e-5, atol=1e-5)
        attached.restore()
    with pytest.raises(Refused, match=r"import_lora\.py --model BASE"):
        read_mixture([Entry(theirs)])


def test_ranks_that_lycoris_pads_are_read(lycoris_file, tmp_path):
    """Rank 40 on layers of 32: rows of zeros there, in the start as in what was trained from it."""
    base, theirs, want = lycoris_file("flux", 40)
    ours = tmp_path / "native.safetensors"
    assert importing.main([str(theirs), str(ours), "--model", str(base)]) == 0
    same(native(ours, "flux", files.denoiser("flux")), want)


def test_a_file_without_down_factors_is_refused(tmp_path):
    """Non-strict reading has no complete layer of such a file, and so no rank."""
    path = tmp_path / "x.safetensors"
    save_file({"lora_unet_mid_block_attentions_0_proj_in.p_layer.weight": torch.ones(64, 2)}, path)
    for strict in (True, False):
        with pytest.raises(Refused):
            read_adapter(path, strict=strict)


def test_files_that_cannot_be_are_refused(lycoris_file, tmp_path):
    base, theirs, _ = lycoris_file("flux")
    state, target = load_file(theirs), str(tmp_path / "out.safetensors")
    name = "lycoris_transformer_blocks_0_attn_to_q"
    other = tmp_path / "other.safetensors"

    def refused(state, words, *more, metadata=None):
        write_tensors(other, state, metadata or {})
        with pytest.raises(Refused, match=words):
            importing.main([str(other), target, "--model", str(base), *more])

    wide = state | {f"{name}.q_layer.weight": torch.ones(8, 48)}
    refused(wide, "32×48 in .* and 32×32 in the model")
    few = state | {key: state[key][:4] for key in state if key.startswith(name) and "q_layer" in key}
    few |= {f"{name}.p_layer.weight": torch.ones(32, 4), f"{name}.lambda_layer": torch.ones(1, 4)}
    refused(few, "layers of rank 4, 8")
    refused(state | {f"{name}.dora_scale": torch.ones(32, 1)}, "of two methods")
    refused({k: v for k, v in state.items() if k != f"{name}.lambda_layer"}, "not whole")
    gone = {k.replace("to_q", "to_z"): v for k, v in state.items() if k.startswith(name)}
    refused(state | gone, "is not in .*; the adapter is for another base")
    refused(state, "lycoris_config of .* is not JSON", metadata={"lycoris_config": "{"})
    pairs = {"transformer.proj_out.lora_A.weight": torch.ones(4, 32)}
    pairs["transformer.proj_out.lora_B.weight"] = torch.ones(16, 4)
    refused(pairs, "ranks open in pairs", metadata={"tlora_T": "1000", "tlora_group": "2"})
    joined = {
        k.replace("transformer.proj_out", "lora_unet_double_blocks_0_img_attn_qkv"): v
        for k, v in pairs.items()
    }
    joined = {k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v for k, v in joined.items()}
    joined["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"] = torch.ones(96, 4)
    refused(joined, "several layers of FLUX in one", "--method", "tlora", "--tlora_min_rank", "2")
    save_file(pairs, other)  # without a schedule it is a plain LoRA, as before
    assert (
        importing.main([str(other), target]) == 0
        and read_adapter(target).metadata["lowrank.method"] == "lora"
    )
