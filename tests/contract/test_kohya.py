"""Our networks in an unmodified checkout of kohya sd-scripts, on tiny models; see docs/kohya.md.

    SD_SCRIPTS=/path/to/sd-scripts SD_SCRIPTS_PYTHON=/path/to/its/python pytest tests/contract/test_kohya.py

SD_SCRIPTS is the checkout and SD_SCRIPTS_PYTHON a Python with what it needs (this one, if unset). Without the
first the tests are skipped. Each trains or draws with the checkout's own script in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from repository import ROOT
from safetensors import safe_open
from safetensors.torch import load_file

from lowrank.adapters.gate import open_ranks

CHECKOUT = os.environ.get("SD_SCRIPTS")
SPY = ROOT / "tests" / "support" / "kohya_spy.py"
PYTHON = os.environ.get("SD_SCRIPTS_PYTHON", sys.executable)
pytestmark = pytest.mark.skipif(CHECKOUT is None, reason="SD_SCRIPTS names no checkout of kohya sd-scripts")
# networks.lora and networks.lora_flux are kohya's own there
NETWORKS = sorted({file.stem for file in (ROOT / "networks").glob("*.py")} - {"lora", "lora_flux"})
# without a basis file they begin with a stage on data
STAGED = (
    *("network_null_lalora", "network_null_lalora_plus", "network_null_lalora_plus_Effi_ABM"),
    *("universal_lalora", "universal_lora"),
)
SCRIPTS = {"sd": "train_network.py", "sdxl": "sdxl_train_network.py", "flux": "flux_train_network.py"}


def run(*line: object, fails: bool = False, spy: Path | None = None) -> str:
    """Output of a script of the checkout, or of `make FOLDER`; `spy` is where kohya_spy.py writes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = (ROOT / "tools" / "tiny_kohya.py",) if spy is None else (SPY, spy)
    command = [PYTHON, *map(str, (*script, *line))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=ROOT)
    told = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, told[-3000:]
    return told


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kohya")
    run("make", folder)
    return folder


@pytest.fixture
def train(models, tmp_path):
    """A function (family, network module, flags) that trains two steps; gives the file, or what was said."""

    def call(
        family: str,
        network: str,
        *more: object,
        fails: bool = False,
        steps: int = 2,
        spy: Path | None = None,
    ):
        line = {
            "tokenizer_cache_dir": models / "tokenizers",
            "train_data_dir": models / "data",
            "resolution": "64,64",
            "caption_extension": ".txt",
            "max_train_steps": steps,
            "learning_rate": 0.01,
            "network_module": network,
            "network_dim": 4,
            "network_alpha": 4,
            "seed": 1,
            "max_data_loader_n_workers": 0,
            "output_dir": tmp_path,
            "output_name": "made",
            "pretrained_model_name_or_path": models / {"sd": "sd15"}.get(family, family),
        }
        if family == "flux":
            line |= {
                "pretrained_model_name_or_path": models / "flux" / "flux1-dev.safetensors",
                "clip_l": models / "parts" / "text_encoder",
                "t5xxl": models / "parts" / "text_encoder_2",
                "ae": models / "flux" / "ae.safetensors",
                "t5xxl_max_token_length": 32,
            }
        given = {str(word) for word in more}
        words = [w for k, v in line.items() if f"--{k}" not in given for w in (f"--{k}", v)]
        words += ["--cache_latents", "--no_half_vae", *more]
        told = run(SCRIPTS[family], *words, fails=fails, spy=spy)
        return told if fails else tmp_path / f"{_after('--output_name', more) or 'made'}.safetensors"

    return call


def _after(word: str, line) -> str | None:
    return next((str(b) for a, b in pairwise(line) if a == word), None)


def flags(value: object) -> str:
    """The name of a test's parameter: the flags in it."""
    return value if isinstance(value, str) else "+".join(re.findall(r"--(\w+)", " ".join(map(str, value))))


def facts(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def finite(file: Path) -> dict[str, torch.Tensor]:
    state = load_file(file)
    assert all(torch.isfinite(value).all() for value in state.values())
    return state


@pytest.mark.parametrize("network", STAGED)
def test_warmup_stage_is_refused(network, train):
    told = train("sd", f"networks.{network}", fails=True)
    assert f"{network} needs a warm-up stage before step 0" in told


@pytest.mark.parametrize("network", [name for name in NETWORKS if name not in STAGED])
def test_every_network_trains(network, train, models):
    file = train("sd", f"networks.{network}")
    state, told = finite(file), facts(file)
    made_by = {"lalora": "lora"}.get(network, network)  # its files are plain LoRA
    assert told["lowrank.method"] == made_by and told["ss_network_module"] == f"networks.{network}"
    assert len({key.partition(".")[0] for key in state}) == 192 + 18  # U-Net, and three layers of CLIP
    moved = _moved_on_diffusers(network, file, models / "sd15" / "unet")
    assert moved > 1e-3


def _moved_on_diffusers(network: str, file: Path, folder: Path) -> float:
    """The share by which the file, with every layer of its U-Net, changes diffusers' U-Net."""
    import importlib

    from diffusers import UNet2DConditionModel

    unet: torch.nn.Module = UNet2DConditionModel.from_pretrained(folder).eval()
    made = importlib.import_module(f"networks.{network}").create_network_from_weights(
        1.0, str(file), None, None, unet, for_inference=True
    )[0]
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 7, 64)
    with torch.no_grad():
        before = unet(*inputs).sample
        made.apply_to(None, unet, False, True)
        assert made.load_weights(str(file)).missing_keys == []
        return float((unet(*inputs).sample - before).norm() / before.norm())


@pytest.mark.parametrize(
    ("family", "network", "layers"),
    [("sdxl", "dora", 288), ("sdxl", "qrlora", 288), ("flux", "delta_r", 40), ("flux", "qrlora", 40)],
)
def test_sdxl_and_flux(family, network, layers, train):
    file = train(family, f"networks.{network}", "--gradient_checkpointing")
    state = finite(file)
    assert facts(file)["lowrank.method"] == network
    assert len({key.partition(".")[0] for key in state}) == layers
    if family == "flux":
        assert "lora_unet_double_blocks_0_img_attn_qkv.alpha" in state
        assert "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha" in state


def test_checkpointing_changes_nothing(train):
    one = finite(train("sd", "networks.dora"))
    two = finite(train("sd", "networks.dora", "--gradient_checkpointing"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5)


def test_training_continues_from_a_file(train):
    """--network_weights with and without --dim_from_weights, --base_weights, --scale_weight_norms."""
    first = train("sd", "networks.delta_r", "--output_name", "first", "--network_dim", 3)
    for more in (("--dim_from_weights",), ("--network_dim", 3)):
        again = finite(train("sd", "networks.delta_r", "--network_weights", first, *more))
        for key, value in load_file(first).items():
            if key.endswith(".q.weight"):
                assert torch.equal(again[key], value)
    finite(train("sd", "networks.delta_r", "--base_weights", first, "--base_weights_multiplier", 0.5))
    finite(train("sd", "networks.dora", "--scale_weight_norms", 0.01))


@pytest.mark.parametrize(
    ("family", "network"), [("sd", "qrlora"), ("sd", "tlora"), ("sd", "effilora"), ("flux", "delta_r")]
)
def test_state_resume(family, network, train, tmp_path):
    more = ("--save_state", "--save_every_n_steps", 2, "--output_name", "part")
    train(family, f"networks.{network}", *more, steps=3)
    state, middle = tmp_path / "part-step00000002-state", tmp_path / "part-step00000002.safetensors"
    resumed = ("--resume", state, "--skip_until_initial_step", "--initial_step", 2, "--output_name", "rest")
    rest, before = finite(train(family, f"networks.{network}", *resumed, steps=3)), load_file(middle)
    assert rest.keys() == before.keys()
    moved = torch.cat([(rest[key] - value).abs().flatten() for key, value in before.items()])
    assert (
        0 < moved.max() < 0.0125
    )  # one step of AdamW at 0.01 from there; from a fresh start it is up to 0.03


@pytest.mark.parametrize(
    ("family", "more"),
    [
        # fp8 U-Nets need a GPU: the CPU has no group norm for them
        ("sdxl", ("--mixed_precision", "bf16", "--full_bf16", "--network_train_unet_only")),
        ("flux", ("--mixed_precision", "bf16", "--fp8_base", "--network_train_unet_only")),
        ("flux", ("--blocks_to_swap", 2, "--gradient_checkpointing", "--network_train_unet_only")),
    ],
    ids=flags,
)
@pytest.mark.parametrize("network", ["delta_r", "dora"])
def test_low_memory_options(family, more, network, train):
    finite(train(family, f"networks.{network}", *more))


def picture(
    models: Path,
    out: Path,
    *more: object,
    family: str = "sd",
    spy: Path | None = None,
    fails: bool = False,
):
    import numpy
    from PIL import Image

    script, ckpt = {"sd": ("gen_img.py", "sd15"), "sdxl": ("sdxl_gen_img.py", "sdxl")}[family]
    line = {
        "ckpt": models / ckpt,
        "tokenizer_cache_dir": models / "tokenizers",
        "outdir": out,
        "prompt": "a photo of a dog --d 1",
        "W": 64,
        "H": 64,
        "steps": 2,
        "images_per_prompt": 1,
        "sampler": "ddim",
    }
    words = [w for k, v in line.items() for w in (f"--{k}", v)]
    told = run(script, *words, "--no_preview", *more, fails=fails, spy=spy)
    if fails:
        return told
    return numpy.asarray(Image.open(next(out.glob("*.png")))).astype(int)


@pytest.mark.parametrize(("family", "network"), [("sd", "delta_r"), ("sd", "dora"), ("sdxl", "qrlora")])
def test_gen_img_live_equals_merged(family, network, train, models, tmp_path):
    file = train(family, f"networks.{network}", "--learning_rate", 0.1)
    use = ("--network_module", f"networks.{network}", "--network_weights", file, "--network_mul", 1.0)
    base = picture(models, tmp_path / "base", family=family)
    live = picture(models, tmp_path / "live", *use, family=family)
    merged = picture(models, tmp_path / "merged", *use, "--network_merge", family=family)
    ready = picture(models, tmp_path / "ready", *use, "--network_pre_calc", family=family)
    assert abs(live - base).mean() > 1
    apart = [(abs(one - live).max(), abs(one - live).mean()) for one in (merged, ready)]
    assert max(apart)[0] <= 1, apart


# ------------------------------------------------------------------ gates, penalties, rates, experts, stages

TLORA = ("--network_dim", 8, "--network_args", "tlora_min_rank=1")
VALIDATED = ("--validation_split", 0.34, "--validate_every_n_steps", 1, "--validation_seed", 1)
ISOTROPIC = ("--network_args", "basis_path=none", "lalora_isotropic=True")
EVERYTHING = "network_null_lalora_plus_Effi_ABM"


def heard(spy: Path) -> list[dict]:
    return [json.loads(line) for line in spy.read_text().splitlines()]


def masks(spy: Path) -> dict[bool, set[tuple[int, ...]]]:
    """Ranks open in the samples of each call, with and without gradient, each as its timesteps ask."""
    timesteps, asked, found = torch.empty(0), False, {True: set(), False: set()}
    for fact in heard(spy):
        if "timesteps" in fact:
            timesteps, asked = torch.tensor(fact["timesteps"]), fact["grad"]
        elif fact.get("layer", "").startswith("lora_unet"):
            want = open_ranks(timesteps, 8, 1).repeat_interleave(len(fact["open"]) // len(timesteps))
            assert fact["open"] == want.tolist(), (fact, timesteps)
            found[asked].add(tuple(fact["open"]))
    return found


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("sd", (*VALIDATED, "--gradient_checkpointing")),
        ("sdxl", ("orthogonal=False", "--gradient_checkpointing")),
        ("sdxl", ("--mixed_precision", "bf16", "--full_bf16")),
        ("flux", ("orthogonal=False",)),
        ("flux", (*VALIDATED, "--gradient_checkpointing")),
        ("flux", ("--gradient_checkpointing", "--blocks_to_swap", 2, "--network_train_unet_only")),
        ("flux", ("--mixed_precision", "bf16", "--fp8_base", "--network_train_unet_only")),
    ],
    ids=flags,
)
def test_rank_mask_of_each_timestep(family, more, train, tmp_path):
    spy = tmp_path / "heard"
    train(family, "networks.tlora", *TLORA, *more, "--train_batch_size", 2, steps=3, spy=spy)
    found = masks(spy)
    assert any(len(set(ranks)) == 2 for ranks in found[True])  # two samples of a batch differ
    if VALIDATED[0] in more:
        assert len(found[False]) >= 3  # kohya validates at four timesteps


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_sample_images_use_rank_masks(family, train, tmp_path):
    (tmp_path / "prompts.txt").write_text("a photo of a dog --w 64 --h 64 --d 1 --s 3 --l 5")
    draw = ("--sample_prompts", tmp_path / "prompts.txt", "--sample_every_n_steps", 1, "--sample_at_first")
    spy = tmp_path / "heard"
    train(family, "networks.tlora", *TLORA, *draw, "--sample_sampler", "ddim", spy=spy)
    assert len(masks(spy)[False]) == 3


def test_output_preservation_keeps_timesteps(train, models, tmp_path):
    """kohya runs the base between a forward and its backward, which checkpointing recomputes."""
    (tmp_path / "data.toml").write_text(
        "[general]\nresolution = 64\ncaption_extension = '.txt'\n[[datasets]]\nbatch_size = 2\n"
        f"[[datasets.subsets]]\nimage_dir = '{models / 'data' / '4_dog'}'\nnum_repeats = 4\n"
        "custom_attributes = { diff_output_preservation = true, diff_output_preservation_trigger = 'dog', "
        "diff_output_preservation_class = 'animal' }\n"
    )
    spy, ranks = tmp_path / "heard", []
    more = ("--dataset_config", tmp_path / "data.toml", "--gradient_checkpointing")
    train("sd", "networks.tlora", *TLORA, *more, spy=spy)
    for fact in heard(spy):
        if fact.get("timesteps") and fact["grad"]:
            ranks = open_ranks(torch.tensor(fact["timesteps"]), 8, 1).tolist()
        elif fact.get("layer", "").startswith("lora_unet"):
            assert fact["open"] == ranks


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_gen_img_with_rank_masks(family, train, models, tmp_path):
    file = train(family, "networks.tlora", *TLORA, "--learning_rate", 0.1)
    use = ("--network_module", "networks.tlora", "--network_weights", file, "--network_mul", 1.0)
    spy, base = tmp_path / "heard", picture(models, tmp_path / "base", family=family)
    live = picture(models, tmp_path / "live", *use, family=family, spy=spy)
    assert abs(live - base).mean() > 1 and len(masks(spy)[False]) == 2
    asked = picture(models, tmp_path / "merged", *use, "--network_merge", family=family)
    assert (asked == live).all()  # kohya says that it cannot be merged, and draws live
    told = picture(models, tmp_path / "ready", *use, "--network_pre_calc", family=family, fails=True)
    assert "tlora has another ΔW at every timestep; keep it live" in told


def test_masked_and_routed_files_resume_but_do_not_merge(train, tmp_path):
    first = train("sd", "networks.tlora", *TLORA, "--output_name", "first")
    told = train("sd", "networks.tlora", *TLORA, "--base_weights", first, fails=True)
    assert "tlora has another ΔW at every timestep" in told
    spy = tmp_path / "heard"
    train("sd", "networks.tlora", "--network_weights", first, "--dim_from_weights", spy=spy)
    assert masks(spy)[True]  # R_min is the file's
    module = f"networks.{EVERYTHING}"
    routed = ("--network_args", "basis_path=none", "enable_effilora=True", "num_experts=3")
    first = train("sd", module, *routed, "--output_name", "first")
    assert load_file(first)["lora_unet_mid_block_attentions_0_proj_in.router"].shape == (3, 4)
    told = train("sd", module, *routed, "--base_weights", first, fails=True)
    assert "has no one ΔW to merge" in told
    again = train("sd", module, "--network_weights", first, "--dim_from_weights")
    assert finite(again).keys() == load_file(first).keys()


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_all_options_at_once(family, train, tmp_path):
    """Null space, experts, penalty and LoRA+; the penalty is half of it at each of two backwards."""
    spy = tmp_path / "heard"
    more = (*ISOTROPIC, "lalora_lambda=0.5", "enable_effilora=True", "num_experts=3")
    more += ("--gradient_checkpointing", "--gradient_accumulation_steps", 2)
    state = finite(train(family, f"networks.{EVERYTHING}", *more, spy=spy))
    assert any(key.endswith(".router") for key in state)
    pulls = [fact["pull"] for fact in heard(spy) if "pull" in fact]
    assert pulls[:2] == [0, 0] and pulls[2] > 0  # nothing at the start, and it moves the parameters after it
    assert pulls[3] == pytest.approx(pulls[2], rel=1e-4)
    (rates,) = [fact["rates"] for fact in heard(spy) if "rates" in fact]
    assert (rates["unet"], rates["unet plus"]) == pytest.approx((0.01, 0.16))


def test_penalty_in_kohya_trainer(train):
    sizes = []  # kohya clips the whole gradient, penalty and all, to 1
    for strength in (0, 20):
        more = (*ISOTROPIC, f"lalora_lambda={strength}", "--optimizer_type", "SGD", "--learning_rate", 0.1)
        state = finite(train("sd", "networks.network_null_lalora", *more, steps=6))
        sizes.append(sum(value.norm() for key, value in state.items() if ".free_" in key))
    assert sizes[1] < 0.9 * sizes[0], sizes


def test_methods_with_data_free_directions_train(train):
    for network in ("universal_lora", "universal_lalora"):
        state = finite(train("sd", f"networks.{network}", "--network_args", "basis_path=auto:weight"))
        assert any(value.any() for key, value in state.items() if key.endswith(".core"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("basis_path=none", "abm_enabled=True", "abm_steps=5"), "own training script with --abm_enabled"),
        (("basis_path=none", "effi_update_ratio=0.5", "enable_effilora=True"), "give effi_update_ratio=1"),
        (("basis_path=auto:grad",), "needs a warm-up stage before step 0"),
    ],
)
def test_unsupported_methods_are_refused(more, said, train):
    assert said in train("sd", f"networks.{EVERYTHING}", "--network_args", *more, fails=True)


def test_training_continues_from_a_file_after_warmup(train, models, tmp_path):
    """The basis from the data and the ABM stage in our trainer, further steps in kohya's."""
    line = {
        "pretrained_model_name_or_path": models / "sd15",
        "train_data_dir": models / "data",
        "resolution": "64,64",
        "caption_extension": ".txt",
        "max_train_steps": 1,
        "network_module": f"networks.{EVERYTHING}",
        "network_dim": 4,
        "network_alpha": 4,
        "abm_steps": 2,
        "output_dir": tmp_path,
        "output_name": "staged",
    }
    words = [str(w) for k, v in line.items() for w in (f"--{k}", v)]
    more = ("--abm_enabled", "--network_args", "basis_samples=4", "enable_effilora=True", "num_experts=3")
    command = [sys.executable, str(ROOT / "train_network_ABM.py"), *words, *more]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=600)
    staged = tmp_path / "staged.safetensors"
    more = ("--network_weights", staged, "--dim_from_weights")
    state, before = finite(train("sd", f"networks.{EVERYTHING}", *more)), load_file(staged)
    for key, value in before.items():
        frozen = key.endswith((".basis_up", ".basis_down", ".null_up", ".null_down"))
        assert state[key].equal(value) or not frozen
    assert any((state[key] - value).any() for key, value in before.items())
