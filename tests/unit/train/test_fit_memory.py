"""`--vram`: which settings are chosen, what is printed and recorded, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flux_run import arguments, pictures  # noqa: F401 (fixtures)

from lowrank.cli.flux_train import main
from lowrank.config.flux import FLUX_TRAIN
from lowrank.errors import Refused
from lowrank.models import published
from lowrank.models.flux import empty
from lowrank.plan.cost import Work, seconds
from lowrank.plan.live import GIB, Phase
from lowrank.train import fit_memory, plan_memory
from lowrank.train.fit_memory import Setting

CONFIGS = {"denoiser": published.configurations("flux1-dev")["transformer"]}


class Planner(fit_memory._Planner):
    """FLUX.1-dev at full size with invented activations: 7 GiB, or 2 with checkpointing."""

    def __init__(self, *more: str) -> None:
        line = (
            "--pretrained_model_name_or_path",
            "x",
            "--train_data_dir",
            "x",
            "--mixed_precision",
            "bf16",
            *more,
        )
        options = FLUX_TRAIN.parse([*line, "--output_dir", "x"]).options
        job: Any = SimpleNamespace(options=options, accelerator=SimpleNamespace(is_main_process=True))
        super().__init__(job, None, None, empty(SimpleNamespace(configs=CONFIGS)))  # pyright: ignore

    def phases(self, setting: Setting) -> list[Phase]:
        weights = self.base_bytes(setting)[0]
        others = (2 if setting.gradient_checkpointing else 7) * GIB
        text = 0 if setting.text_encoders_on_cpu else 9 * GIB
        return [
            Phase("text encoding", text, (("weights", text),)),
            Phase("training step", weights + others, (("weights", weights), ("others", others)), int(3e14)),
        ]


@pytest.fixture(scope="module")
def planner():
    return Planner()


def chosen(planner: Planner, gib: float) -> Setting:
    setting, phases = fit_memory._fastest(planner, gib * GIB)
    assert max(map(plan_memory.total, phases)) <= gib * GIB * fit_memory.USABLE
    return setting


def test_large_card_needs_no_flags(planner):
    assert chosen(planner, 48) == Setting(None, False, 0)


@pytest.mark.parametrize("gib", [24, 16, 12, 8])
def test_smaller_cards_get_the_fastest_setting_that_fits(planner, gib):
    setting = chosen(planner, gib)
    fewer = setting._replace(blocks_to_swap=setting.blocks_to_swap - 1)
    if setting.blocks_to_swap:  # one block less would not fit
        assert plan_memory.total(planner.phases(fewer)[1]) > gib * GIB * fit_memory.USABLE
    assert setting.text_encoders_on_cpu == (gib == 8)


def test_given_flags_stay():
    given = Planner("--base_storage", "int8", "--gradient_checkpointing", "--blocks_to_swap", "10")
    assert chosen(given, 24) == Setting("int8", True, 10)


def test_refusal_names_the_smallest_card():
    with pytest.raises(
        Refused, match=r"--vram 2 cannot be met: this run needs 3\.\d GB at least, with --base_storage nf4 "
    ):
        fit_memory._fastest(Planner("--vram", "2"), 2 * GIB)


def test_vram_auto_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Refused, match="--vram auto reads the free memory of a GPU, and torch finds none"):
        fit_memory._free()


@pytest.mark.parametrize("value", ["twelve", "0", "-3", "nan"])
def test_vram_is_a_number(value, capsys):
    with pytest.raises(SystemExit):
        FLUX_TRAIN.parse(["--vram", value])
    assert "is not a number of GB; give e.g. 12, or auto" in capsys.readouterr().err


def test_text_encoders_on_cpu_are_not_trained():
    with pytest.raises(
        Refused, match="--text_encoders_on_cpu cannot be used while text encoders are trained"
    ):
        Planner("--text_encoders_on_cpu", "--train_text_encoder")
    with pytest.raises(Refused, match="--text_encoder_storage nf4 cannot be used while text encoders"):
        Planner("--text_encoder_storage", "nf4", "--train_text_encoder")


def test_estimated_seconds():
    step = Work(flops=3e14, passes=3, weights=12 * 10**9, host_bytes=0)
    swapped = Work(flops=3e14, passes=3, weights=12 * 10**9, host_bytes=12 * 10**9)
    assert seconds(step, None) == pytest.approx(2.0)
    assert seconds(step, None) < seconds(step, "fp8_scaled") < seconds(step, "nf4")
    assert seconds(step, None) < seconds(swapped, None) < 2 * seconds(step, None)


@pytest.mark.slow
def test_chosen_flags_are_printed_and_recorded(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan_memory, "CONTEXT", 0)
    monkeypatch.setattr(plan_memory, "WORKSPACES", 0)
    more = ("--network_module", "networks.lora", "--mixed_precision", "bf16", "--vram", "0.006")
    line = arguments("run", *more, "--max_train_steps", "1")
    assert main(line) == 0
    assert "--vram 0.006: " in capsys.readouterr().out
    config = (tmp_path / "run" / "config.toml").read_text(encoding="utf-8")
    assert "gradient_checkpointing = true" in config and "\nvram" not in config.split("[", 1)[1]
