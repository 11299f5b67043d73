"""One long run with everything on, measured from outside: memory, open files, threads, sizes of logs.

Half of the steps train T-LoRA, the other half routed experts (EffiLoRA), each with saving, sampling,
validation and EMA.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from kills import World, make_world
from processes import call, run_script

NETWORKS = {"tlora": (), "effilora": ("--network_args", "num_experts=2")}
WARM = 0.1  # the share of a run after which its memory must not grow
GROWTH = 1.01


def measure(work: Path, steps: int) -> dict[str, Any]:
    """Train and measure; the facts, and what is not flat under "problems"."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    world, problems = make_world(work, "sd15"), []
    facts: dict[str, Any] = {"steps": steps}
    for network, more in NETWORKS.items():
        half = max(20, steps // len(NETWORKS))
        samples = _run(world, work, network, half, more)
        facts |= {f"{network} {name}": value for name, value in samples.items() if name != "problems"}
        problems += [f"{network}: {problem}" for problem in samples["problems"]]
    return facts | {"problems": problems}


def _run(world: World, work: Path, network: str, steps: int, more: tuple[str, ...]) -> dict[str, Any]:
    out, log, every = work / network, work / f"{network}.log", max(4, steps // 40)
    given = {
        **{"network_module": f"networks.{network}", "max_train_steps": steps, "sample_every_n_steps": every},
        **{"checkpointing_steps": every, "save_every_n_steps": every, "save_last_n_steps": 3 * every},
        **{"validation_split": 0.34, "validate_every_n_steps": every, "report_to": "tensorboard"},
    }
    words = [word for flag, value in given.items() for word in (f"--{flag}", str(value))]
    begin = time.monotonic()
    process = call(run_script, ("train_network_ABM.py", *world.words(out), *words, *more), log)
    samples: list[tuple[int, int, int, int]] = []  # step, memory, open files, threads
    while process.exitcode is None:
        process.join(0.5)
        place = Path(f"/proc/{process.pid}")
        try:
            pages = int((place / "statm").read_text().split()[1])
            files, threads = len(list((place / "fd").iterdir())), len(list((place / "task").iterdir()))
            done = (out / "loss.csv").read_bytes().count(b"\n") - 1
        except OSError:  # the process has ended, or has written no losses yet
            continue
        if done > 0:
            samples.append((done, pages * os.sysconf("SC_PAGESIZE"), files, threads))
    problems = [] if process.exitcode == 0 else [f"exit code {process.exitcode}: {log.read_text()[-500:]}"]
    warm = [row for row in samples if row[0] >= WARM * steps]
    first, last = warm[: len(warm) // 4 + 1], warm[-(len(warm) // 4 + 1) :]
    peaks = [[max(row[column] for row in rows) for column in (1, 2, 3)] for rows in (first, last) if rows]
    if len(peaks) == 2:
        problems += [f"memory grew from {peaks[0][0]} to {peaks[1][0]}"] * (
            peaks[1][0] > GROWTH * peaks[0][0]
        )
        problems += [f"open files grew from {peaks[0][1]} to {peaks[1][1]}"] * (peaks[1][1] > peaks[0][1])
        problems += [f"threads grew from {peaks[0][2]} to {peaks[1][2]}"] * (peaks[1][2] > peaks[0][2])
    kept = sorted(int(path.stem[-8:]) for path in out.glob("cat-step*.safetensors"))
    last_saved = (steps - 1) // every * every
    wanted = list(range(last_saved - 3 * every, last_saved + 1, every))
    problems += [f"step files {kept}, not {wanted}"] * (kept != [step for step in wanted if step > 0])
    rows = (out / "loss.csv").read_bytes().count(b"\n") - 1
    problems += [f"loss.csv has {rows} rows"] * (rows != steps)
    return {
        "seconds": round(time.monotonic() - begin),
        "memory in MiB, first and last quarter": [peak[0] >> 20 for peak in peaks],
        "open files": [peak[1] for peak in peaks],
        "threads": [peak[2] for peak in peaks],
        "bytes of log per step": round(log.stat().st_size / steps, 1),
        "bytes of loss.csv per step": round((out / "loss.csv").stat().st_size / steps, 1),
        "problems": problems,
    }
