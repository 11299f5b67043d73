"""Compare this tree with a commit: the same recipes must write the same numbers, bit for bit.

    python tools/same_numbers.py main
    python tools/same_numbers.py HEAD~3 --only 'flux/*' --cache /tmp/numbers
    python tools/same_numbers.py main --allow 'sd15/masks' --allow '*/bf16'

Runs tools/recipes.py in a temporary git worktree of COMMIT and in this tree, on this machine, and compares
loss.csv, tensors, file metadata, JSON, options and pictures. Prints each difference; the exit code is 1 if
there is one that --allow does not cover.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.compare_runs import Difference, compare  # noqa: E402
from tools.recipes import Recipe, select  # noqa: E402
from tools.run_recipes import OUTPUT, RESULT  # noqa: E402

DRIVER = ROOT / "tools" / "run_recipes.py"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="tools/same_numbers.py", description="Compare the numbers of this tree with those of a commit."
    )
    made.add_argument("commit", nargs="?", help="commit, branch or tag to compare with")
    made.add_argument(
        "--only", action="append", default=[], help="pattern of recipe names, with * (repeatable)"
    )
    made.add_argument(
        "--allow", action="append", default=[], help="pattern of recipes that may differ (repeatable)"
    )
    made.add_argument("--keep", type=Path, help="folder for the results of both trees, which are kept")
    made.add_argument(
        "--cache", type=Path, help="folder that keeps the results of COMMIT for the next comparison"
    )
    made.add_argument(
        "--jobs", type=int, default=1, help="processes at once: 2 runs both trees at the same time (1)"
    )
    made.add_argument(
        "--list", action="store_true", help="print the recipes with their command lines and stop"
    )
    return made


def git(*words: str) -> str:
    """Standard output of git in this repository."""
    return subprocess.run(
        ["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def cache_key(commit: str) -> str:
    """A name for results: of the commit, the recipes, the libraries, the processor and the threads."""
    import importlib.metadata as installed

    names = ("torch", "numpy", "diffusers", "transformers", "safetensors", "peft", "lycoris-lora")
    facts = [platform.processor(), platform.node(), os.environ.get("OMP_NUM_THREADS", "1")]
    facts += [f"{name} {installed.version(name)}" for name in names if _is_installed(name)]
    facts += [(ROOT / "tools" / name).read_text() for name in ("recipes.py", "run_recipes.py")]
    return f"{commit[:12]}-{hashlib.sha256(chr(0).join(facts).encode()).hexdigest()[:12]}"


def _is_installed(name: str) -> bool:
    import importlib.metadata as installed

    try:
        installed.version(name)
    except installed.PackageNotFoundError:
        return False
    return True


def run_tree(tree: Path, work: Path, names: list[str]) -> None:
    """Run recipes in a process of their own."""
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, str(DRIVER), str(tree), str(work), *names]
    subprocess.run(command, check=True, cwd=tree, env=environment)


def run_both(commit: str, old: Path, new: Path, names: list[str], jobs: int) -> None:
    """Fill the work folders of the commit and of this tree."""
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", "--force", str(tree), commit)
        try:
            with ThreadPoolExecutor(max(1, min(2, jobs))) as pool:
                runs = [pool.submit(run_tree, *each, names) for each in ((tree, old), (ROOT, new))]
                for done in runs:
                    done.result()
        finally:
            git("worktree", "remove", "--force", str(tree))


def report(recipes: dict[str, Recipe], old: Path, new: Path, allow: list[str]) -> int:
    """Print a table of what differs; the number of recipes that differ and are not allowed to."""
    rows: list[tuple[str, Difference, bool]] = []
    for name, recipe in recipes.items():
        allowed = any(fnmatch(name, pattern) for pattern in allow)
        rows += [(name, difference, allowed) for difference in compare(old / name, new / name)]
        code = json.loads((new / name / RESULT).read_text())["code"]
        if bool(code) != recipe.refused:  # in both trees perhaps, but then nothing was compared
            rows.append((name, Difference(RESULT, f"exit code {code}, see {OUTPUT}"), allowed))
    if rows:
        print(f"{'recipe':<44} {'file':<34} {'first difference':<44} {'largest':>10}")
    for name, difference, allowed in rows:
        mark = "  (allowed)" if allowed else ""
        largest = "" if difference.largest is None else f"{difference.largest:.3g}"
        print(f"{name:<44} {difference.file:<34} {difference.where:<44} {largest:>10}{mark}")
    failed = {name for name, _, allowed in rows if not allowed}
    accepted = {name for name, _, allowed in rows if allowed}
    equal = len(recipes) - len(failed | accepted)
    print(f"{len(recipes)} recipes: {equal} equal, {len(failed)} failed, {len(accepted)} differ as allowed")
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
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as folder:
        kept = (given.keep or Path(folder)).resolve()
        old = given.cache.resolve() / cache_key(commit) if given.cache else kept / "old"
        new = kept / "new"
        shutil.rmtree(new, ignore_errors=True)
        if not given.cache:
            shutil.rmtree(old, ignore_errors=True)
        run_both(commit, old, new, list(recipes), given.jobs)
        return int(report(recipes, old, new, given.allow) > 0)


if __name__ == "__main__":
    sys.exit(main())
