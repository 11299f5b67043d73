"""tools/plot_tlora_schedule.py: the formula, the steps of real samplers, documents that are current."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tools import plot_tlora_schedule as tool
from tools.plot_tlora_schedule import Schedule, main, steps_of

# diffusers reads a tensor as an array
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)
# arXiv 2507.05964 eq. 3 with SimpleTuner's exponent, worked out by hand at t = 0, 250, 500, 750, 999
RIGHT = {
    (64, 1, 1.0): [64, 48, 32, 16, 1],
    (64, 1, 2.0): [64, 36, 16, 4, 1],
    (64, 1, 0.5): [64, 55, 45, 32, 2],
    (64, 32, 1.0): [64, 56, 48, 40, 32],
    (64, 32, 2.0): [64, 50, 40, 34, 32],
    (64, 32, 0.5): [64, 59, 54, 48, 33],
    (16, 8, 1.0): [16, 14, 12, 10, 8],
}


def test_numbers_follow_formulas():
    for schedule, expected in RIGHT.items():
        assert Schedule(*schedule).at(torch.tensor(tool.COLUMNS)) == expected
    wrong = [
        a
        for alpha, told in tool.GUIDE.items()
        for a, b in zip(told, RIGHT[64, 1, alpha], strict=True)
        if a != b
    ]
    assert wrong == [60, 48, 20, 46, 33, 1]
    assert tool.guide().count("~~") == 2 * len(wrong)


def test_steps_of_stock_pipelines():
    """The first and last of 25 steps of SDXL, and all 28 of FLUX.1-dev at 1024×1024."""
    sdxl = steps_of("sdxl")
    assert (sdxl.timesteps[0], sdxl.timesteps[-1], len(sdxl.timesteps)) == (961, 1, 25)
    ranks = Schedule(64, 1, 1.0).at(sdxl.timesteps)
    assert (ranks[0], ranks[-1]) == (3, 63)
    expected = "1 1 2 3 4 5 6 7 8 9 10 11 13 14 16 17 19 21 23 26 28 31 34 38 42 46 51 57"
    assert Schedule(64, 1, 1.0).at(steps_of("flux").timesteps) == list(map(int, expected.split()))
    small = steps_of("flux", side=512).timesteps  # shifted less
    assert small[10] < steps_of("flux").timesteps[10]
    assert len(steps_of("sd15", "dpmsolver++", 20).timesteps) == 20


def test_documents_are_current():
    assert not tool.stale(), "run python tools/plot_tlora_schedule.py --docs"


def test_changed_schedule_is_detected(monkeypatch):
    monkeypatch.setattr(tool, "DOCUMENTED", [(32, 1, 1.0)])
    assert tool.stale() == [tool.DOCS, tool.PICTURE]


def test_tables_and_plot(tmp_path, capsys):
    picture = tmp_path / "ranks.png"
    line = [
        "--rank",
        "8",
        "16",
        "--family",
        "sdxl",
        "--sampler",
        "euler",
        "--steps",
        "5",
        "--plot",
        str(picture),
    ]
    assert main(line) == 0
    told = capsys.readouterr().out
    assert "| 8 | 4 | 1 | 8 | 7 | 6 | 5 | 4 | 5.50 |" in told.splitlines()
    assert "| R 8, R_min 4, α 1 | 4 5 6 7 7 | 5.8 |" in told.splitlines()
    with Image.open(picture) as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 20) or ()) > 50


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--rank", "4", "--min_rank", "8"], "is not between 1 and rank 4"),
        (["--alpha", "0"], "is not above 0"),
        (["--family", "flux", "--sampler", "euler"], "FLUX has its own sampler"),
        (["--family", "sdxl", "--sampler", "eulr"], "did you mean 'euler'"),
        (["--steps", "5"], "choose one with --family"),
        (["--family", "sdxl", "--steps", "0"], "--steps and --side are below 1"),
        (["--family", "sdxl", "--steps", "1001"], "--steps to 1000"),
        (["--rank", "99999999999999999999"], "--rank is limited to 65536"),
        (["--alpha", "inf"], "not a finite number"),
        (["--plot", ""], "has no file name"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(line, words, capsys):
    assert main(line) == 1
    assert words in capsys.readouterr().err
