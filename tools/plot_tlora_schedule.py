"""Print or plot T-LoRA's schedule: how many ranks are open at each timestep and in each step of a sampler.

python tools/plot_tlora_schedule.py --rank 64 --min_rank 1 --alpha 1 2 0.5              # a Markdown table
python tools/plot_tlora_schedule.py --rank 64 --family sdxl --sampler euler --steps 25   # and for each step
python tools/plot_tlora_schedule.py --rank 64 --family flux --steps 28 --plot ranks.png  # and a figure
python tools/plot_tlora_schedule.py --docs                 # write docs/tlora_schedule.md and its figure
python tools/plot_tlora_schedule.py --docs --check         # exit 1 if these are not up to date

r(t) = ⌊((T − t)/T)^α (R − R_min)⌋ + R_min        T = 1000, arXiv 2507.05964, eq. 3 and 6; α as in SimpleTuner
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
from lowrank.models.published import configurations
from lowrank.models.samplers import SAMPLERS, build_sampler

ROOT = Path(__file__).resolve().parent.parent
MAX_RANK = 65536  # above the rank of any layer
COLUMNS = (0, 250, 500, 750, 999)  # timesteps of the table
DOCS, PICTURE = ROOT / "docs" / "tlora_schedule.md", ROOT / "docs" / "images" / "tlora_schedule.png"
MARK = "Schedules"  # text field of the PNG with a digest of its points
# defaults of each family's pipeline: sampler, steps, side of the image in pixels
FAMILIES: Mapping[str, tuple[str, int, int]] = {
    "sd15": ("ddim", 50, 512),
    "sdxl": ("euler", 25, 1024),
    "flux": ("flow", 28, 1024),
}
COLOURS = ("#1f5fa8", "#c0392b", "#2e8b57", "#8e44ad", "#d68910", "#16808f")
DOCUMENTED = [(64, 1, 1.0), (64, 1, 2.0), (64, 1, 0.5), (64, 32, 1.0), (64, 32, 2.0), (64, 32, 0.5)]


class Schedule(NamedTuple):
    """The parameters R, R_min and α of a schedule."""

    rank: int
    least: int
    alpha: float

    def at(self, timesteps: torch.Tensor) -> list[int]:
        """Return the open ranks at timesteps (n,) in 0..1000. Raises `Refused` for an impossible schedule."""
        return open_ranks(timesteps, self.rank, self.least, self.alpha).tolist()

    def __str__(self) -> str:
        return f"R {self.rank}, R_min {self.least}, α {self.alpha:g}"


class Steps(NamedTuple):
    """The timesteps (n,) of a pipeline, and a name for it."""

    name: str
    timesteps: torch.Tensor


def steps_of(
    family: str, name: str | None = None, count: int | None = None, side: int | None = None
) -> Steps:
    """Return the timesteps of a family's stock pipeline. Raises `Refused` for an unknown sampler."""
    usual, steps, pixels = FAMILIES[family]
    name, count, side = name or usual, count or steps, side or pixels
    if family == "flux":
        if name != usual:
            raise Refused(f"FLUX has its own sampler, not {name}; leave --sampler out")
        return Steps(f"FLUX, {side}×{side}, {count} steps", _flow(count, side))
    # the spacing of the published models; the default of diffusers' Euler class differs
    schedule = {**configurations(family)["scheduler"], "timestep_spacing": "leading"}
    scheduler: Any = build_sampler(name, schedule)
    scheduler.set_timesteps(count)
    label = {"sd15": "SD 1.5", "sdxl": "SDXL"}[family]
    return Steps(f"{label}, {name}, {count} steps", scheduler.timesteps.double())


def _flow(count: int, side: int) -> torch.Tensor:
    """Return FLUX.1-dev's timesteps, shifted towards noise by the number of latent tokens."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    from tools.make_tiny_flux import scheduler as flux_dev

    scheduler: Any = flux_dev()
    config = scheduler.config
    shift = calculate_shift(
        (side // 16) ** 2,
        *(config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift),
    )
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / count, count).tolist(), mu=shift)
    return scheduler.timesteps.double()


# ---------- table


def table(schedules: Sequence[Schedule]) -> str:
    """Return a Markdown table of open ranks at the timesteps of COLUMNS, and of the mean over 0..999."""
    head = [f"t = {t}" for t in COLUMNS]
    head[0], head[-1] = f"{head[0]} (picture)", f"{head[-1]} (noise)"
    lines = [f"| R | R_min | α | {' | '.join(head)} | mean |", "|---" * (len(COLUMNS) + 4) + "|"]
    for schedule in schedules:
        rank, least, alpha = schedule
        mean = sum(schedule.at(torch.arange(1000))) / 1000
        cells = (rank, least, f"{alpha:g}", *schedule.at(torch.tensor(COLUMNS)), f"{mean:.2f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def step_table(steps: Steps, schedules: Sequence[Schedule]) -> str:
    """Return a Markdown table of open ranks in each step: the timesteps, then a row per schedule."""
    rows = [("timestep", [f"{t:.0f}" for t in steps.timesteps.tolist()], "")]
    for schedule in schedules:
        ranks = schedule.at(steps.timesteps)
        rows.append((str(schedule), list(map(str, ranks)), f"{sum(ranks) / len(ranks):.1f}"))
    lines = ["| | first step to last | mean |", "|---|---|---|"]
    return (
        "\n".join([*lines, *(f"| {name} | {' '.join(cells)} | {mean} |" for name, cells, mean in rows)])
        + "\n"
    )


# ---------- figure


def picture(schedules: Sequence[Schedule], samplings: Sequence[Steps]) -> Figure:
    """Plot the open ranks over the timestep, and over the steps of each sampling."""
    count = 1 + len(samplings)
    figure = Figure(figsize=(5.2 * count, 4.6), layout="constrained")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    t = torch.arange(1000)
    for schedule, colour in zip(schedules, _colours(schedules), strict=True):
        panels[0].plot(t, schedule.at(t), color=colour, linewidth=1.6, label=str(schedule))
    panels[0].set_xlim(1000, 0)
    panels[0].set_xlabel("timestep: noise (left) to picture")
    panels[0].set_ylabel("open ranks")
    panels[0].set_title("over the timestep", fontsize=12)
    for axes, steps in zip(panels[1:], samplings, strict=True):
        numbers = range(1, len(steps.timesteps) + 1)
        for schedule, colour in zip(schedules, _colours(schedules), strict=True):
            ranks = schedule.at(steps.timesteps)
            axes.step(numbers, ranks, where="mid", color=colour, linewidth=1.0)
            axes.plot(numbers, ranks, "o", color=colour, markersize=3)
        axes.set_xlabel("step")
        axes.set_title(steps.name, fontsize=12)
    for axes in panels:
        axes.set_ylim(0, 1.05 * max(schedule.rank for schedule in schedules))
        axes.grid(color="#dddddd", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(3, len(schedules)), frameon=False, fontsize=10)
    return figure


def _colours(schedules: Sequence[Schedule]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(schedules))]


def points_digest(schedules: Sequence[Schedule], samplings: Sequence[Steps]) -> str:
    """Return a digest of all points of the figure, stored in the file, whose bytes depend on fonts."""
    points = [[*schedule, schedule.at(torch.arange(1000))] for schedule in schedules]
    points += [[steps.name, *(s.at(steps.timesteps) for s in schedules)] for steps in samplings]
    return hashlib.sha256(json.dumps(points).encode()).hexdigest()


def draw(path: Path, schedules: Sequence[Schedule], samplings: Sequence[Steps]) -> None:
    """Write the figure to a PNG file; an interrupted write leaves no partial file."""
    with matplotlib.rc_context({"font.size": 11, "savefig.facecolor": "white"}), atomic(path) as part:
        metadata = {MARK: points_digest(schedules, samplings), "Software": None}
        picture(schedules, samplings).savefig(part, format="png", dpi=110, metadata=metadata)


# ---------- documentation


def document() -> str:
    """Return the text of docs/tlora_schedule.md."""
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
    """Return a table of the guide's numbers and the formula's; wrong numbers are struck out."""
    lines = [f"| α | | {' | '.join(f't = {t}' for t in COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for alpha, published in GUIDE.items():
        computed = Schedule(64, 1, alpha).at(torch.tensor(COLUMNS))
        marked = [str(a) if a == b else f"~~{a}~~" for a, b in zip(published, computed, strict=True)]
        lines += [f"| {alpha:g} | guide | {' | '.join(marked)} |"]
        lines += [f"| | formula | {' | '.join(map(str, computed))} |"]
    return "\n".join(lines) + "\n"


def _documented() -> tuple[list[Schedule], list[Steps]]:
    return [Schedule(*parameters) for parameters in DOCUMENTED], [steps_of("sdxl"), steps_of("flux")]


def stale() -> list[Path]:
    """Return the documents that are not up to date."""
    from PIL import Image

    old = [] if DOCS.is_file() and DOCS.read_text(encoding="utf-8") == document() else [DOCS]
    digest = None
    if PICTURE.is_file():
        with Image.open(PICTURE) as image:
            digest = image.info.get(MARK)
    return old if digest == points_digest(*_documented()) else [*old, PICTURE]


# ---------- command line


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, nargs="+", default=[64], metavar="R", help="ranks R")
    parser.add_argument(
        "--min_rank",
        type=int,
        nargs="+",
        metavar="R_MIN",
        help="ranks open at pure noise (default: half of R)",
    )
    parser.add_argument(
        "--alpha", type=float, nargs="+", default=[1.0], metavar="α", help="exponents of the schedule"
    )
    parser.add_argument(
        "--family", choices=list(FAMILIES), help="also show the steps of this family's pipeline"
    )
    parser.add_argument("--sampler", help=f"sampler of the pipeline, for SD and SDXL: {', '.join(SAMPLERS)}")
    parser.add_argument("--steps", type=int, help="number of sampling steps")
    parser.add_argument("--side", type=int, help="image side in pixels; FLUX's timesteps depend on it")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also write a figure")
    parser.add_argument("--docs", action="store_true", help="write table and figure of the documentation")
    parser.add_argument("--check", action="store_true", help="with --docs: only print what is not up to date")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print tables and write files. Returns 0, or 1 after an error."""
    options = arguments().parse_args(argv)
    try:
        return _documentation(options.check) if options.docs else _tables(options)
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 1


def _tables(options: argparse.Namespace) -> int:
    if options.family is None and (options.sampler or options.steps or options.side):
        raise Refused("--sampler, --steps and --side need a pipeline; choose one with --family")
    if min(1 if options.steps is None else options.steps, 1 if options.side is None else options.side) < 1:
        raise Refused("--steps and --side are below 1; give 1 or more")
    if max(options.rank) > MAX_RANK or (options.steps or 1) > 1000:
        raise Refused(
            f"--rank is limited to {MAX_RANK} and --steps to 1000, the timesteps of training; give less"
        )
    if not all(map(math.isfinite, options.alpha)):
        raise Refused("--alpha is not a finite number; give 1 for the linear schedule")
    if options.plot is not None and not options.plot.name:
        raise Refused("--plot has no file name; give FILE.png")
    schedules = [
        Schedule(rank, least, alpha)
        for rank in options.rank
        for least in options.min_rank or [max(1, rank // 2)]
        for alpha in options.alpha
    ]
    samplings = (
        [steps_of(options.family, options.sampler, options.steps, options.side)] if options.family else []
    )
    print(table(schedules))
    for steps in samplings:
        print(f"{steps.name}\n\n{step_table(steps, schedules)}")
    if options.plot:
        draw(options.plot, schedules, samplings)
        print(options.plot)
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
