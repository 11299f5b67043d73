"""Real runs that are killed, stopped or starved at chosen moments, and what must be true afterwards.

A run is a process of the fork server with a `Fault`: an audit hook counts the run's own file operations (open
for writing, rename, remove, mkdir) in its folder, and strikes at one of them; so moments are near file
activity. `Wait` strikes from outside after a time. `check_folder` is true after every strike, and
`differences` compares with a run that was not disturbed.
"""

from __future__ import annotations

import csv
import itertools
import os
import random
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from processes import call, finished, run_script
from safetensors.torch import load_file

from lowrank.train.checkpoints import checkpoints, read_checkpoint

STEPS, EVERY, LAST = 8, 2, 3  # of the runs; a step file is removed when it is more than LAST steps old
SCRIPTS = {
    "sd15": "train_network_ABM.py",
    "sdxl": "sdxl_train_network_ABM.py",
    "flux": "flux_train_qrlora.py",
}
FAMILIES = tuple(SCRIPTS)


# ------------------------------------------------------------------ inside the run


@dataclass(frozen=True)
class Fault:
    """What happens at the file operation number `at` (from 1) below `folder`, in the process of the run.

    "kill", "term" and "int" send that signal, "term2" sends it twice; "full" lets this operation and every
    later one that needs space fail, as a full disk does; "limit" lets no file become larger than `at` bytes.
    """

    kind: str
    at: int
    folder: str

    def install(self) -> None:
        if self.kind == "limit":
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (self.at, self.at))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            return
        count = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count
            if not self._is_operation(event, arguments):
                return
            count += 1
            if count >= self.at and self.kind == "full" and event in ("open", "os.mkdir"):
                raise OSError(28, "No space left on device", str(arguments[0]))
            if count == self.at and self.kind != "full":
                sent = (
                    signal.SIGKILL if self.kind == "kill" else signal.SIGINT if self.kind == "int" else None
                )
                for _ in range(2 if self.kind == "term2" else 1):
                    os.kill(os.getpid(), sent or signal.SIGTERM)

        sys.addaudithook(hook)

    def _is_operation(self, event: str, arguments: tuple) -> bool:
        if event == "open":
            _, mode, flags = arguments
            writes = any(letter in (mode or "") for letter in "wax+") or (
                isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
            )
            if not writes:
                return False
        elif event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            return False
        return isinstance(arguments[0], (str, os.PathLike)) and str(arguments[0]).startswith(self.folder)


def run_with_fault(fault: Fault | None, script: str, *words: str) -> None:
    """The script as `python SCRIPT WORDS` runs it, with a fault."""
    if fault:
        fault.install()
    run_script(script, *words)


# ------------------------------------------------------------------ the runs


@dataclass(frozen=True)
class World:
    """Where the models, pictures and caches of a family's runs are."""

    family: str
    model: Path
    pictures: Path
    cache: Path

    def words(self, out: Path, *more: str) -> list[str]:
        """The command line of a run that saves in every way, as often as it can."""
        given: dict[str, Any] = {
            "pretrained_model_name_or_path": self.model,
            "output_dir": out,
            "output_name": "cat",
            "network_module": "networks.lora",
            "resolution": 64,
            "max_train_steps": STEPS,
            "learning_rate": 1e-2,
            "seed": 0,
            "max_data_loader_n_workers": 0,
            "checkpointing_steps": EVERY,
            "checkpoints_total_limit": 2,
            "save_every_n_steps": EVERY,
            "save_last_n_steps": LAST,
            "save_every_n_epochs": 1,
            "ema_decay": 0.5,
            "sample_prompts": self.pictures / "prompts.txt",
            "sample_every_n_steps": 4,
        }
        given |= (
            {"instance_data_dir": self.pictures / "3_cat", "instance_prompt": "a cat", "rank": 2}
            if self.family == "flux"
            else {"train_data_dir": self.pictures, "network_dim": 2}
        )
        words = [word for flag, value in given.items() for word in (f"--{flag}", str(value))]
        return [*words, "--save_state", "--cache_latents", "--cache_latents_to_disk", *more]

    def start(
        self, out: Path, log: Path, fault: Fault | None = None, more: Sequence[str] = ()
    ) -> ForkServerProcess:
        """A run in its own process, resumed from the newest checkpoint if there is one."""
        resume = ("--resume", "latest") if checkpoints(out) else ()
        words = (fault, SCRIPTS[self.family], *self.words(out, *resume, *more))
        return call(run_with_fault, words, log, {"LOWRANK_CACHE": str(self.cache)})

    def run(self, out: Path, log: Path, fault: Fault | None = None, more: Sequence[str] = ()) -> int:
        """The exit code of a run."""
        return finished(self.start(out, log, fault, more))


def make_pictures(folder: Path) -> Path:
    """Three pictures in two buckets with captions, in kohya's layout, and a prompt file."""
    (folder / "3_cat").mkdir(parents=True)
    for index, size in enumerate([(64, 64), (96, 64), (64, 64)]):
        path = folder / "3_cat" / f"{index}.png"
        Image.new("RGB", size, (80 * index, 120, 255 - 80 * index)).save(path)
        path.with_suffix(".caption").write_text(f"a cat, number {index}")
    (folder / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1 --d 1\n")
    return folder


# ------------------------------------------------------------------ what must be true


def check_folder(out: Path, log: Path) -> None:
    """After every strike: what has a final name is whole, and the log has no traceback."""
    for path in out.rglob("*.safetensors"):
        if not any(part.startswith(".") for part in path.relative_to(out).parts):
            load_file(path)
    for folder in (*out.glob("*-state"), *out.glob("checkpoint-*")):
        read_checkpoint(folder)
    for path in out.glob("sample/[!.]*.png"):
        Image.open(path).load()
    printed = log.read_text(errors="replace") if log.exists() else ""
    assert "Traceback" not in printed, printed[-3000:]


def leftovers(*folders: Path) -> list[Path]:
    """Hidden files and folders, which are temporary."""
    return [path for folder in folders for path in folder.rglob(".*")]


def names(out: Path) -> set[str]:
    """The files of a run without logs, and pictures without the time in their names.

    The pictures of the final file are drawn after everything is saved: a kill there leaves them out.
    """
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    kept = {name for name in found if not name.startswith(("logs/", "runs/", "sample/cat_final"))}
    return {re.sub(r"_\d{14}_", "_", name) for name in kept}


def differences(whole: Path, out: Path) -> list[str]:
    """What differs between an undisturbed run and a resumed one: files, and any bit of a tensor."""
    found = [f"only in one: {name}" for name in sorted(names(whole) ^ names(out))]
    for path in sorted(whole.rglob("*")):
        name, other = path.relative_to(whole), out / path.relative_to(whole)
        if not other.is_file():
            continue
        if path.suffix == ".safetensors":
            first, second = load_file(path), load_file(other)
        elif path.name == "optimizer.bin":
            first, second = (_flat(torch.load(file, weights_only=True)) for file in (path, other))
        else:
            continue
        equal = first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        found += [] if equal else [f"differs: {name}"]
    first, second = (_losses(folder) for folder in (whole, out))
    return found + ([] if first == second else ["differs: loss.csv"])


def _flat(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {
        f"{index}.{key}": value
        for index, values in state["state"].items()
        for key, value in values.items()
        if isinstance(value, torch.Tensor)
    }


def _losses(folder: Path) -> list[tuple[str, str]]:
    with open(folder / "loss.csv", newline="") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


# ------------------------------------------------------------------ lives


def make_world(work: Path, family: str) -> World:
    """The models and pictures of a family; made once in a folder."""
    from tools import make_tiny_flux, make_tiny_sd

    model, pictures = work / family, work / "pictures"
    if not pictures.exists():
        make_pictures(pictures)
    if not model.exists():
        make_tiny_flux.make(model) if family == "flux" else make_tiny_sd.make(model, family)
    return World(family, model, pictures, work / f"cache-{family}")


KINDS = ("kill", "term", "term2", "int", "full", "limit")
_WEIGHTS = (80, 4, 4, 4, 4, 4)


def strike(world: World, out: Path, log: Path, kind: str, at: int, wait: float | None = None) -> int:
    """Start or continue a run with a fault, and check its folder and its last line; return the exit code.

    With `wait`, a run is killed from outside after so many seconds.
    """
    if wait is None:
        code = world.run(out, log, Fault(kind, at, str(out)))
    else:
        process = world.start(out, log)
        process.join(wait)
        process.kill()
        code = finished(process)
    check_folder(out, log)
    if kind in ("full", "limit") and code:
        last = log.read_text().strip().splitlines()[-1]
        assert code == 1 and last.startswith("error: "), f"{kind} {at}: exit code {code}, {last}"
    return code


def is_over(code: int, log: Path) -> bool:
    """Whether a run reached its end, or found that an earlier one had."""
    return code == 0 or (code == 1 and f"the run ends at {STEPS}" in log.read_text())


def live(world: World, whole: Path, out: Path, rng: random.Random, most: int) -> dict[str, Any]:
    """One run that is struck up to `most` times, then ends; the counts, and what is wrong with it."""
    log, counts, problems = out.with_suffix(".log"), Counter(), []
    code = 1
    try:
        for _ in range(most):
            kind = rng.choices(KINDS, _WEIGHTS)[0]
            wait = rng.uniform(0, 3) if kind == "kill" and rng.random() < 0.25 else None
            at = rng.choice((2_000, 20_000, 60_000, 100_000)) if kind == "limit" else rng.randint(1, 120)
            code = strike(world, out, log, kind, at, wait)
            counts[kind] += code != 0
            if is_over(code, log):
                break
        if not is_over(code, log):
            code = world.run(out, log)
            check_folder(out, log)
        if not is_over(code, log):
            problems.append(f"exit code {code}: {log.read_text()[-500:]}")
        problems += differences(whole, out) + [f"leftover: {path}" for path in leftovers(out, world.cache)]
    except (AssertionError, ValueError, OSError) as error:  # ValueError: a checkpoint that is not whole
        problems.append(f"{type(error).__name__}: {str(error)[-1000:]}")
    return {"family": world.family, **counts, "problems": problems}


def lives(work: Path, first: int = 0) -> Iterator[dict[str, Any]]:
    """Endless lives of the three families in turn; the number of a life is the seed of its strikes."""
    work.mkdir(parents=True, exist_ok=True)
    worlds = [make_world(work, family) for family in FAMILIES]
    for world in worlds:
        if not (work / f"whole-{world.family}" / "cat-state").exists():
            shutil.rmtree(work / f"whole-{world.family}", ignore_errors=True)
            assert world.run(work / f"whole-{world.family}", work / "whole.log") == 0
    for number in itertools.count(first):
        world, out = worlds[number % len(worlds)], work / f"life-{number}"
        shutil.rmtree(out, ignore_errors=True)  # of a soak that was cut
        if number % 5 == 0:
            shutil.rmtree(world.cache, ignore_errors=True)  # so that caches are written under fire too
        row = {"life": number} | live(world, work / f"whole-{world.family}", out, random.Random(number), 8)
        yield row
        if not row["problems"]:
            shutil.rmtree(out)
