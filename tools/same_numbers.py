"""Compare this tree with a commit: the same recipes must write the same numbers, bit for bit.

    python tools/same_numbers.py main
    python tools/same_numbers.py HEAD~3 --only 'flux/*' --cache /tmp/numbers
    python tools/same_numbers.py main --allow 'sd15/masks' --allow '*/bf16'

Runs the recipes of tools/recipes.py in a temporary git worktree of COMMIT and in this tree, on this machine,
and compares loss.csv, tensors, file metadata, JSON, options and pictures. Prints each difference; the exit
code is 1 if there is one that --allow does not cover. All recipes take about five minutes of a quiet core
for each tree; with --cache the results of COMMIT are kept, and only this tree is run the next time.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.compare_runs import Difference, compare  # noqa: E402
from tools.recipes import Recipe, every, select  # noqa: E402
from tools.run_recipes import (  # noqa: E402
    OUTPUT,
    RESULT,
    inputs_key,
    missing,
    read_result,
    recipe_keys,
    unexpected,
)

DRIVER = ROOT / "tools" / "run_recipes.py"
# What may change the last bits of a result.
LIBRARIES = ("torch", "numpy", "diffusers", "transformers", "safetensors", "peft", "lycoris-lora")
SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="tools/same_numbers.py", description="Compare the numbers of this tree with those of a commit."
    )
    arguments.add_argument("commit", nargs="?", help="commit, branch or tag to compare with")
    arguments.add_argument(
        "--only", action="append", default=[], help="pattern of recipe names, with * (repeatable)"
    )
    arguments.add_argument(
        "--allow", action="append", default=[], help="pattern of recipes that may differ (repeatable)"
    )
    arguments.add_argument("--keep", type=Path, help="folder for the results of both trees, which are kept")
    arguments.add_argument(
        "--cache", type=Path, help="folder that keeps the results of COMMIT for the next comparison"
    )
    arguments.add_argument(
        "--jobs", type=int, default=1, help="processes at once: 2 runs both trees at the same time (1)"
    )
    arguments.add_argument(
        "--list", action="store_true", help="print the recipes with their command lines and stop"
    )
    return arguments


def git(*words: str) -> str:
    """Standard output of git in this repository."""
    return subprocess.run(
        ["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def cache_name(commit: str) -> str:
    """The folder of a commit's results: of the commit, the libraries, the machine and its settings.

    The recipes are not in the name: each result has a key of its own (run_recipes.recipe_keys).
    """
    facts = [platform.processor(), platform.node(), sys.version]
    facts += [f"{name} {os.environ.get(name, '')}" for name in SETTINGS]
    facts += [f"{name} {_version(name)}" for name in LIBRARIES]
    return f"{commit[:12]}-{hashlib.sha256(chr(0).join(facts).encode()).hexdigest()[:12]}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def run_tree(tree: Path, work: Path, names: list[str]) -> None:
    """Run recipes with the scripts of a tree, in a process of their own."""
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, str(DRIVER), str(tree), str(work), *names]
    subprocess.run(command, check=True, cwd=tree, env=environment)


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A temporary checkout of a commit."""
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", "--force", str(tree), commit)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def run_commit(commit: str, work: Path, recipes: dict[str, Recipe]) -> None:
    """Run the recipes of which the work folder has no result, with the scripts of a commit."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two comparisons may use one cache
        keys = recipe_keys(every(), inputs_key(ROOT))
        absent = missing(recipes, work, keys)
        print(f"{commit[:12]}: {len(recipes) - len(absent)} cached, {len(absent)} to run", flush=True)
        if absent:
            with worktree(commit) as tree:
                run_tree(tree, work, list(absent))


def report(recipes: dict[str, Recipe], old: Path, new: Path, allow: list[str]) -> int:
    """Print a table of what differs; return the number of recipes that failed.

    A recipe fails if it differs and no pattern of `allow` covers it, or if its exit code is not the expected
    one: then the recipe may be equal in both trees, but nothing was compared.
    """
    rows: list[tuple[str, Difference, bool]] = []
    for name, recipe in recipes.items():
        allowed = any(fnmatch(name, pattern) for pattern in allow)
        differences = compare(old / name, new / name)
        code = read_result(new / name).get("code")
        if unexpected(recipe, code):
            differences.append(Difference(RESULT, f"exit code {code}, see {OUTPUT}"))
        rows += [(name, difference, allowed) for difference in differences]
    if rows:
        print(f"{'recipe':<44} {'file':<34} {'first difference':<44} {'largest':>10}")
    for name, difference, allowed in rows:
        mark = "  (allowed)" if allowed else ""
        largest = "" if difference.largest is None else f"{difference.largest:.3g}"
        print(f"{name:<44} {difference.file:<34} {difference.where:<44} {largest:>10}{mark}")
    failed = {name for name, _, allowed in rows if not allowed}
    accepted = {name for name, _, allowed in rows if allowed}
    equal = len(recipes) - len(failed | accepted)
    print(f"{len(recipes)} recipes: {equal} equal, {len(failed)} differ, {len(accepted)} differ as allowed")
    return len(failed)


def main(argv: list[str] | None = None) -> int:
    """Compare, and return 1 if anything differs."""
    given = parser().parse_args(argv)
    recipes = select(given.only)
    if given.list or not given.commit:
        for recipe in recipes.values():
            print(recipe.name, recipe.script, *recipe.words)
        return 0 if given.list else 2
    if not recipes:
        print(f"error: no recipe matches {', '.join(given.only)}; --list prints all", file=sys.stderr)
        return 2
    commit = git("rev-parse", "--verify", f"{given.commit}^{{commit}}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as folder:
        kept = (given.keep or Path(folder)).resolve()
        old = given.cache.resolve() / cache_name(commit) if given.cache else kept / "old"
        new = kept / "new"
        shutil.rmtree(new, ignore_errors=True)
        if not given.cache:
            shutil.rmtree(old, ignore_errors=True)
        with ThreadPoolExecutor(max(1, min(2, given.jobs))) as pool:
            runs = [
                pool.submit(run_commit, commit, old, recipes),
                pool.submit(run_tree, ROOT, new, list(recipes)),
            ]
            for done in runs:
                done.result()
        return int(report(recipes, old, new, given.allow) > 0)


if __name__ == "__main__":
    sys.exit(main())
