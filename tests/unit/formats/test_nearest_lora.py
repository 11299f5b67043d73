"""Routed adapters as the nearest LoRA: the command, every format, what is said of the error."""

from __future__ import annotations

import importlib

import pytest
import torch
from compatibility import ROUTED
from safetensors import safe_open
from toys import shake

from lowrank.adapters.targets import as_passed
from lowrank.cli import export
from lowrank.cli.calibrate import nearest_lora
from lowrank.errors import Refused
from lowrank.formats import base_checkpoint, verify
from lowrank.formats.read import read_adapter
from lowrank.formats.write import FORMATS, only, write
from lowrank.formats.writers import Choices
from lowrank.models.family import Source
from lowrank.models.flux import FLUX
from lowrank.models.sd import SD15
from lowrank.tensors import write_tensors

FAMILIES = {"sd15": (SD15, "tiny_sd"), "flux": (FLUX, "tiny_flux")}
TARGETS = {
    "sd15": r"down_blocks\.0\.(attentions\.0\..*attn|resnets\.0\.conv1)|layers\.0\..*(q_proj|fc1)",
    "flux": r"transformer_blocks\.0\.(attn\.to_|ff)|layers\.0\..*(q_proj|fc1)",
}
ARGUMENTS = {
    "effilora": {},
    "network_null_lalora_plus_Effi_ABM": {
        "enable_effilora": "True",
        "use_dora": "True",
        "basis_path": "auto:random",
    },
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, request):
    """(base, routed file, its nearest LoRA, what was said) of a family and method, made once.

    With `alike` all experts are the same, so that the nearest LoRA is the routed adapter itself.
    """
    folder, made = tmp_path_factory.mktemp("routed"), {}
    prompts = folder / "prompts.txt"
    prompts.write_text("a cat --w 32 --h 32 --s 2 --l 2 --n dull --d 1\na dog --w 32 --h 32 --s 2\n")

    def get(family: str, method: str, alike: bool = False):
        if (family, method, alike) not in made:
            record, name = FAMILIES[family]
            base = request.getfixturevalue(name)
            models = record.load(Source(str(base), dtype=torch.float32))
            encoders = record.keep_trained_text(models, record.options())
            passed = as_passed(encoders, models.denoiser)
            module = importlib.import_module(f"networks.{method}")
            given = {"target": TARGETS[family], "num_experts": "2", **ARGUMENTS[method]}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(13)
                network = module.create_network(1.0, 4, 2.0, None, passed, models.denoiser, **given)
                network.apply_to(passed, models.denoiser, True, True)
                network.start()
            shake(network)
            for layer in network.layers() if alike else ():
                with torch.no_grad():
                    ups = getattr(layer, layer.method.experts.role)
                    ups.copy_(ups[:1].clone().expand_as(ups))
            source = folder / f"{family}-{method}-{alike}.safetensors"
            network.save_weights(str(source), None, {"ss_output_name": "probe"})
            network.restore()
            nearest = source.with_stem(source.stem + "-nearest")
            raw, told = nearest_lora(str(source), str(base), str(prompts))
            write_tensors(nearest, raw.state, raw.metadata)
            made[family, method, alike] = base, source, nearest, told
        return made[family, method, alike]

    get.prompts = prompts
    return get


@pytest.mark.parametrize("method", ROUTED)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_every_format_holds_the_nearest_lora(family, method, saved, tmp_path):
    base, source, nearest, told = saved(family, method)
    adapter, routed = read_adapter(nearest), read_adapter(source, strict=False).method
    assert any(place.part == "te1" for place in adapter.layers)
    assert adapter.fact("exported_from") == method and "2 experts become one up" in told
    error, (worst, _, name) = (
        float(adapter.fact("unrouted_error")),
        adapter.fact("unrouted_worst").partition(" "),
    )
    assert 0 < error < float(worst) < 1 and f"{error:.2%} of what they add" in told and name in told
    assert (method == "effilora") == (routed.magnitude is None)
    for to in FORMATS:
        if to == "qrlora":
            continue
        target = tmp_path / (to if FORMATS[to].folder else f"{to}.safetensors")
        choices = Choices(base=base_checkpoint.BaseCheckpoint(base), flat_clip=export.flat_clip())
        without_text = to == "lycoris" or (to == "diffusers" and adapter.has_magnitude())
        part = only(adapter, "unet") if without_text else adapter
        write(part, to, target, choices)
        assert all(one.worst <= 1e-5 for one in verify.check_export(part, to, target, choices))
    with safe_open(tmp_path / "kohya.safetensors", "pt") as file:
        facts = file.metadata()
    assert facts["lowrank.unrouted_error"] == f"{error:.6g}" and "2 pictures" in facts["lowrank.unrouted_on"]
    assert facts["lowrank.exported_from"] == method and facts["ss_output_name"] == "probe"


@pytest.mark.parametrize("method", ROUTED)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_where_experts_are_alike_nothing_is_lost(family, method, saved, tmp_path):
    """In one forward of the model, text encoders apart: the routed network against the exported files."""
    base, source, nearest, _ = saved(family, method, alike=True)
    adapter = only(read_adapter(nearest), "unet")
    assert float(adapter.fact("unrouted_error")) < 1e-5
    write(adapter, "diffusers", tmp_path / "out.safetensors", Choices())
    apart = export.forward_difference(
        str(source), adapter, "diffusers", tmp_path / "out.safetensors", str(base)
    )
    assert apart <= 1e-5
    base, source, nearest, _ = saved(family, method)  # and experts that differ are not lost track of
    adapter = only(read_adapter(nearest), "unet")
    write(adapter, "diffusers", tmp_path / "out.safetensors", Choices())
    apart = export.forward_difference(
        str(source), adapter, "diffusers", tmp_path / "out.safetensors", str(base)
    )
    assert apart > 1e-5


def test_the_command_draws_merges_and_compares(saved, tmp_path, capsys):
    base, source, _, told = saved("sd15", "effilora")
    words = [str(source), str(tmp_path / "merged"), "--to", "merged", "--verify", "forward"]
    assert export.main([*words, "--model", str(base), "--calibrate", str(saved.prompts)]) == 0
    out = capsys.readouterr().out
    assert told in out and float(out.split("one forward of the model: ")[1].split(" ")[0]) <= 1e-5


def test_what_cannot_be_calibrated_says_why(saved, tmp_path):
    base, source, nearest, _ = saved("sd15", "effilora")
    target, calibrate = str(tmp_path / "out.safetensors"), ["--calibrate", str(saved.prompts)]
    with pytest.raises(Refused, match="--model BASE --calibrate PROMPTS"):
        export.main([str(source), target])
    with pytest.raises(Refused, match="give it with --model"):
        export.main([str(source), target, *calibrate])
    with pytest.raises(Refused, match="leave one out"):
        export.main([str(source), target, *calibrate, "--model", str(base), "--at-timestep", "3"])
    with pytest.raises(Refused, match="leave --calibrate out"):
        export.main([str(nearest), target, *calibrate, "--model", str(base)])
    (tmp_path / "none.txt").write_text("# nothing\n")
    with pytest.raises(Refused, match="write a prompt per line"):
        export.main([str(source), target, "--model", str(base), "--calibrate", str(tmp_path / "none.txt")])
    assert not (tmp_path / "out.safetensors").exists()
