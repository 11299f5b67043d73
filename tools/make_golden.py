"""Write tests/golden/losses.json: the losses of training recipes, for tests/e2e/test_golden_losses.py.

    python tools/make_golden.py                      all of them: two minutes of a quiet core
    python tools/make_golden.py --only 'flux/*'      these alone; the other losses stay
    python tools/make_golden.py --results FOLDER     from a folder of tools/same_numbers.py, without training
    python tools/make_golden.py --spread --only 'flux/*'      measure what another processor could change

A commit that is meant to change numbers makes the golden losses again and gives the reason.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.recipes import Recipe, every  # noqa: E402
from tools.run_recipes import OUTPUT, read_result, run, write_data  # noqa: E402

LOSSES = ROOT / "tests" / "golden" / "losses.json"
DRIVER = ROOT / "tools" / "run_recipes.py"
# Settings under which torch chooses other kernels, as it does on other processors.
SETTINGS: dict[str, dict[str, str]] = {
    "this processor": {},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "ATen without vectors": {"ATEN_CPU_CAPABILITY": "default"},
    "ATen with AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "oneDNN with SSE4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "oneDNN with AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "without oneDNN": {"LOWRANK_GOLDEN_MKLDNN": "0"},
}
WITHOUT_ONEDNN = "import runpy, sys, torch; torch.backends.mkldnn.enabled = False; del sys.argv[0]; "
WITHOUT_ONEDNN += "sys.path.insert(0, ''); runpy.run_path(sys.argv[0], run_name='__main__')"


def golden_recipes() -> dict[str, Recipe]:
    """Every network of every family, and every option set of SD 1.5 and FLUX: SDXL shares those of SD 1.5."""
    networks = {path.stem for path in (ROOT / "networks").glob("[!_]*.py")}
    return {
        name: recipe
        for name, recipe in every().items()
        if recipe.trains and (not name.startswith("sdxl/") or name.split("/")[1] in networks)
    }


def read_losses(folder: Path) -> list[float]:
    """The loss of each step that a training run wrote."""
    text = (folder / "loss.csv").read_text(encoding="utf-8")
    return [float(row["loss"]) for row in csv.DictReader(text.splitlines())]


def run_training(name: str, work: Path) -> list[float]:
    """The losses of a training recipe, run in this process after the recipes that it reads."""
    work.mkdir(parents=True, exist_ok=True)
    write_data(ROOT, work)
    _run(name, every(), work)
    return read_losses(work / name)


def _run(name: str, recipes: dict[str, Recipe], work: Path) -> None:
    if read_result(work / name):
        return
    for needed in recipes[name].needs:
        _run(needed, recipes, work)
    if run(ROOT, work, recipes[name]):
        raise RuntimeError(f"{name} failed: {(work / name / OUTPUT).read_text(encoding='utf-8')}")


def difference(expected: list[float], losses: list[float]) -> float:
    """The largest difference of a step's loss, relative to the expected loss."""
    return max(abs(new - old) / abs(old) for old, new in zip(expected, losses, strict=True))


def print_spread(names: list[str]) -> None:
    """Print, for each setting and recipe, the largest relative difference from this processor's losses."""
    recipes = every()
    words = [*names, *(needed for name in names for needed in recipes[name].needs)]
    expected: dict[str, list[float]] = {}
    for title, setting in SETTINGS.items():
        start = ["-c", WITHOUT_ONEDNN] if "LOWRANK_GOLDEN_MKLDNN" in setting else []
        environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"} | setting
        with tempfile.TemporaryDirectory(prefix="golden-") as work:
            command = [sys.executable, *start, str(DRIVER), str(ROOT), work, *words]
            subprocess.run(command, check=True, cwd=ROOT, env=environment)
            losses = {name: read_losses(Path(work) / name) for name in names}
        expected = expected or losses
        for name in names:
            print(f"{title:<22} {name:<40} {difference(expected[name], losses[name]):.1e}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Write the file, or measure the spread."""
    parser = argparse.ArgumentParser(prog="tools/make_golden.py", description="Write the golden losses.")
    parser.add_argument("--only", action="append", default=[], help="pattern of recipe names (repeatable)")
    parser.add_argument("--results", type=Path, help="work folder that holds the results already")
    parser.add_argument(
        "--spread", action="store_true", help="print how far the losses move with torch's choice of kernels"
    )
    given = parser.parse_args(argv)
    names = [name for name in golden_recipes() if any(fnmatch(name, each) for each in given.only or ["*"])]
    if not names:
        parser.error(f"no training recipe matches {', '.join(given.only)}")
    if given.spread:
        print_spread(names)
        return 0
    losses = json.loads(LOSSES.read_text(encoding="utf-8")) if LOSSES.exists() else {}
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        for name in names:
            trained = read_losses(given.results / name) if given.results else run_training(name, Path(folder))
            losses[name] = [float(f"{loss:.9g}") for loss in trained]  # all digits of a float32
    rows = ",\n".join(f'  "{name}": {losses[name]}' for name in golden_recipes() if name in losses)
    LOSSES.write_text(f"{{\n{rows}\n}}\n", encoding="utf-8")
    print(f"{LOSSES}: {len(names)} recipes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
