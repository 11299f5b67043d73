"""inference_merge.py and --network_weights on files that are damaged or of something else: one sentence."""

from __future__ import annotations

import json

import files
import pytest
import torch
from adapter_files import HOSTILE, UP, A, B, Code, whole, without
from safetensors.torch import save_file

from lowrank.cli import export, importing, inspection, run
from lowrank.cli.merge import main as merge
from lowrank.errors import Refused
from lowrank.train.network_module import create, find_module
from networks import dora, lora, qrlora, universal_lora

PROJ = r"mid_block\.attentions\.0\.proj"


@pytest.fixture
def line(tiny_sd, tmp_path):
    """The command line that draws one picture with a file twice, or with two."""

    def words(path, other=None) -> list[str]:
        given = {
            **{"model_path": tiny_sd, "style_lora_path": path, "prompt": "a cat"},
            "content_lora_path": other or path,
            **{"num_inference_steps": 1, "style_weights": "0.5", "content_weights": "0.5", "height": 64},
            **{"width": 64, "dtype": "fp32", "output_dir": tmp_path / "out"},
        }
        return [w for key, value in given.items() for w in (f"--{key}", str(value))]

    return words


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.slow
def test_merge_refuses_hostile_file(what, line, tmp_path):
    save_file(HOSTILE[what][0], tmp_path / "in.safetensors")
    with pytest.raises(Refused) as told:
        merge(line(tmp_path / "in.safetensors"))
    assert not list((tmp_path / "out").glob("*.png")) and "\n" not in str(told.value)


NOT_FILES = {
    "nothing": b"",
    "half a file": None,
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(64),
    "a header that lies": (2**40).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("what", NOT_FILES)
def test_non_safetensors_file_is_refused(what, line, tmp_path):
    path = tmp_path / "in.safetensors"
    save_file(whole(A), path)
    data = NOT_FILES[what]
    path.write_bytes(path.read_bytes()[:-100] if data is None else data)
    with pytest.raises(Refused, match="is not a whole safetensors file"):
        merge(line(path))


def test_pickle_is_not_executed(line, tmp_path, capsys, monkeypatch):
    path = tmp_path / "in.pt"
    torch.save({**whole(A), "x": Code()}, path)
    monkeypatch.setattr("sys.argv", ["inference_merge.py", *line(path)])
    with pytest.raises(SystemExit) as left:
        run.run("merge")
    told = capsys.readouterr()
    assert left.value.code == 1 and "code in it is not run" in told.err and "run" not in told.out.split()
    assert "Traceback" not in told.err


DAMAGED = {
    "options that are no JSON": ({"lowrank.options": "{"}, "damaged metadata"),
    "options that are a list": ({"lowrank.options": "[1]"}, "damaged metadata"),
    "options a mile deep": ({"lowrank.options": "[" * 100_000}, "damaged metadata"),
    "an option of another kind": ({"lowrank.options": '{"tlora_alpha": [1]}'}, "is not a finite number"),
    "a rank that is no number": ({"tlora_max_rank": "-1e9"}, "tlora_max_rank"),
    "a module that is no method": ({"lowrank.method": "../../evil"}, "evil"),
    "a start that is none": ({"lowrank.options": '{"sig_type": "best"}'}, "sig_type"),
}
ORTHOGONAL = {
    f"{A}.{role}": torch.ones(*shape)
    for role, shape in {
        **{"q_layer.weight": (2, 64), "p_layer.weight": (64, 2), "lambda_layer": (2,)},
        **{"base_q": (2, 64), "base_p": (64, 2), "base_lambda": (2,)},
    }.items()
}


@pytest.mark.parametrize("what", DAMAGED)
@pytest.mark.slow
def test_merge_with_damaged_metadata_is_refused(what, line, tmp_path):
    """In a network that is made from the file, and in a picture where that network draws it."""
    told, words = DAMAGED[what]
    path = tmp_path / "in.safetensors"
    save_file(ORTHOGONAL, path, {"lowrank.method": "tlora", "tlora_T": "1000"} | told)
    with pytest.raises(Refused, match=words):
        find_module("tlora").create_network_from_weights(
            1.0, str(path), None, [], files.denoiser("sd15"), target=PROJ
        )
    if "lowrank.method" in told or "damaged" in words:
        other = tmp_path / "other.safetensors"
        save_file(whole(A), other)
        lengths = {**whole(A), f"{A}.dora_scale": torch.ones(64, 1, 1, 1)}
        save_file(lengths, path, {"lowrank.method": "dora"} | told)
        with pytest.raises(Refused, match=words):
            merge(line(path, other))


UNIVERSAL = ("universal_lora", "universal_lalora", "network_null_lalora_plus_Effi_ABM")


@pytest.mark.parametrize("method", UNIVERSAL)
def test_path_in_metadata_is_not_opened(method, line, tmp_path, monkeypatch):
    """A stranger's file names a file; where the user names one instead, that is taken."""
    path = tmp_path / "in.safetensors"
    pair = {f"{A}.basis_up": torch.eye(64, 2), f"{A}.core": torch.eye(2), f"{A}.basis_down": torch.eye(2, 64)}
    told = {"lowrank.method": method, "lowrank.options": json.dumps({"basis_path": "/etc/hostname"})}
    save_file(pair, path, told)
    monkeypatch.setattr(universal_lora, "read_basis", lambda path: pytest.fail(f"{path} is opened"))
    create = find_module(method).create_network_from_weights
    for main, words in (
        (merge, line(path)),
        (export.main, [str(path), str(tmp_path / "out.safetensors")]),
        (importing.main, [str(path), str(tmp_path / "out.safetensors")]),
    ):
        with pytest.raises(Refused, match="paths from metadata are not opened"):
            main(words)
    with pytest.raises(Refused, match="pass basis_path=… in --network_args"):
        create(1.0, str(path), None, [], files.denoiser("sd15"), target=PROJ)
    assert inspection.main([str(path)]) == 0 and not (tmp_path / "out.safetensors").exists()
    if method == "universal_lora":
        unet = files.denoiser("sd15")
        assert create(1.0, str(path), None, [], unet, target=PROJ, basis_path="auto:random")[0].layers()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
@pytest.mark.slow
def test_merge_of_mixed_precisions_and_zero_alpha(dtype, line, tiny_sd, tmp_path, caplog):
    width = json.loads((tiny_sd / "unet" / "config.json").read_text())["block_out_channels"][-1]
    state = {**whole(A, 2, width, width, dtype), **whole(B, 2, width, width), f"{B}.alpha": torch.tensor(0.0)}
    save_file(state, tmp_path / "in.safetensors")
    assert merge(line(tmp_path / "in.safetensors")) == 0
    assert (tmp_path / "out" / "inference_s0.50_c0.50.png").is_file()
    assert f"alpha is 0 in 1 of 2 layers, for example {B}" in caplog.text


# ---------- --network_weights


def loaded(module, path, dim_from_weights=False):
    return create(
        module, files.denoiser("sd15"), (), rank=2, alpha=1.0, dropout=None, arguments={"target": PROJ},
        weights=str(path), dim_from_weights=dim_from_weights,
    )  # fmt: skip


@pytest.mark.parametrize("dim_from_weights", [False, True])
def test_incomplete_layer_is_named(dim_from_weights, tmp_path):
    path = tmp_path / "in.safetensors"
    for module, gone, words in (
        (lora, "lora_up.weight", f"{B} in .* has no up, only alpha, down"),
        (lora, "lora_down.weight", f"{B} in .* has no down"),
        (dora, "lora_up.weight", "has no up"),  # a network of the file's shapes began with what memory held
    ):
        save_file({**whole(A), **without(whole(B), gone)}, path)
        with pytest.raises(Refused, match=words):
            loaded(module, path, dim_from_weights)
    save_file({**whole(A), f"{B}.alpha": torch.tensor(1.0)}, path)
    with pytest.raises(Refused, match=f"{B} in .* has no down, up, only alpha"):
        loaded(lora, path, dim_from_weights)


@pytest.mark.parametrize("dim_from_weights", [False, True])
def test_plain_lora_as_qrlora_is_refused(dim_from_weights, cache, tmp_path, caplog):
    path = tmp_path / "in.safetensors"
    arguments = {"target": PROJ, "basis_cache": str(cache)}

    def into_qr():
        return create(
            qrlora, files.denoiser("sd15"), (), rank=2, alpha=2.0, dropout=None, arguments=arguments,
            weights=str(path), dim_from_weights=dim_from_weights,
        )  # fmt: skip

    save_file({**whole(A), **whole(B)}, path)
    with pytest.raises(Refused, match=r"is a plain LoRA without .* use --network_module lora"):
        into_qr()
    own = create(
        qrlora, files.denoiser("sd15"), (), rank=2, alpha=2.0, dropout=None, arguments=arguments,
        weights=None, dim_from_weights=False,
    )  # fmt: skip
    own.leave_out = frozenset({"q", "base_r"})
    own.save_weights(str(path), None, {})
    into_qr()  # which says that it is one
    official = {
        "unet.mid_block.attentions.0.proj_in.lora.down.weight": whole(A)[f"{A}.lora_down.weight"],
        "unet.mid_block.attentions.0.proj_in.lora.up.weight": whole(A)[UP],
    }
    save_file(official | {k.replace("_in", "_out"): v.clone() for k, v in official.items()}, path)
    into_qr()
    assert "is read as an official QR-LoRA file" in caplog.text
