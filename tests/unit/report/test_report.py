"""The report of a run: its numbers against the files of the run, hostile text, its size, and the advice."""

from __future__ import annotations

import csv
import json
import math
import re
from html.parser import HTMLParser

import numpy
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from lowrank.cli.report import main
from lowrank.errors import Refused
from lowrank.report.advice import advice
from lowrank.report.charts import line_chart, thinned
from lowrank.report.page import page
from lowrank.report.run_folder import _adapters, read_run, smooth
from lowrank.report.write import write_report
from lowrank.train.log import Table

HOSTILE = "<script>alert(1)</script>\"'&"


class Reader(HTMLParser):
    """Texts of cells, tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._cell = False
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        self._cell = tag in ("td", "th")
        if self._cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self._cell:
            self.rows[-1][-1] += data


def make_run(folder, steps: int = 60, pictures: int = 2):
    """A run's folder with made-up numbers; returns its losses."""
    folder.mkdir()
    losses = [1 / (1 + step / 20) + 0.1 * math.sin(step) for step in range(steps)]
    with open(folder / "loss.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "epoch", "lr", "loss", "avr_loss", "t0-250", "t250-500"])
        for step, loss in enumerate(losses, 1):
            mean = sum(losses[:step]) / step
            writer.writerow([step, 1, 1e-4, loss, mean, loss if step % 2 else "", ""])
    (folder / "config.toml").write_text(
        "# train_network_ABM.py: every option of one run, to be read back with --config_file\n"
        f"# train_network_ABM.py --output_name cat\n\n[a]\noutput_name = 'cat'\nlearning_rate = 1e-4\n"
        f"max_train_steps = 1600\ninstance_prompt = {json.dumps(HOSTILE)}\n",
        encoding="utf-8",
    )
    (folder / "validation.csv").write_text("step,kind,value\n20,step,0.5\n40,step,0.3\n60,step,0.4\n")
    (folder / "summary.json").write_text('{"steps": 60, "images": 120, "seconds": 30.0}')
    (folder / "sample").mkdir()
    for index in range(pictures):
        info = PngInfo()
        info.add_text("parameters", f"a cat {HOSTILE}\nSteps: 20")
        at = 10 * (index // 2 + 1)
        path = folder / "sample" / f"cat_{at:06d}_{index % 2:02d}_20261201000000_1.png"
        Image.new("RGB", (64, 48), (index % 255, 9, 9)).save(path, pnginfo=info)
    pair = {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.eye(8)[:, :4].contiguous()}
    pair["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"] = torch.eye(8)[:4] * 3
    save_file(pair, folder / "cat.safetensors")
    save_file(pair, folder / "cat-step00000040.safetensors")
    return losses


def test_numbers_of_the_page_are_those_of_the_run(tmp_path, capsys):
    losses = make_run(tmp_path / "run", pictures=4)
    assert main([str(tmp_path / "run")]) == 0
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    read = Reader(text)
    facts = {row[0]: row[1] for row in read.rows if len(row) == 2}
    assert facts["steps"] == "60" and facts["adapted layers"] == "1"
    mean = sum(losses) / 60
    lowest = min(sum(losses[:n]) / n for n in range(1, 61))
    assert facts["loss (moving average)"] == f"{mean:.5g}, lowest {lowest:.5g}"
    assert facts["held-out loss"] == "0.4, lowest 0.3"
    assert facts["time"] == "0.5 minutes, 4 images per second"
    flags = {row[0]: row[1:] for row in read.rows if len(row) == 3}
    assert flags["learning_rate"] == ["0.0001", "2e-06"] and "max_train_steps" not in flags
    images = [attributes for tag, attributes in read.tags if tag == "img"]
    assert [image["data-at"] for image in images] == ["0", "1", "0", "1"]
    (bar,) = (attributes for tag, attributes in read.tags if tag == "input")
    assert bar["data-steps"] == "000010 000020" and bar["max"] == "1"
    assert "lowest after step 40 (0.3) and ended at 0.4" in read.text
    assert "cat-step00000040.safetensors is the nearest file" in read.text


def test_text_of_files_is_escaped_and_nothing_is_loaded(tmp_path):
    make_run(tmp_path / "run")
    text = page([read_run(tmp_path / "run")])
    read = Reader(text)
    assert HOSTILE in read.text and "<script>alert" not in text
    assert sum(tag == "script" for tag, _ in read.tags) == 1
    for _, attributes in read.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    assert not re.search(r"url\(\s*['\"]?http|@import", text)


def test_two_runs_stand_side_by_side(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    read = Reader(page([read_run(tmp_path / "a"), read_run(tmp_path / "b")]))
    assert ["steps", "60", "60"] in read.rows


def test_runs_of_one_name_keep_their_curves(tmp_path):
    for name in "ab":
        make_run(tmp_path / name)
    target = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html")
    text = target.read_text(encoding="utf-8")
    for name in "ab":
        assert f"cat ({tmp_path.name}/{name}): mean of 10 steps" in text


def test_record_of_an_earlier_run_has_no_files_of_the_newer_one(tmp_path):
    make_run(tmp_path / "out")
    make_run(tmp_path / "earlier")
    (tmp_path / "out" / "runs").mkdir()
    (tmp_path / "earlier").rename(tmp_path / "out" / "runs" / "cat-1")
    run = read_run(tmp_path / "out" / "runs" / "cat-1")
    assert run.losses["step"] and not (run.adapters or run.layers or run.pictures)


def test_files_of_epochs_have_the_step_of_their_end(tmp_path):
    make_run(tmp_path / "run")
    (tmp_path / "run" / "cat-step00000040.safetensors").rename(tmp_path / "run" / "cat-000001.safetensors")
    run = read_run(tmp_path / "run")
    run.losses["epoch"] = [1.0] * 41 + [2.0] * 19
    assert [(step, path.name) for step, path in _adapters(run)] == [
        (41.0, "cat-000001.safetensors"),
        (60.0, "cat.safetensors"),
    ]


def test_row_cut_by_a_kill_and_empty_settings(tmp_path):
    make_run(tmp_path / "run")
    with open(tmp_path / "run" / "loss.csv", "a") as file:
        file.write("6")
    (tmp_path / "run" / "config.toml").write_text("")
    run = read_run(tmp_path / "run")
    assert run.losses["step"][-1] == 60 and not math.isnan(run.losses["avr_loss"][-1])


def test_every_curve_is_in_the_legend():
    curves = {f"_run {i}": ([1.0, 2.0], [float(i), 1.0]) for i in range(10)}
    svg = line_chart("Loss", curves)
    assert all(f"_run {i}" in svg for i in range(10))


def test_long_run_stays_small(tmp_path):
    make_run(tmp_path / "run", steps=20_000, pictures=40)
    assert len(page([read_run(tmp_path / "run")])) < 1_000_000  # 400 pictures of 256² are about 6 MB


def test_thinned_curve_keeps_the_extremes():
    x, y = list(range(20_000)), list(numpy.random.default_rng(0).normal(size=20_000))
    y[777], y[15_000], y[3] = 50.0, -50.0, math.nan
    thin_x, thin_y = thinned(x, y)
    assert len(thin_x) <= 500 and max(thin_y) == 50 and min(thin_y) == -50 and thin_x == sorted(thin_x)


def test_mean_of_the_last_values():
    assert smooth([1.0, math.nan, 3.0, 5.0], 2)[2:] == [2.0, 4.0]
    assert math.isnan(smooth([math.nan], 3)[0])


def test_layers_have_size_and_effective_rank(tmp_path):
    make_run(tmp_path / "run")
    (layer,) = read_run(tmp_path / "run").layers
    assert layer.norm == pytest.approx(6.0) and layer.rank == 4 and layer.effective == pytest.approx(4.0)


def test_no_advice_without_a_reason(tmp_path):
    make_run(tmp_path / "run")
    (tmp_path / "run" / "validation.csv").write_text(
        "step,kind,value\n20,step,0.5\n40,step,0.4\n60,step,0.3\n"
    )
    assert advice(read_run(tmp_path / "run")) == []


def test_rising_loss_and_unchanged_layers_are_named(tmp_path):
    make_run(tmp_path / "run")
    run = read_run(tmp_path / "run")
    run.losses["loss"] = [0.1] * 300 + [0.5] * 300
    run.layers = [layer._replace(norm=0.0) for layer in run.layers]
    found = " ".join(advice(run))
    assert "rose to 5.0 times its minimum" in found and "No layer of the adapter changed" in found


def test_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"has no loss\.csv; give the output folder of a run"):
        main([str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_resumed_table_drops_rows_after_its_step(tmp_path):
    table = Table(tmp_path / "t.csv", ("step", "value"), "value")
    for step in (1, 2, 3):
        table.add({"step": step, "value": step / 2})
    with open(tmp_path / "t.csv", "a") as file:
        file.write("4,")  # cut by a kill
    assert [row["step"] for row in table.begin(2)] == ["1", "2"]
    assert (tmp_path / "t.csv").read_text() == "step,value\n1,0.5\n2,1.0\n"
    table.begin(0)
    assert not (tmp_path / "t.csv").exists()
