"""One long run with everything on, measured from outside: memory, open files, threads, sizes of logs.

The smallest model (FLUX) trains routed experts behind T-LoRA's gate, with saving, sampling, validation and
EMA. A run that was cut continues from its last checkpoint; each of its processes is measured on its own.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from kills import LAYERS, SCRIPTS, World, make_world
from processes import call, run_script

from lowrank.train.checkpoints import checkpoints

FAMILY = "flux"
WARM = 0.1  # the share of the steps of a process after which its memory must not grow
GROWTH = 1.01
COLUMNS = ("memory", "open files", "threads")


def measure(work: Path, steps: int) -> dict[str, Any]:
    """Train and measure; the facts, and what is not flat under "problems"."""
    work.mkdir(parents=True, exist_ok=True)
    world, out, record = make_world(work, FAMILY), work / "out", work / "samples.jsonl"
    every = max(4, steps // 40)
    begin = time.monotonic()
    code = _run(world, out, work / "log", steps, every, record)
    seconds = round(time.monotonic() - begin)
    problems = [] if code == 0 else [f"exit code {code}: {(work / 'log').read_text()[-500:]}"]
    facts: dict[str, Any] = {"steps": steps, "seconds of the last process": seconds}
    processes = _processes(record)
    for number, samples in enumerate(processes):
        peaks, found = _growth(samples)
        name = f"process {number + 1} of {len(processes)}: " if len(processes) > 1 else ""
        problems += [f"{name}{problem}" for problem in found]
        if peaks:
            facts |= {f"{name}{column}": pair for column, pair in zip(COLUMNS, peaks, strict=True)}
    problems += _files(out, steps, every)
    facts["bytes of loss.csv per step"] = round((out / "loss.csv").stat().st_size / steps, 1)
    facts["bytes of log per step"] = round((work / "log").stat().st_size / steps, 1)
    return facts | {"problems": problems}


def _run(world: World, out: Path, log: Path, steps: int, every: int, record: Path) -> int | None:
    """Start or continue the run, write a line of measurements every second, and return its exit code."""
    given = {
        **{"network_module": "gated_experts", "max_train_steps": steps, "sample_every_n_steps": every},
        **{"checkpointing_steps": every, "save_every_n_steps": every, "save_last_n_steps": 3 * every},
        **{"validation_split": 0.34, "validate_every_n_steps": every, "report_to": "tensorboard"},
        **{"save_every_n_epochs": 10**9, "validate_every_n_epochs": 10**9},
    }
    words = [word for flag, value in given.items() for word in (f"--{flag}", str(value))]
    words += ["--network_args", "num_experts=2", LAYERS]
    resume = ("--resume", "latest") if checkpoints(out) else ()
    environment = {"LOWRANK_CACHE": str(world.cache)}
    process = call(run_script, (SCRIPTS[FAMILY], *world.words(out), *words, *resume), log, environment)
    place = Path(f"/proc/{process.pid}")
    with open(record, "a") as file:
        while process.exitcode is None:
            process.join(1)
            try:
                pages = int((place / "statm").read_text().split()[1])
                files, threads = len(list((place / "fd").iterdir())), len(list((place / "task").iterdir()))
                step = (out / "loss.csv").read_bytes().count(b"\n") - 1
            except OSError:  # the process has ended, or has written no losses yet
                continue
            row = (process.pid, step, pages * os.sysconf("SC_PAGESIZE"), files, threads)
            file.write(json.dumps(row) + "\n")
            file.flush()
    return process.exitcode


def _processes(record: Path) -> list[list[list[int]]]:
    """The samples (step, memory, open files, threads) of each process of the run."""
    samples: dict[int, list[list[int]]] = {}
    for line in record.read_text().splitlines():
        pid, *row = json.loads(line)
        samples.setdefault(pid, []).append(row)
    return list(samples.values())


def _growth(samples: list[list[int]]) -> tuple[list[list[int]], list[str]]:
    """The peaks of the first and last quarter of the steps after the warm-up, by column; and what grew."""
    first, last = samples[0][0], samples[-1][0]
    begin = first + WARM * (last - first)
    quarter = (last - begin) / 4
    quarters = [
        [row for row in samples if begin <= row[0] <= begin + quarter],
        [row for row in samples if row[0] >= last - quarter],
    ]
    if min(map(len, quarters)) < 2:  # e.g. of a process that was killed at once
        return [], []
    columns = range(1, len(COLUMNS) + 1)
    peaks = [[max(row[column] for row in rows) for rows in quarters] for column in columns]
    limits = (GROWTH, 1.0, 1.0)
    return peaks, [
        f"{name} grew from {before} to {after}"
        for name, (before, after), limit in zip(COLUMNS, peaks, limits, strict=True)
        if after > limit * before
    ]


def _files(out: Path, steps: int, every: int) -> list[str]:
    """What is wrong with the step files, of which old ones are removed, and with the rows of the losses."""
    kept = sorted(int(path.stem.split("step")[-1]) for path in out.glob("*step*.safetensors"))
    last_saved = (steps - 1) // every * every
    wanted = [step for step in range(last_saved - 3 * every, last_saved + 1, every) if step > 0]
    rows = (out / "loss.csv").read_bytes().count(b"\n") - 1
    states = sorted(path.name for path in out.glob("*step*-state"))
    problems = [f"step files {kept}, not {wanted}"] if kept != wanted else []
    problems += [f"{len(states)} states of {len(wanted)} step files"] if len(states) != len(wanted) else []
    return problems + ([f"loss.csv has {rows} rows"] if rows != steps else [])
