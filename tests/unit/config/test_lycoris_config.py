"""`--lycoris_config`: the user's files as they stand, what they mean here, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from files import FLUX_DEV
from flux_run import arguments as flux_arguments  # noqa: F401 (fixture)
from flux_run import pictures  # noqa: F401 (fixture)
from repository import ROOT
from safetensors import safe_open
from sd_run import arguments, folders  # noqa: F401 (fixtures)

from lowrank.adapters.targets import find
from lowrank.cli.flux_train import main as flux
from lowrank.cli.lycoris_config import translate
from lowrank.cli.resolve import with_network
from lowrank.cli.sd_train import main as sd
from lowrank.cli.sd_train import main_sdxl as sdxl
from lowrank.config.flux import FLUX_TRAIN
from lowrank.config.sd import SD_TRAIN
from lowrank.errors import Refused
from lowrank.models import published
from lowrank.train.network_module import facade_of, find_module

FILES = ROOT / "tests" / "fixtures" / "lycoris"  # the blocks of the user's T-LoRA guide, letter by letter


@pytest.fixture
def written(tmp_path):
    """A function that writes a LyCORIS file, the guide's with other keys, and returns its path."""

    def write(**keys) -> Path:
        settings = {"algo": "lora", "linear_dim": 64, "linear_alpha": 32} | keys
        path = tmp_path / "lycoris.json"
        path.write_text(json.dumps({key: value for key, value in settings.items() if value != "absent"}))
        return path

    return write


@pytest.fixture(scope="module")
def full():
    """Full-size denoisers on the meta device, FLUX.2's with fewer blocks."""
    with torch.device("meta"):
        return {
            "sd15": UNet2DConditionModel.from_config(published.configurations("sd15")["unet"]),
            "sdxl": UNet2DConditionModel.from_config(published.configurations("sdxl")["unet"]),
            "flux": FluxTransformer2DModel(**FLUX_DEV),
            "flux2": Flux2Transformer2DModel(num_layers=2, num_single_layers=3),
        }


def network(path: Path, denoiser: torch.nn.Module):
    """What a file makes of a denoiser."""
    settings = translate(path)
    module = find_module(settings.module)
    facade_of(module).check(settings.arguments)
    return module.create_network(1.0, settings.rank, settings.alpha, None, [], denoiser, **settings.arguments)


# ---------- the user's files


def test_the_guides_files_as_they_stand(monkeypatch, tmp_path):
    expected = {
        **{"tlora_min_rank": "1", "tlora_alpha": "1.0", "orthogonal": "True", "sig_type": "principal"},
        **{"use_data_init": "True", "target_module": "Attention,FeedForward"},
    }
    settings = translate(FILES / "lycoris_tlora.json")
    assert (settings.module, settings.rank, settings.alpha, settings.notes) == (
        "networks.tlora",
        64,
        32.0,
        (),
    )
    assert settings.arguments == expected
    # config.json names config/lycoris_tlora.json, as seen from the folder above
    (tmp_path / "config").mkdir()
    for name in ("config.json", "lycoris_tlora.json"):
        shutil.copy(FILES / name, tmp_path / "config" / name)
    for place in (tmp_path, tmp_path / "config", FILES):
        monkeypatch.chdir(place)
        again = translate(tmp_path / "config" / "config.json")
        assert replace(again, path=settings.path, notes=()) == settings and "names" in again.notes[0]
    assert translate(FILES / "config.json").path == FILES / "lycoris_tlora.json"  # side by side


@pytest.mark.parametrize(
    ("kind", "attention", "both"), [("sd15", 128, 160), ("sdxl", 560, 700), ("flux", 266, 342)]
)
def test_the_guides_targets_in_full_size_models(kind, attention, both, full, written):
    """The counts of SimpleTuner's targets with the right class names (LyCORIS itself finds 76 on FLUX)."""
    assert len(network(FILES / "lycoris_tlora.json", full[kind]).layers()) == both
    only = written(apply_preset={"target_module": ["Attention"]})
    made = network(only, full[kind])
    assert len(made.layers()) == attention
    assert {(layer.rank, float(layer.scale)) for layer in made.layers()} == {(64, 0.5)}


def test_flux_2_by_its_own_names_and_by_the_general_ones(full):
    own = translate(FILES / "lycoris_tlora_flux2.json").arguments["target_module"].split(",")
    by_class = {word: find("unet", full["flux2"], modules=[word]) for word in own}
    counts = {word: len(found) for word, found in by_class.items()}
    assert counts == {"Flux2Attention": 16, "Flux2FeedForward": 8, "Flux2ParallelSelfAttention": 6}
    named = {t.path for t in find("unet", full["flux2"], modules=own)}
    assert named == {t.path for t in find("unet", full["flux2"], modules=["Attention", "FeedForward"])}
    with pytest.raises(
        Refused, match=r"FluxTransformer2DModel has no layer in a block Flux2Attention.*FluxAttention"
    ):
        network(FILES / "lycoris_tlora_flux2.json", full["flux"])


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.slow
def test_the_guides_files_train_stable_diffusion(kind, request, arguments, tmp_path):
    """Unchanged but for the rank, which the tiny model's narrowest layers do not have."""
    settings = json.loads((FILES / "lycoris_tlora.json").read_text()) | {"linear_dim": 8, "linear_alpha": 0.5}
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "lycoris_tlora.json").write_text(json.dumps(settings))
    shutil.copy(FILES / "config.json", tmp_path / "config")
    model, main = request.getfixturevalue(f"tiny_{kind}"), {"sd": sd, "sdxl": sdxl}[kind]
    line = arguments("run", "--lycoris_config", str(tmp_path / "config" / "config.json"), model=model)
    line = without(line, "--network_module", "--network_dim")
    assert main([*line, "--max_train_steps", "1"]) == 0
    with safe_open(tmp_path / "run" / "cat.safetensors", framework="pt") as file:
        facts, names = file.metadata(), {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118
    assert (facts["ss_network_module"], facts["ss_network_dim"]) == ("networks.tlora", "8")
    assert facts["lowrank.alpha"] == "0.5"  # LyCORIS in SimpleTuner makes 0 of it
    assert json.loads(facts["ss_network_args"])["target_module"] == "Attention,FeedForward"
    assert names and all("attn" in name or "_ff_" in name for name in names)  # and no text encoder


def test_the_guides_files_train_flux(flux_arguments, tmp_path):
    settings = json.loads((FILES / "lycoris_tlora.json").read_text()) | {"linear_dim": 8}
    (tmp_path / "lycoris.json").write_text(json.dumps(settings))
    line = without(flux_arguments("run"), "--lora_init_method", "--rank", "--basis_cache_dir")
    assert flux([*line, "--lycoris_config", str(tmp_path / "lycoris.json"), "--max_train_steps", "1"]) == 0
    (adapter,) = (tmp_path / "run").glob("*.safetensors")
    with safe_open(adapter, framework="pt") as file:
        assert file.metadata()["lowrank.method"] == "tlora"


def without(line: list[str], *flags: str) -> list[str]:
    """A command line less some flags of one value."""
    gone = {i + j for i, word in enumerate(line) if word in flags for j in (0, 1)}
    return [word for i, word in enumerate(line) if i not in gone]


# ---------- what the keys mean


def test_names_classes_and_overrides(written, full):
    path = written(
        apply_preset={
            "target_module": ["FeedForward"],
            "target_name": ["time_embedding", r".*attn1\.to_q$"],
            "module_algo_map": {"Attention": {"dim": 16}, "BasicTransformerBlock": {"dim": 2, "alpha": 1}},
            "name_algo_map": {r".*attn2\.to_k$": {"algo": "locon", "dim": 4, "alpha": 2.0}},
            "exclude_name": ["mid_block", r".*\.to_v"],
        }
    )
    made, sizes = network(path, full["sd15"]), {}
    for layer in made.layers():
        target = made.targets[layer.name]
        kind = next(one for one in ("time_embedding", "attn2.to_k", "attn", "ff") if one in target.path)
        sizes.setdefault(kind, set()).add((layer.rank, layer.scale * layer.rank))
        assert "mid_block" not in target.path and not target.path.endswith("to_v")
    assert sizes == {
        "time_embedding": {(64, 32.0)},
        "attn2.to_k": {(4, 2.0)},  # by name, before the class
        "attn": {(16, 32.0)},  # the innermost class, whose alpha is not named and stays
        "ff": {(2, 1.0)},
    }


def test_wildcards_instead_of_expressions(written, full):
    preset = {"use_fnmatch": True, "target_name": ["*.to_q"], "exclude_name": ["up_blocks.?"]}
    made = network(written(apply_preset=preset), full["sd15"])
    paths = [target.path for target in made.targets.values()]
    assert len(paths) == 14 and not any(path.startswith("up_blocks") for path in paths)  # 32 less 18


def test_every_layer_without_a_preset_as_in_lycoris(written, full):
    layers = [m for m in full["sd15"].modules() if type(m).__name__ in ("Linear", "Conv2d")]
    narrow = written(linear_dim=4, conv_dim=2, conv_alpha=0)
    made = network(narrow, full["sd15"]).layers()
    assert len(made) == len(layers)
    wide = {(layer.rank, layer.scale) for layer in made if layer.conv and layer.host.kernel_size == (3, 3)}
    assert wide == {(2, 1.0)}
    made = network(written(linear_dim=4, apply_preset={"enable_conv": False}), full["sd15"]).layers()
    assert Counter(type(layer.host).__name__ for layer in made) == {"Linear": 160 + 2 + 22}
    linear = [m for m in full["flux"].modules() if type(m).__name__ == "Linear"]
    assert len(network(narrow, full["flux"]).layers()) == len(linear)  # a model without any convolution


@pytest.mark.parametrize(
    ("keys", "scales"),
    [
        ({"multiplier": 0.5}, {64: 0.25, 8: 2.0}),
        ({"linear_alpha": 0.5}, {64: 0.5 / 64, 8: 0.5 / 8}),
        ({"linear_alpha": 0}, {64: 1.0, 8: 1.0}),
        ({"linear_alpha": 0, "multiplier": 0.5}, {64: 0.5, 8: 0.5}),
    ],
    ids=str,
)
def test_nothing_is_cut(keys, scales, written, full):
    """SimpleTuner makes whole numbers of multiplier and linear_alpha."""
    preset = {"target_module": ["Attention"], "module_algo_map": {"FeedForward": {"dim": 8}}}
    made = network(written(apply_preset=preset, **keys), full["sd15"])
    assert {layer.rank: layer.scale for layer in made.layers()} == scales


def test_other_methods_and_options(written):
    settings = translate(written(algo="lora", dora_wd=True, dropout=0.1, module_dropout=0.2))
    assert (settings.module, settings.arguments["dropout"], settings.arguments["module_dropout"]) == (
        *("networks.dora", "0.1"),
        "0.2",
    )
    settings = translate(
        written(algo="tlora", tlora_min_rank=32, tlora_alpha=2, sig_type="last", use_data_init=False)
    )
    assert settings.arguments["sig_type"] == "last" and settings.arguments["use_data_init"] == "False"
    assert (settings.arguments["tlora_min_rank"], settings.arguments["tlora_alpha"]) == ("32", "2.0")
    facade_of(find_module("networks.tlora")).check(settings.arguments)
    # LyCORIS hears of the start in its maps alone
    entry = {"sig_type": "last", "use_data_init": False}
    preset = {"target_module": ["Attention"], "module_algo_map": {"Attention": entry}}
    settings = translate(written(algo="tlora", apply_preset=preset))
    assert (settings.arguments["sig_type"], settings.arguments["use_data_init"]) == ("last", "False")
    settings = translate(written(bypass_mode=True, mask_group_id=1, use_tucker=False))
    assert len(settings.notes) == 2 and all("has no effect" in note for note in settings.notes)


# ---------- beside other flags


def parsed(*flags: str, surface=FLUX_TRAIN):
    base = ("--pretrained_model_name_or_path", "m", "--instance_data_dir", "p", "--instance_prompt", "a")
    base = (*base, "--output_dir", "o", "--lycoris_config", str(FILES / "lycoris_tlora.json"))
    return with_network(surface.parse([*base, *flags]), "networks.lora")


def test_flags_that_agree_and_arguments_beside():
    settings = parsed(
        "--network_module", "tlora", "--rank", "64", "--network_args", "sig_type=principal", "exclude=ff"
    )
    assert (settings.options.network.network_module, settings.options.network.network_dim) == (
        "networks.tlora",
        64,
    )
    assert {"exclude=ff", "sig_type=principal"} < set(settings.options.network.network_args)
    assert settings.options.network.network_train_unet_only
    settings = parsed(surface=SD_TRAIN)
    assert (
        settings.options.network.network_train_unet_only
        and "--train_text_encoder adapts" in settings.notes[-1]
    )
    settings = parsed("--train_text_encoder", surface=SD_TRAIN)
    assert not settings.options.network.network_train_unet_only


def test_a_saved_configuration_is_read_back(tmp_path):
    first = parsed(surface=SD_TRAIN)
    (tmp_path / "run.toml").write_text(first.toml())
    again = with_network(SD_TRAIN.parse(["--config_file", str(tmp_path / "run.toml")]), "networks.lora")
    assert again.options.network == first.options.network


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--network_module", "lora"), "--network_module is lora, and .* means networks.tlora; give one"),
        (("--rank", "16"), "--rank is 16, and .* means 64"),
        (("--network_alpha", "1"), "--network_alpha is 1.0, and .* means 32.0"),
        (("--lora_init_method", "qr"), "both choose what is adapted"),
        (("--lora_layers", "attn.to_q"), "both choose what is adapted"),
        (("--network_args", "target_module=Attention"), "target_module=Attention, and .*,FeedForward"),
        (("--network_train_text_encoder_only",), "both choose"),
    ],
    ids=str,
)
def test_flags_that_disagree_are_refused(flags, words):
    with pytest.raises(Refused, match=words):
        parsed(*flags)


# ---------- what is refused


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"linear_dmi": 4}, "unknown key 'linear_dmi' .*did you mean 'linear_dim'"),
        ({"linear_dim": 64.5}, "linear_dim .*'64.5' is not a whole number"),
        ({"linear_dim": 0}, "linear_dim 0 in .* is below 1"),
        ({"multiplier": 0}, "multiplier 0 in .* is not above 0"),
        (
            {"algo": "lokr", "factor": 4},
            "algo lokr .*--network_module lycoris.kohya --network_args algo=lokr",
        ),
        ({"algo": "tlroa"}, "did you mean 'tlora'"),
        ({"factor": 4}, "factor=4 .*option of algo lokr"),
        ({"train_norm": True}, "normalisation layers is not supported"),
        ({"tlora_min_rank": 4}, "tlora_min_rank .* is for algo tlora"),
        ({"algo": "tlora", "dora_wd": True}, "dora_wd with algo tlora"),
        ({"dora_wd": True, "wd_on_output": False}, "one magnitude per input"),
        ({"dora_wd": True, "multiplier": 0.5}, "scales the whole change"),
        ({"apply_preset": ["Attention"]}, "apply_preset .* is not a table"),
        ({"apply_preset": {"target_modules": []}}, "did you mean 'target_module'"),
        ({"apply_preset": {"text_encoder_target_module": ["CLIPMLP"]}}, "text encoders"),
        ({"apply_preset": {"module_algo_map": {"Attention": {"dmi": 4}}}}, "did you mean 'dim'"),
        ({"apply_preset": {"module_algo_map": {"Attention": {"algo": "tlora"}}}}, "one\\s+method"),
        ({"apply_preset": {"target_name": ["a;b"]}}, "which no layer's name has"),
        (
            {
                "algo": "tlora",
                "apply_preset": {
                    "target_module": ["FeedForward"],
                    "module_algo_map": {"Attention": {"sig_type": "last"}},
                },
            },
            "differs between layers",
        ),
    ],
    ids=str,
)
def test_mistakes_in_a_file(keys, words, written):
    with pytest.raises(Refused, match=words) as settings:
        translate(written(**keys))
    assert "\n" not in str(settings.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a table"),
        ("[" * 100_000, "is not JSON"),
        ('{"algo": "lora", "algo": "tlora"}', "has algo twice"),
        ('{"lycoris_config": "gone.json"}', "names gone.json, which does not exist"),
        ('{"lycoris_config": "x.json", "learning_rate": 1}', "has learning_rate.*as flags of this script"),
        ('{"lycoris_config": "x.json", "validation_lycoris_strength": 0.5}', "is 0.5, and"),
    ],
)
def test_files_that_are_none(text, words, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(Refused, match=words):
        translate(tmp_path / "x.json")
    with pytest.raises(Refused, match="correct --lycoris_config"):
        translate(tmp_path / "absent.json")


def test_a_target_that_matches_nothing_lists_candidates(written, full):
    with pytest.raises(Refused, match=r"in a block Atention .*did you mean 'Attention'.* ResnetBlock2D"):
        network(written(apply_preset={"target_module": ["Attention", "Atention"]}), full["sd15"])
    with pytest.raises(Refused, match="no layer of UNet2DConditionModel matches target"):
        network(written(apply_preset={"target_name": ["conv_in", "attention"]}), full["sd15"])
