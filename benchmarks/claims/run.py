"""Test the claims of the methods' papers on a model: each against a plain LoRA, with intervals and verdicts.

    python benchmarks/claims/run.py                       # every claim on the shipped SDXL demo model
    python benchmarks/claims/run.py concepts rates --quick  # two claims, fewer steps, ≤ 10 minutes for all
    python benchmarks/claims/run.py --model PATH --subjects DIR --styles DIR --scorer clip \\
      --scorer_path PATH --resolution 512 --device cuda --output_dir out/claims

Each arm gets an equal budget to choose its learning rate, with seeds that are not measured afterwards. A cell
is one training; finished cells are kept in the JSON, so that a stopped run continues. Results are in
benchmarks/results/claims, figures in docs/images/claims. docs/claims.md explains both.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.claims.bench import Bench, Sizes
from benchmarks.claims.figure import draw_figure
from benchmarks.claims.record import Arm, Cell, Claim
from benchmarks.claims.scorers import Judge, Nearest
from benchmarks.claims.stats import interval, verdict
from benchmarks.claims.table import PAGE, rewritten
from benchmarks.claims.world import FolderWorld, GlyphWorld
from lowrank.errors import Refused, nearest
from lowrank.files import atomic, cache_folder

ROOT = Path(__file__).resolve().parents[2]
CLAIMS = ("merging", "convergence", "one_picture", "forgetting", "concepts", "start", "basis", "rates")
TUNING = 1000  # seed of the trainings that choose a rate
FULL, QUICK = Sizes(), Sizes(steps=16, pictures=2, draw_steps=8)


class Ledger:
    """The cells of a claim in its JSON file. Cells of another model or other sizes are dropped."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        same = all(before.get(key) == facts[key] for key in ("model_hash", "sizes"))
        self.cells: dict[str, Cell] = before.get("cells", {}) if same else {}

    def save(self, results: dict[str, Any] | None = None) -> None:
        """Write facts, results and cells."""
        with atomic(self.path) as part:
            content = {**self.facts, **(results or {}), "cells": self.cells}
            part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_claim(name: str) -> Claim:
    """Return the claim of a module of this folder."""
    if name not in CLAIMS:
        raise Refused(f"claim {name!r} is unknown{nearest(name, CLAIMS)}; choose from {', '.join(CLAIMS)}")
    return importlib.import_module(f"benchmarks.claims.{name}").CLAIM


def measure(bench: Bench, claim: Claim, ledger: Ledger) -> dict[str, Any]:
    """Measure the cells that are missing; return means, differences and verdicts."""

    def cell(arm: Arm, rate: float, seed: int) -> Cell:
        key = f"{arm.name} | {rate:g} | {seed}"
        if key not in ledger.cells:
            began = time.process_time()
            measured = claim.measure(bench, arm, rate, seed)
            ledger.cells[key] = _rounded({**measured, "cpu_seconds": time.process_time() - began})
            ledger.save()
            print(f"{claim.name}: {key}: {_scalars(ledger.cells[key])}", file=sys.stderr, flush=True)
        return ledger.cells[key]

    seeds = range(bench.sizes.seeds)
    if claim.every_rate:
        measured = {
            f"{arm.name} at {rate:g}": [dict(cell(arm, rate, seed)) for seed in seeds]
            for arm in claim.arms
            for rate in arm.rates
        }
        chosen: dict[str, float] = {}
    else:
        chosen = {arm.name: _best_rate(claim, arm, cell) for arm in claim.arms}
        measured = {a.name: [dict(cell(a, chosen[a.name], seed)) for seed in seeds] for a in claim.arms}
    if claim.settle is not None:
        for seed in seeds:
            claim.settle({arm: cells[seed] for arm, cells in measured.items()})
    edges = [arm.name for arm in claim.arms if chosen and chosen[arm.name] in (arm.rates[0], arm.rates[-1])]
    return {
        "rates": chosen,
        "rates_at_an_edge": edges,  # a rate outside the grid may be better
        "arms": {arm: _means(cells) for arm, cells in measured.items()},
        "statements": [_judged(statement, measured) for statement in claim.statements],
    }


def _best_rate(claim: Claim, arm: Arm, cell: Any) -> float:
    sign = -1 if claim.tune.more_is_better else 1
    values = {rate: cell(arm, rate, TUNING)[claim.tune.key] for rate in arm.rates}
    finite = {rate: sign * value for rate, value in values.items() if value is not None}
    if not finite:
        raise Refused(f"{arm.name} diverges at every rate of {claim.name}; lower the rates of this arm")
    return min(finite, key=finite.__getitem__)


def _judged(statement: Any, measured: dict[str, list[Cell]]) -> dict[str, Any]:
    """One statement with its paired differences, over the seeds that have both numbers."""
    key = statement.metric.key
    both = [measured.get(name, []) for name in (statement.arm, statement.against)]
    pairs = [
        (ours[key], theirs[key])
        for ours, theirs in zip(*both, strict=False)
        if ours.get(key) is not None and theirs.get(key) is not None
    ]
    result = {"text": statement.text, "arm": statement.arm, "against": statement.against, "metric": key}
    if not pairs:
        return {**result, "difference": None, "verdict": "not measured"}
    difference = interval([ours - theirs for ours, theirs in pairs])
    found = verdict(difference, statement.metric.more_is_better)
    return {**result, "difference": _rounded(difference), "verdict": found}


def _means(cells: list[Cell]) -> dict[str, Any]:
    numbers = (key for cell in cells for key, value in cell.items() if isinstance(value, (int, float)))
    keys = list(dict.fromkeys(numbers))
    columns = {key: [c[key] for c in cells if c.get(key) is not None] for key in keys}
    return {key: _rounded(interval(values)) for key, values in columns.items() if values}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def _scalars(cell: Cell) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in cell.items() if isinstance(value, float))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    made.add_argument("claims", nargs="*", help=f"claims to test (default: all): {', '.join(CLAIMS)}")
    made.add_argument("--arms", default="", help="regular expression: only arms whose names match it")
    made.add_argument(
        "--quick", action="store_true", help="fewer steps and pictures, for the directions only"
    )
    made.add_argument(
        "--seeds", type=int, default=FULL.seeds, help="training seeds of each number (default 5)"
    )
    made.add_argument("--steps", type=int, help="training steps (default 40, with --quick 16)")
    made.add_argument(
        "--model", type=Path, default=ROOT / "assets/demo/sdxl", help="diffusers folder of the base"
    )
    made.add_argument("--subjects", type=Path, help="folder with one folder of photographs for each subject")
    made.add_argument("--styles", type=Path, help="folder with one folder of pictures for each style")
    made.add_argument(
        "--scorer",
        choices=("judge", "clip", "dino"),
        default="judge",
        help="what recognises contents and styles (judge: of the shipped models)",
    )
    made.add_argument("--scorer_path", type=Path, help="local folder of the CLIP or DINO model")
    made.add_argument("--resolution", type=int, default=512, help="side of the photographs (default 512)")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument(
        "--output_dir", type=Path, help="folder of JSON and figures (default: this repository's)"
    )
    return made


def build(options: argparse.Namespace) -> Bench:
    """Load the model, the pictures and the scorer. Raises `Refused` for options that do not go together."""
    sizes = (QUICK if options.quick else FULL)._replace(seeds=options.seeds)
    sizes = sizes if options.steps is None else sizes._replace(steps=options.steps)
    folders = options.subjects is not None and options.styles is not None
    if (options.subjects is None) != (options.styles is None):
        raise Refused("--subjects and --styles belong together; give both folders, or neither")
    if folders == (options.scorer == "judge"):
        raise Refused(
            "the scorer judge knows only the shipped models; photographs need --scorer clip or dino"
        )
    if folders and options.scorer_path is None:
        raise Refused(f"--scorer {options.scorer} needs --scorer_path with a local folder of that model")
    if folders:
        world: Any = FolderWorld(options.subjects, options.styles, options.resolution)
        judge: Any = Nearest(options.scorer, options.scorer_path, world)
    else:
        world, judge = GlyphWorld(), Judge()
    return Bench(options.model, world, judge, sizes, cache_folder("claims"), options.device)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 after printing an error."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(arguments)
    results = (options.output_dir or ROOT / "benchmarks/results") / "claims"
    images = results if options.output_dir else ROOT / "docs/images/claims"
    try:
        claims = [load_claim(name) for name in options.claims or CLAIMS]
        bench = build(options)
        for claim in claims:
            arms = tuple(arm for arm in claim.arms if re.search(options.arms, arm.name))
            claim = replace(claim, arms=arms)
            facts = {
                "claim": claim.name,
                "title": claim.title,
                "paper": claim.paper,
                "command": shlex.join(["python", "benchmarks/claims/run.py", *arguments]),
                "model": options.model.name,
                "model_hash": bench.model_hash,
                "sizes": bench.sizes._asdict(),
            }
            results.mkdir(parents=True, exist_ok=True)
            images.mkdir(parents=True, exist_ok=True)
            ledger = Ledger(results / f"{claim.name}.json", facts)
            outcome = measure(bench, claim, ledger)
            ledger.save(outcome)
            draw_figure(claim, outcome, images / f"{claim.name}.svg")
            for statement in outcome["statements"]:
                print(
                    f"{claim.name}: {statement['text']}: {statement['verdict']} ({statement['difference']})"
                )
            if options.output_dir is None:
                PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8"), CLAIMS), encoding="utf-8")
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
