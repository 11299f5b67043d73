"""Our networks in an unmodified checkout of kohya sd-scripts, on tiny models; see docs/kohya.md.

    SD_SCRIPTS=/path/to/sd-scripts SD_SCRIPTS_PYTHON=/path/to/its/venv/bin/python pytest tests/test_kohya.py

SD_SCRIPTS is the checkout and SD_SCRIPTS_PYTHON a Python with what it needs (this one, if unset). Without the
first the tests are skipped. Each trains or draws with the checkout's own script in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = os.environ.get("SD_SCRIPTS")
PYTHON = os.environ.get("SD_SCRIPTS_PYTHON", sys.executable)
pytestmark = pytest.mark.skipif(CHECKOUT is None, reason="SD_SCRIPTS names no checkout of kohya sd-scripts")
# networks.lora is kohya's own there
NETWORKS = sorted(file.stem for file in (ROOT / "networks").glob("*.py") if file.stem != "lora")
# without a basis file they begin with a stage on data
STAGED = ("network_null_lalora", "network_null_lalora_plus", "universal_lalora", "universal_lora")
SCRIPTS = {"sd": "train_network.py", "sdxl": "sdxl_train_network.py", "flux": "flux_train_network.py"}


def run(*line: object, fails: bool = False) -> str:
    """Output of a script of the checkout, or of `make FOLDER`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [PYTHON, str(ROOT / "tools" / "tiny_kohya.py"), *map(str, line)]
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

    def call(family: str, network: str, *more: object, fails: bool = False, steps: int = 2):
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
        told = run(SCRIPTS[family], *words, "--cache_latents", "--no_half_vae", *more, fails=fails)
        return told if fails else tmp_path / f"{_after('--output_name', more) or 'made'}.safetensors"

    return call


def _after(word: str, line) -> str | None:
    return next((str(b) for a, b in pairwise(line) if a == word), None)


def facts(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def finite(file: Path) -> dict[str, torch.Tensor]:
    state = load_file(file)
    assert all(torch.isfinite(value).all() for value in state.values())
    return state


@pytest.mark.parametrize("network", STAGED)
def test_a_stage_before_step_0_is_refused(network, train):
    told = train("sd", f"networks.{network}", fails=True)
    assert f"{network} begins with a stage on data before step 0" in told


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


def test_files_go_on(train):
    """--network_weights with and without --dim_from_weights, --base_weights, --scale_weight_norms."""
    first = train("sd", "networks.delta_r", "--output_name", "first", "--network_dim", 3)
    for more in (("--dim_from_weights",), ("--network_dim", 3)):
        again = finite(train("sd", "networks.delta_r", "--network_weights", first, *more))
        for key, value in load_file(first).items():
            if key.endswith(".q.weight"):
                assert torch.equal(again[key], value)
    finite(train("sd", "networks.delta_r", "--base_weights", first, "--base_weights_multiplier", 0.5))
    finite(train("sd", "networks.dora", "--scale_weight_norms", 0.01))


@pytest.mark.parametrize(("family", "network"), [("sd", "qrlora"), ("flux", "delta_r")])
def test_states_are_saved_and_resumed(family, network, train, tmp_path):
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
    ids=lambda value: (
        value if isinstance(value, str) else "+".join(re.findall(r"--(\w+)", " ".join(map(str, value))))
    ),
)
@pytest.mark.parametrize("network", ["delta_r", "dora"])
def test_small_memory(family, more, network, train):
    finite(train(family, f"networks.{network}", *more))


def picture(models: Path, out: Path, *more: object, family: str = "sd"):
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
    run(script, *(w for k, v in line.items() for w in (f"--{k}", v)), "--no_preview", *more)
    return numpy.asarray(Image.open(next(out.glob("*.png")))).astype(int)


@pytest.mark.parametrize(("family", "network"), [("sd", "delta_r"), ("sd", "dora"), ("sdxl", "qrlora")])
def test_gen_img_draws_live_and_merged_alike(family, network, train, models, tmp_path):
    file = train(family, f"networks.{network}", "--learning_rate", 0.1)
    use = ("--network_module", f"networks.{network}", "--network_weights", file, "--network_mul", 1.0)
    base = picture(models, tmp_path / "base", family=family)
    live = picture(models, tmp_path / "live", *use, family=family)
    merged = picture(models, tmp_path / "merged", *use, "--network_merge", family=family)
    ready = picture(models, tmp_path / "ready", *use, "--network_pre_calc", family=family)
    assert abs(live - base).mean() > 1
    assert abs(merged - live).max() <= 1 and abs(ready - live).max() <= 1
