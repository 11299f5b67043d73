"""Long tests of what docs/reliability.md promises. Counts accumulate in --folder, also of a run that was cut.

    python tools/soak.py faults --kills 200     real runs of the three families, killed and resumed
    python tools/soak.py fuzz --cases 100000    hostile input to every reader of files and texts
    python tools/soak.py long --steps 20000     one long run: memory, open files, threads, log sizes
    python tools/soak.py report                 the counts so far

Each command stops when the counts in --folder reach its number; delete the folder to begin anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

FOLDER = Path(tempfile.gettempdir()) / "lowrank-soak"


class Counts:
    """A file of JSON lines, one for each thing that was done; it is read again when a run was cut."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                self.rows.append(json.loads(line))
            except json.JSONDecodeError:  # the run was killed while it wrote this line
                continue

    def add(self, **facts: Any) -> None:
        self.rows.append(facts)
        with open(self._path, "a") as file:
            file.write(json.dumps(facts) + "\n")

    def total(self, name: str) -> int:
        return sum(row.get(name, 0) for row in self.rows)


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


def _print_faults(counts: Counts) -> bool:
    kinds = ("kill", "term", "term2", "int", "full", "limit")
    for family in sorted({row["family"] for row in counts.rows}):
        rows = [row for row in counts.rows if row["family"] == family]
        done = ", ".join(f"{kind} {sum(row.get(kind, 0) for row in rows)}" for kind in kinds)
        print(f"faults {family}: {len(rows)} lives; strikes: {done}")
    problems = [problem for row in counts.rows for problem in row["problems"]]
    print(f"faults: {counts.total('kill')} kills, {len(problems)} problems", *problems[:10], sep="\n  ")
    return not problems


def _print_fuzz(counts: Counts) -> bool:
    by_reader: Counter[str] = Counter()
    for row in counts.rows:
        by_reader.update(row["readers"])
    for reader, cases in sorted(by_reader.items()):
        print(f"fuzz {reader}: {cases} cases")
    problems = [problem for row in counts.rows for problem in row["problems"]]
    slowest = max((row["slowest"] for row in counts.rows), default=0.0)
    memory = max((row["memory"] for row in counts.rows), default=0)
    print(
        f"fuzz: {counts.total('cases')} cases, {len(problems)} problems, slowest {slowest:.1f} s, "
        f"largest growth of memory in a case {memory >> 20} MiB"
    )
    for problem in problems[:20]:
        print(f"  {problem}")
    return not problems


def _print_long(counts: Counts) -> bool:
    for row in counts.rows:
        print("long: " + ", ".join(f"{key} {value}" for key, value in row.items()))
    return not any(row["problems"] for row in counts.rows)


def report(folder: Path) -> int:
    """Print the counts in a folder; the exit code is 1 if there is a problem among them."""
    printers: dict[str, Callable[[Counts], bool]] = {
        "faults": _print_faults, "fuzz": _print_fuzz, "long": _print_long,
    }  # fmt: skip
    fine = True
    for name, printer in printers.items():
        if (folder / f"{name}.jsonl").exists():
            fine &= printer(Counts(folder / f"{name}.jsonl"))
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
