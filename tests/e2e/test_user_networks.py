"""The user's command for everything at once, on the tiny SDXL and SD 1.5: runs, resumes, reloads, draws."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from flux_run import same
from safetensors.torch import load_file, save_file
from sd_run import arguments, folders, metadata, rows  # noqa: F401 (fixtures)

from lowrank.adapters.targets import find
from lowrank.cli.context import main as context
from lowrank.cli.sd_train import main as sd
from lowrank.cli.sd_train import main_sdxl as sdxl
from lowrank.errors import Refused
from tools import extract_universal_basis

pytestmark = pytest.mark.slow  # whole runs

MODULE = "network_null_lalora_plus_Effi_ABM"
# user document 3, without what a test has of its own: paths, epochs, and 32 directions, too many here
COMMAND = ("--network_module", MODULE, "--network_dim", "8", "--network_alpha", "4")
COMMAND += ("--abm_enabled", "--abm_steps", "2", "--abm_lr", "1e-4", "--abm_margin", "0.5")
COMMAND += ("--learning_rate", "1e-4", "--text_encoder_lr", "5e-5", "--unet_lr", "1e-4")
COMMAND += ("--save_model_as", "safetensors", "--save_every_n_epochs", "1")
EVERYTHING = ("enable_effilora=True", "num_experts=4", "use_dora=True", "loraplus_lr_ratio=16.0")


@pytest.fixture(scope="module")
def basis(tiny_sdxl, tmp_path_factory):
    """A basis of three random LoRAs of the tiny SDXL's attention, through the tool."""
    folder = tmp_path_factory.mktemp("collection")
    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet")
    layers = [target for target in find("unet", unet) if ".attn" in target.path]
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        state = {}
        for target in layers:
            outs, ins = target.module.weight.shape[:2]
            state[f"{target.name}.lora_down.weight"] = torch.randn(4, ins, generator=draw)
            state[f"{target.name}.lora_up.weight"] = torch.randn(outs, 4, generator=draw)
            state[f"{target.name}.alpha"] = torch.tensor(4.0)
        save_file(state, folder / f"{seed}.safetensors")
    out = folder.parent / "basis.safetensors"
    extract_universal_basis.main(["--lora_dir", str(folder), "--output", str(out), "--rank", "8"])
    return out


def test_all_options_at_once_on_sdxl(arguments, tiny_sdxl, folders, basis, tmp_path):
    curvature = tmp_path / "context.safetensors"
    of_base = ["--pretrained_model_name_or_path", str(tiny_sdxl), "--basis_path", str(basis)]
    of_data = ["--source_data_dir", str(folders / "reg"), "--output_path", str(curvature)]
    assert context([*of_base, *of_data, "--resolution", "64", "--batch_size", "2", "--num_samples", "2"]) == 0
    given = (f"basis_path={basis}", f"lalora_context_path={curvature}", "lalora_lambda=0.001")
    drawn = tmp_path / "prompts.txt"
    drawn.write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    assert (
        sdxl(
            arguments(
                *("run", *COMMAND, "--network_args", *given, *EVERYTHING, "--network_train_unet_only"),
                *("--sample_prompts", str(drawn), "--sample_every_n_epochs", "1"),
                model=tiny_sdxl,
            )
        )
        == 0
    )
    told = rows(tmp_path / "run")
    assert float(told[-1]["lalora"]) > 0
    state, facts = (
        load_file(tmp_path / "run" / "cat.safetensors"),
        metadata(tmp_path / "run" / "cat.safetensors"),
    )
    layers = {key.partition(".")[0] for key in state}
    assert all("attn" in name for name in layers) and len(layers) > 4  # the layers of the basis
    one = min(layers)
    assert state[f"{one}.core_up"].shape == (4, 4, 4) and state[f"{one}.router"].shape == (4, 8)
    options = json.loads(facts["lowrank.options"])
    assert options["basis_path"] == "embedded" and options["use_dora"] and options["num_experts"] == 4
    assert list((tmp_path / "run" / "sample").glob("*.png"))


@pytest.mark.parametrize("more", [("basis_path=auto:grad", "basis_samples=4", *EVERYTHING)], ids=["no basis"])
def test_resume_and_reload_without_basis(more, arguments, tiny_sd, tmp_path):
    line = (*COMMAND, "--network_args", *more)
    assert sd(arguments("whole", *line)) == 0
    assert sd(arguments("half", *line, "--max_train_steps", "2", "--save_state")) == 0
    (state,) = (tmp_path / "half").glob("*-state")
    assert sd(arguments("rest", *line, "--resume", str(state))) == 0
    whole, rest = (tmp_path / name / "cat.safetensors" for name in ("whole", "rest"))
    assert same(whole, rest)

    unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
    module = importlib.import_module(f"networks.{MODULE}")
    network, kept = module.create_network_from_weights(1.0, str(whole), None, None, unet)
    network.apply_to(None, unet, False, True)
    missing, _ = network.load_state_dict(kept, False)
    assert not missing
    read = load_file(whole)
    held = {f"{layer.name}.core_up": layer.core_up for layer in network.layers()}
    assert held and all(torch.equal(value, read[key]) for key, value in held.items())
    moved = sum(bool(layer.core_up.any()) for layer in network.layers())
    assert moved >= len(held) - 2  # attention to one token has no gradient in its query and key


def test_missing_basis_in_strict_mode(arguments):
    with pytest.raises(Refused, match="basis_required"):
        sd(arguments("run", *COMMAND, "--network_args", "basis_required=True"))
    with pytest.raises(Refused, match=r"nowhere\.safetensors"):
        sd(arguments("run", *COMMAND, "--network_args", "basis_path=nowhere.safetensors"))
