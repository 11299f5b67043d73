"""What a file says of itself, and what differs between two."""

from __future__ import annotations

import json

import files
import pytest
import torch
from safetensors.torch import load_file, save_file

from lowrank.cli import inspection
from lowrank.errors import Refused
from lowrank.formats import inspect


@pytest.fixture(scope="module")
def native(tmp_path_factory, bases):
    return files.save(tmp_path_factory.mktemp("native"), "flux", "delta_r", bases)


def test_a_native_file_says_everything(native, capsys):
    assert inspection.main([str(native), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["method"] == "delta_r" and told["model"] == "flux"
    assert told["ranks"] == {"4": len(told["layers"])} and told["alphas"] == {"2": len(told["layers"])}
    assert told["command"] == "train.py --network_dim 4" and len(told["basis_hash"]) == 64
    assert told["training"] == {"output_name": "probe", "steps": "7"}
    assert told["options"]["use_zero_init"] is True
    assert told["parts"]["unet"] + told["parts"]["te1"] == len(told["layers"])
    one = next(layer for layer in told["layers"] if layer["path"].endswith("attn.to_q"))
    state = load_file(native)
    name = f"transformer.{one['path']}"
    dW = 0.5 * state[f"{name}.lora.q.weight"] @ state[f"{name}.lora.delta_r.weight"]
    assert one["norm"] == pytest.approx(float(dW.norm()), rel=1e-4)
    assert told["norm"] == pytest.approx(sum(x["norm"] ** 2 for x in told["layers"]) ** 0.5)
    assert inspection.main([str(native)]) == 0
    text = capsys.readouterr().out
    for word in ("delta_r", "flux", "4 ×", "attn.to_q", "train.py --network_dim 4", told["sha256"]):
        assert word in text
    assert inspection.main([str(native), "--layers", "--metadata"]) == 0
    text = capsys.readouterr().out
    assert all(layer["path"] in text for layer in told["layers"]) and "ss_output_name = probe" in text


def test_anyones_file_is_told(tmp_path, capsys):
    """LoHa, LoKr, a model that is not ours, half a layer: facts, not refusals."""
    state = {
        "lora_unet_x.hada_w1_a": torch.ones(2, 2),
        "lora_unet_x.hada_w1_b": torch.ones(2, 2),
        "lora_unet_y.lokr_w1": torch.ones(2, 2),
        "blocks.0.attn.lora_A.weight": torch.ones(2, 4),
        "blocks.0.attn.lora_B.weight": torch.ones(4, 2),
        "blocks.1.attn.lora_A.weight": torch.ones(2, 4),
    }
    save_file(state, tmp_path / "strange.safetensors")
    told = inspect.report(tmp_path / "strange.safetensors")
    assert told["method"] == "lora" and told["model"] is None
    assert told["other_keys"]["count"] == 3 and told["other_keys"]["kinds"] == {"LoHa": 1, "LoKr": 1}
    assert [layer["norm"] is None for layer in told["layers"]] == [False, True]
    assert any("blocks.1.attn" in p and "no up" in p for p in told["problems"])
    assert inspection.main([str(tmp_path / "strange.safetensors")]) == 0
    assert "no layer of SD, SDXL or FLUX" in capsys.readouterr().out
    with pytest.raises(Refused):
        inspection.main([str(tmp_path / "none.safetensors")])


def test_two_files(native, tmp_path, capsys):
    assert inspection.main([str(native), str(native)]) == 0
    assert "the same, byte for byte" in capsys.readouterr().out
    state = load_file(native)
    key = next(key for key in state if key.endswith("delta_r.weight"))
    gone = next(k for k in state if k.endswith("delta_r.weight") and k != key).removesuffix(
        ".lora.delta_r.weight"
    )
    changed = {k: v for k, v in state.items() if not k.startswith(f"{gone}.")}
    changed[key] = 1.5 * state[key]
    save_file(changed, tmp_path / "other.safetensors", {"lowrank.method": "delta_r", "ss_steps": "9"})
    assert inspection.main([str(native), str(tmp_path / "other.safetensors"), "--json"]) == 0
    apart = json.loads(capsys.readouterr().out)[2]["differences"]
    assert apart["facts"]["training.steps"] == ["7", "9"] and not apart["same_bytes"]
    assert len(apart["only_first"]) == 1 and gone.endswith(apart["only_first"][0].partition(".")[2])
    moved = {name: one for name, one in apart["changes"].items() if one["distance"] > 1e-6}
    ((name, one),) = moved.items()
    assert key.removesuffix(".lora.delta_r.weight").endswith(name.partition(".")[2])
    assert one["distance"] == pytest.approx(0.5) and one["cosine"] == pytest.approx(1.0)
    assert inspection.main([str(native), str(tmp_path / "other.safetensors")]) == 0
    assert "only in the first: 1 layers" in capsys.readouterr().out


def test_folder_of_peft_is_inspected(tmp_path, capsys):
    """One folder for each model; alpha is in its configuration, and a key of another kind is listed."""
    up, down = torch.randn(8, 2), torch.randn(2, 8)
    for name, target in (
        ("unet", "mid_block.attentions.0.proj_in"),
        ("text_encoder", "encoder.layers.0.mlp.fc1"),
    ):
        (tmp_path / "a" / name).mkdir(parents=True)
        state = {
            f"base_model.model.{target}.lora_A.weight": down,
            f"base_model.model.{target}.lora_B.weight": up,
        }
        if name == "unet":
            state["base_model.model.conv_in.bias"] = torch.ones(4)
        save_file(state, tmp_path / "a" / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
        (tmp_path / "a" / name / "adapter_config.json").write_text(json.dumps(config))
    assert inspection.main([str(tmp_path / "a"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["alphas"] == {"6": 2} and facts["alpha_places"] == {"config": 2} and facts["tensors"] == 5
    assert facts["parts"] == {"unet": 1, "te1": 1} and len(facts["files"]) == 4
    assert facts["norm"] == pytest.approx(2**0.5 * 3 * float((up @ down).norm()), rel=1e-5)
    assert inspection.main([str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    assert "the two files are the same" in text
    assert text.splitlines()[-1].endswith(
        "4 of 5 tensors are used; left out: bias × 1, for example unet.conv_in.bias"
    )
    with pytest.raises(Refused, match=r"has no adapter_config\.json"):
        inspection.main([str(tmp_path)])
