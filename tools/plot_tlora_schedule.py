"""T-LoRA's schedule as table and picture: how many ranks are open at a timestep, and in a sampler's steps.

python tools/plot_tlora_schedule.py --rank 64 --min_rank 1 --alpha 1 2 0.5              # a table, Markdown
python tools/plot_tlora_schedule.py --rank 64 --family sdxl --sampler euler --steps 25   # and of each step
python tools/plot_tlora_schedule.py --rank 64 --family flux --steps 28 --plot ranks.png  # and a picture
python tools/plot_tlora_schedule.py --docs                 # write docs/tlora_schedule.md and its picture
python tools/plot_tlora_schedule.py --docs --check         # exit 1 where they are not what would be written

r(t) = ⌊((T − t)/T)^α (R − R_min)⌋ + R_min        T = 1000, arXiv 2507.05964, eq. 3 and 6; α is SimpleTuner's
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lowrank.adapters.gate import open_ranks
from lowrank.errors import Refused
from lowrank.files import atomic
from lowrank.models.samplers import SAMPLERS, build_sampler
from lowrank.models.sd_single import published_config

ROOT = Path(__file__).resolve().parent.parent
MOST = 65536  # ranks, over those of any layer
COLUMNS = (0, 250, 500, 750, 999)  # timesteps of the table
DOCS, PICTURE = ROOT / "docs" / "tlora_schedule.md", ROOT / "docs" / "images" / "tlora_schedule.png"
MARK = "Schedules"  # the picture's text field that says what it shows
# what a pipeline of the family has when nothing else is said: sampler, steps, side of the picture
FAMILIES: Mapping[str, tuple[str, int, int]] = {
    "sd15": ("ddim", 50, 512),
    "sdxl": ("euler", 25, 1024),
    "flux": ("flow", 28, 1024),
}
COLOURS = ("#1f5fa8", "#c0392b", "#2e8b57", "#8e44ad", "#d68910", "#16808f")
DOCUMENTED = [(64, 1, 1.0), (64, 1, 2.0), (64, 1, 0.5), (64, 32, 1.0), (64, 32, 2.0), (64, 32, 0.5)]


class Schedule(NamedTuple):
    """R, R_min and α."""

    rank: int
    least: int
    alpha: float

    def at(self, timesteps: torch.Tensor) -> list[int]:
        """Open ranks at timesteps (n,) in 0..1000. Raises `Refused` for values that are no schedule."""
        return open_ranks(timesteps, self.rank, self.least, self.alpha).tolist()

    def __str__(self) -> str:
        return f"R {self.rank}, R_min {self.least}, α {self.alpha:g}"


class Steps(NamedTuple):
    """The timesteps (n,) that a pipeline goes through, and what it is called."""

    name: str
    timesteps: torch.Tensor


def steps_of(
    family: str, name: str | None = None, count: int | None = None, side: int | None = None
) -> Steps:
    """The timesteps of a family's stock pipeline. Raises `Refused` for a sampler that it does not have."""
    usual, steps, pixels = FAMILIES[family]
    name, count, side = name or usual, count or steps, side or pixels
    if family == "flux":
        if name != usual:
            raise Refused(f"FLUX has its own sampler, not {name}; leave --sampler out")
        return Steps(f"FLUX, {side}×{side}, {count} steps", _flow(count, side))
    # the spacing of the published models' schedulers; diffusers' own default is another one for Euler
    published = {**published_config(family)["scheduler"], "timestep_spacing": "leading"}
    scheduler: Any = build_sampler(name, published)
    scheduler.set_timesteps(count)
    label = {"sd15": "SD 1.5", "sdxl": "SDXL"}[family]
    return Steps(f"{label}, {name}, {count} steps", scheduler.timesteps.double())


def _flow(count: int, side: int) -> torch.Tensor:
    """FLUX.1-dev's timesteps, which shift towards noise with the number of latent tokens."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    from tools.make_tiny_flux import scheduler as flux_dev

    scheduler: Any = flux_dev()
    told = scheduler.config
    shift = calculate_shift(
        (side // 16) ** 2, told.base_image_seq_len, told.max_image_seq_len, told.base_shift, told.max_shift
    )
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / count, count).tolist(), mu=shift)
    return scheduler.timesteps.double()


# ---------- table


def table(schedules: Sequence[Schedule]) -> str:
    """Open ranks at the timesteps of COLUMNS, and on average over 0..999."""
    head = [f"t = {t}" for t in COLUMNS]
    head[0], head[-1] = f"{head[0]} (picture)", f"{head[-1]} (noise)"
    lines = [f"| R | R_min | α | {' | '.join(head)} | mean |", "|---" * (len(COLUMNS) + 4) + "|"]
    for one in schedules:
        mean = sum(one.at(torch.arange(1000))) / 1000
        cells = (one.rank, one.least, f"{one.alpha:g}", *one.at(torch.tensor(COLUMNS)), f"{mean:.2f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def step_table(steps: Steps, schedules: Sequence[Schedule]) -> str:
    """Open ranks in each step: first the timesteps, then a row for each schedule."""
    rows = [("timestep", [f"{t:.0f}" for t in steps.timesteps.tolist()], "")]
    for one in schedules:
        ranks = one.at(steps.timesteps)
        rows.append((str(one), list(map(str, ranks)), f"{sum(ranks) / len(ranks):.1f}"))
    lines = ["| | first step to last | mean |", "|---|---|---|"]
    return (
        "\n".join([*lines, *(f"| {name} | {' '.join(cells)} | {mean} |" for name, cells, mean in rows)])
        + "\n"
    )


# ---------- picture


def picture(schedules: Sequence[Schedule], samplings: Sequence[Steps]) -> Figure:
    """Open ranks over the timestep, and for each sampling over its steps."""
    count = 1 + len(samplings)
    figure = Figure(figsize=(5.2 * count, 4.6), layout="constrained")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    t = torch.arange(1000)
    for one, colour in zip(schedules, _colours(schedules), strict=True):
        panels[0].plot(t, one.at(t), color=colour, linewidth=1.6, label=str(one))
    panels[0].set_xlim(1000, 0)
    panels[0].set_xlabel("timestep: noise (left) to picture")
    panels[0].set_ylabel("open ranks")
    panels[0].set_title("over the timestep", fontsize=12)
    for axes, steps in zip(panels[1:], samplings, strict=True):
        numbers = range(1, len(steps.timesteps) + 1)
        for one, colour in zip(schedules, _colours(schedules), strict=True):
            ranks = one.at(steps.timesteps)
            axes.step(numbers, ranks, where="mid", color=colour, linewidth=1.0)
            axes.plot(numbers, ranks, "o", color=colour, markersize=3)
        axes.set_xlabel("step")
        axes.set_title(steps.name, fontsize=12)
    for axes in panels:
        axes.set_ylim(0, 1.05 * max(one.rank for one in schedules))
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(3, len(schedules)), frameon=False, fontsize=10)
    return figure


def _colours(schedules: Sequence[Schedule]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(schedules))]


def shown(schedules: Sequence[Schedule], samplings: Sequence[Steps]) -> str:
    """A digest of every point of the picture, kept in it: its bytes depend on fonts."""
    points = [[*one, one.at(torch.arange(1000))] for one in schedules]
    points += [[steps.name, *(one.at(steps.timesteps) for one in schedules)] for steps in samplings]
    return hashlib.sha256(json.dumps(points).encode()).hexdigest()


def draw(path: Path, schedules: Sequence[Schedule], samplings: Sequence[Steps]) -> None:
    """Write the picture, whole or not at all."""
    with matplotlib.rc_context({"font.size": 11, "savefig.facecolor": "white"}), atomic(path) as part:
        made, facts = picture(schedules, samplings), {MARK: shown(schedules, samplings), "Software": None}
        made.savefig(part, format="png", dpi=110, metadata=facts)


# ---------- documentation


def document() -> str:
    """docs/tlora_schedule.md."""
    schedules, samplings = _documented()
    parts = [
        "# T-LoRA: the schedule of ranks\n",
        "`python tools/plot_tlora_schedule.py --docs` writes this page; a test compares it with the code.\n",
        "    r(t) = ⌊((T − t)/T)^α (R − R_min)⌋ + R_min        T = 1000\n",
        "![open ranks over the timestep, and over the steps of two samplers](images/tlora_schedule.png)\n",
        table(schedules),
        "R is the rank, R_min the ranks open at pure noise, α the exponent ([tlora.md](tlora.md)).\n"
        "With α = 1 all R ranks are open only at t = 0. These samplers never visit it: their last step is at "
        "t = 1 or above.\nα > 1 opens ranks later in sampling, α < 1 earlier. FLUX spends most of its steps "
        "near noise.\nSo with one schedule, fewer ranks are open on average than on SDXL.\n",
    ]
    for steps in samplings:
        parts += [f"## {steps.name}\n", step_table(steps, schedules)]
    parts += [
        "## Against the numbers in SimpleTuner's guide\n",
        "The guide's table for R 64, R_min 1 does not follow its own formula in 6 of 15 places. The rows of "
        "α = 2 are nearly 1 − (t/T)²,\nthose of α = 0.5 are rounded up instead of down. SimpleTuner's code "
        "follows the formula, and so does this program.\n",
        guide(),
    ]
    return "\n".join(parts)


GUIDE: Mapping[float, tuple[int, ...]] = {  # documentation/TLORA.md of SimpleTuner, R 64 and R_min 1
    1.0: (64, 48, 32, 16, 1),
    2.0: (64, 60, 48, 20, 1),
    0.5: (64, 55, 46, 33, 1),
}


def guide() -> str:
    """The guide's numbers beside the formula's, with the wrong ones marked."""
    lines = [f"| α | | {' | '.join(f't = {t}' for t in COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for alpha, told in GUIDE.items():
        right = Schedule(64, 1, alpha).at(torch.tensor(COLUMNS))
        marked = [str(a) if a == b else f"~~{a}~~" for a, b in zip(told, right, strict=True)]
        lines += [f"| {alpha:g} | guide | {' | '.join(marked)} |"]
        lines += [f"| | formula | {' | '.join(map(str, right))} |"]
    return "\n".join(lines) + "\n"


def _documented() -> tuple[list[Schedule], list[Steps]]:
    return [Schedule(*one) for one in DOCUMENTED], [steps_of("sdxl"), steps_of("flux")]


def stale() -> list[Path]:
    """The documents that are not what this script would write."""
    from PIL import Image

    old = [] if DOCS.is_file() and DOCS.read_text(encoding="utf-8") == document() else [DOCS]
    told = None
    if PICTURE.is_file():
        with Image.open(PICTURE) as image:
            told = image.info.get(MARK)
    return old if told == shown(*_documented()) else [*old, PICTURE]


# ---------- command line


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, nargs="+", default=[64], metavar="R")
    parser.add_argument("--min_rank", type=int, nargs="+", metavar="R_MIN", help="unset: half of each rank")
    parser.add_argument("--alpha", type=float, nargs="+", default=[1.0], metavar="α")
    parser.add_argument("--family", choices=list(FAMILIES), help="also the steps of its stock pipeline")
    parser.add_argument("--sampler", help=f"for SD and SDXL: {', '.join(SAMPLERS)}")
    parser.add_argument("--steps", type=int, help="how many")
    parser.add_argument("--side", type=int, help="pixels of the picture's side, on which FLUX's steps depend")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write a picture too")
    parser.add_argument("--docs", action="store_true", help="write the documentation's table and picture")
    parser.add_argument("--check", action="store_true", help="with --docs: only say what is not current")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print tables, write what is asked for; 0, or 1 with a sentence."""
    told = arguments().parse_args(argv)
    try:
        return _documentation(told.check) if told.docs else _tables(told)
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 1


def _tables(told: argparse.Namespace) -> int:
    if told.family is None and (told.sampler or told.steps or told.side):
        raise Refused("--sampler, --steps and --side are a pipeline's; say which with --family")
    if min(1 if told.steps is None else told.steps, 1 if told.side is None else told.side) < 1:
        raise Refused("--steps and --side count from 1; give more")
    if max(told.rank) > MOST or (told.steps or 1) > 1000:
        raise Refused(f"--rank goes up to {MOST} and --steps to 1000, the timesteps of training; give less")
    if not all(map(math.isfinite, told.alpha)):
        raise Refused("--alpha is no finite number; 1 is the linear schedule")
    if told.plot is not None and not told.plot.name:
        raise Refused("--plot names no file; give FILE.png")
    schedules = [
        Schedule(rank, least, alpha)
        for rank in told.rank
        for least in told.min_rank or [max(1, rank // 2)]
        for alpha in told.alpha
    ]
    samplings = [steps_of(told.family, told.sampler, told.steps, told.side)] if told.family else []
    print(table(schedules))
    for steps in samplings:
        print(f"{steps.name}\n\n{step_table(steps, schedules)}")
    if told.plot:
        draw(told.plot, schedules, samplings)
        print(told.plot)
    return 0


def _documentation(check: bool) -> int:
    old = stale()
    for path in old:
        if check:
            print(f"{path} is stale; run python tools/plot_tlora_schedule.py --docs")
        elif path == DOCS:
            with atomic(DOCS) as part:
                part.write_text(document(), encoding="utf-8")
        else:
            draw(PICTURE, *_documented())
    return int(check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
