"""Long tests of what docs/reliability.md promises. Counts accumulate in --folder, also of a run that was cut.

    python tools/soak.py faults --kills 200     real runs of the three families, killed and resumed
    python tools/soak.py fuzz --cases 100000    hostile input to every reader of files and texts
    python tools/soak.py long --steps 20000     one long run: memory, open files, threads, log sizes
    python tools/soak.py report                 the counts so far

Each command stops when the counts of the present commit in --folder reach its number, so it can be cut and
started again; delete the folder to begin anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

FOLDER = Path(tempfile.gettempdir()) / "lowrank-soak"


# What a count is valid for. A change elsewhere, e.g. of a page, leaves counts valid.
PROGRAM = ("lowrank", "networks", "comfyui", ":(glob)*.py")


def commit() -> str:
    """The last commit that changed the program, with "+" if there are changes that are not committed."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words, "--", *PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("log", "-1", "--format=%h") + "+" * bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):  # not a clone, e.g. an unpacked archive
        return "unknown"


class Counts:
    """A file of JSON lines, one for each thing that was done; it is read again when a run was cut.

    Each line has the commit that was tested. Totals are of the present commit only.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.commit = path, commit()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                self.rows.append(json.loads(line))
            except json.JSONDecodeError:  # the run was killed while it wrote this line
                continue

    def add(self, **facts: Any) -> None:
        facts = {"commit": self.commit} | facts
        self.rows.append(facts)
        with open(self._path, "a") as file:
            file.write(json.dumps(facts) + "\n")

    def total(self, name: str) -> int:
        return sum(row.get(name, 0) for row in self.rows if row["commit"] == self.commit)

    def by_commit(self) -> dict[str, list[dict[str, Any]]]:
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            groups.setdefault(row["commit"], []).append(row)
        return groups


def faults(folder: Path, kills: int) -> int:
    """Kill and resume real runs until `kills` were killed; each life is compared with an undisturbed run."""
    from kills import lives  # pyright: ignore[reportMissingImports]  # in tests/support

    counts = Counts(folder / "faults.jsonl")
    lifetimes: Iterator[dict[str, Any]] = lives(folder / "work", first=len(counts.rows))
    while counts.total("kill") < kills:
        row = next(lifetimes)
        counts.add(**row)
        print(json.dumps(row), flush=True)
    return report(folder)


def fuzz(folder: Path, cases: int) -> int:
    """Give hostile input to every reader until `cases` were given."""
    from fuzzing import campaign  # pyright: ignore[reportMissingImports]  # in tests/support

    counts = Counts(folder / "fuzz.jsonl")
    while counts.total("cases") < cases:
        row = campaign(seed=len(counts.rows), cases=2_000, work=folder / "work")
        counts.add(**row)
        print(json.dumps(row), flush=True)
    return report(folder)


def long(folder: Path, steps: int) -> int:
    """Train `steps` steps with everything on, and measure the process every few hundred steps."""
    from long_run import measure  # pyright: ignore[reportMissingImports]  # in tests/support

    counts = Counts(folder / "long.jsonl")
    if counts.total("steps") < steps:
        counts.add(**measure(folder / "work" / "long", steps))
    return report(folder)


_FACTS = ("commit", "life", "family", "scene", "problems")  # of a life; the others are numbers of strikes


def _print_faults(rows: list[dict[str, Any]]) -> list[str]:
    for family in sorted({row["family"] for row in rows}):
        strikes: Counter[str] = Counter()
        lives = [row for row in rows if row["family"] == family]
        for row in lives:
            strikes.update({name: count for name, count in row.items() if name not in _FACTS})
        done = ", ".join(f"{name} {count}" for name, count in sorted(strikes.items()))
        print(f"  {family}: {len(lives)} lives; {done}")
    problems = [problem for row in rows for problem in row["problems"]]
    kinds = {
        "bit differences": "differs: ", "lost or extra files": "only in one: ", "leftovers": "leftover: "
    }  # fmt: skip
    counts = {name: sum(problem.startswith(start) for problem in problems) for name, start in kinds.items()}
    counts["other problems (unreadable files, tracebacks, exit codes)"] = len(problems) - sum(counts.values())
    kills = sum(row.get("kill", 0) for row in rows)
    print(f"  {kills} kills: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return problems


def _print_fuzz(rows: list[dict[str, Any]]) -> list[str]:
    by_reader: Counter[str] = Counter()
    for row in rows:
        by_reader.update(row["readers"])
    for reader, cases in sorted(by_reader.items()):
        print(f"  {reader}: {cases} cases")
    problems = [problem for row in rows for problem in row["problems"]]
    print(
        f"  {sum(row['cases'] for row in rows)} cases of {len(by_reader)} readers, {len(problems)} problems, "
        f"slowest {max(row['slowest'] for row in rows):.1f} s of CPU time, "
        f"largest growth of memory in a case {max(row['memory'] for row in rows) >> 20} MiB"
    )
    return problems


def _print_long(rows: list[dict[str, Any]]) -> list[str]:
    for row in rows:
        facts = {name: fact for name, fact in row.items() if name not in ("commit", "problems")}
        print("  " + ", ".join(f"{name} {fact}" for name, fact in facts.items()))
    return [problem for row in rows for problem in row["problems"]]


def report(folder: Path) -> int:
    """Print the counts in a folder by commit; the exit code is 1 if there is a problem among them."""
    printers = {"faults": _print_faults, "fuzz": _print_fuzz, "long": _print_long}
    fine = True
    for name, printer in printers.items():
        if not (folder / f"{name}.jsonl").exists():
            continue
        for tested, rows in Counts(folder / f"{name}.jsonl").by_commit().items():
            print(f"{name}, commit {tested}:")
            problems = printer(rows)
            fine &= not problems
            for problem in problems[:20]:
                print(f"    {problem}")
    return 0 if fine else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("faults", "fuzz", "long", "report"))
    parser.add_argument("--kills", type=int, default=200, help="number of kills of real runs")
    parser.add_argument("--cases", type=int, default=100_000, help="number of hostile inputs")
    parser.add_argument("--steps", type=int, default=20_000, help="steps of the long run")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where counts are kept ({FOLDER})")
    given = parser.parse_args(argv)
    begin = time.monotonic()
    commands = {
        "faults": lambda: faults(given.folder, given.kills),
        "fuzz": lambda: fuzz(given.folder, given.cases),
        "long": lambda: long(given.folder, given.steps),
        "report": lambda: report(given.folder),
    }
    code = commands[given.what]()
    print(f"{time.monotonic() - begin:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
