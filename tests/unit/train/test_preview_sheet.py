"""Pictures while training: one seed for each prompt, and a sheet of epochs and prompts that grows."""

from __future__ import annotations

import itertools
import time

import torch
from accelerate import Accelerator
from PIL import Image

from lowrank.train import preview_sheet
from lowrank.train.preview import Preview
from lowrank.train.prompts import Prompt

COLORS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}


def test_pictures_of_a_prompt_have_one_seed_and_fill_a_sheet(tmp_path, monkeypatch):
    clock = itertools.count(20260101000000)
    monkeypatch.setattr(time, "strftime", lambda _: str(next(clock)))
    seeds: list[tuple[str, int]] = []
    color = ["red"]

    def draw(prompt: Prompt, seed: int) -> Image.Image:
        seeds.append((prompt.prompt, seed))
        return Image.new("RGB", (32, 32), color[0] if prompt.prompt == "a cat" else "blue")

    def preview(prompts: list[Prompt]) -> Preview:
        return Preview(prompts=prompts, draw=draw, folder=tmp_path / "sample", name="cat", seed=11)

    prompts = [Prompt("a cat", width=32, height=32), Prompt("a dog", width=32, height=32, seed=5)]
    sizes = []
    for tag, drawn in (("e000001", "red"), ("e000002", "green"), ("final", "green")):
        color[0] = drawn
        preview(prompts).run(Accelerator(cpu=True), torch.nn.Linear(1, 1), tag, 1)  # a resumed run is new too
        with Image.open(tmp_path / "cat_samples.png") as page:
            sizes.append(page.size)
            colors = {rgb for _, rgb in page.convert("RGB").getcolors(1 << 20)}
    assert seeds == [("a cat", 11), ("a dog", 5)] * 3
    assert sizes[0][0] == sizes[1][0] and sizes[0][1] < sizes[1][1] < sizes[2][1]
    assert set(COLORS.values()) <= colors
    rows = preview_sheet._rows(tmp_path / "sample", "cat")
    assert {tag: sorted(columns) for tag, columns in rows.items()} == {
        "e000001": [0, 1],
        "e000002": [0, 1],
        "final": [0, 1],
    }


def test_sheet_keeps_first_and_last_of_many_rows():
    tags = [f"{step:06d}" for step in range(1000)]
    kept = preview_sheet._spread(tags, 60)
    assert len(kept) == 60 and kept[0] == tags[0] and kept[-1] == tags[-1] and kept == sorted(kept)
    assert preview_sheet._spread(tags[:5], 60) == tags[:5]
