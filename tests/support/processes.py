"""Root scripts in processes of their own, forked from one server that has imported torch and diffusers once.

A new interpreter needs seconds of CPU before a script's first line; a fork of the server needs none.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from repository import ROOT

IMPORTED = ("lowrank.cli.flux_train", "lowrank.cli.sd_train", "lowrank.cli.train_jobs", "networks.effilora")


def _call(function: Callable, words: Sequence, environment: Mapping[str, str], log: str) -> None:
    """`function(*words)` with one thread, its output in LOG."""
    import torch

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*words)


def run_script(script: str, *words: str) -> None:
    """The script as `python SCRIPT WORDS` runs it."""
    sys.argv = [script, *words]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def call(
    function: Callable, words: Sequence, log: Path, environment: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """A process that runs a function of `tests/support`, as `start` runs a script."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    process = context.Process(target=_call, args=(function, list(words), environment or {}, str(log)))
    process.start()
    return process


def start(
    script: str, words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """A running process; its output goes to LOG, a signal to its `pid`, its exit code is `exitcode`."""
    return call(run_script, (script, *words), log, environment)


def finished(process: ForkServerProcess, seconds: float = 240) -> int:
    """The exit code of a process that is waited for, and killed if it does not end."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"the process did not end within {seconds} s")
    return process.exitcode


def ranks(environment: Mapping[str, str] | None = None, count: int = 2) -> list[dict[str, str]]:
    """For each of `count` CPU processes, the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        **(environment or {}),
    }
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def start_several(
    script: str,
    words: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    count: int = 2,
) -> list[ForkServerProcess]:
    """CPU processes with the variables that torchrun sets; logs in FOLDER/process-RANK.log."""
    return [
        start(script, words, folder / f"process-{rank}.log", variables)
        for rank, variables in enumerate(ranks(environment, count))
    ]


def launch_several(
    script: str,
    words: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    count: int = 2,
) -> None:
    """`start_several`; all processes must succeed."""
    codes = [finished(process) for process in start_several(script, words, folder, environment, count)]
    logs = [folder / f"process-{rank}.log" for rank in range(count)]
    assert codes == [0] * count, "\n".join(log.read_text()[-3000:] for log in logs)
