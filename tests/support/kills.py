"""Real runs that are killed, stopped or starved at chosen moments, and what must be true afterwards.

A run is a process of the fork server with a `Fault`: an audit hook counts the run's own file operations (open
for writing, rename, remove, mkdir) in its folder, and strikes at one of them; so moments are near file
activity. `Wait` strikes from outside after a time. `check_folder` is true after every strike, and
`differences` compares with a run that was not disturbed.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from processes import call, finished, ranks, run_script
from safetensors.torch import load_file

from lowrank.train.checkpoints import checkpoints, read_checkpoint

STEPS, EVERY, LAST = 8, 2, 3  # of the runs; a step file is removed when it is more than LAST steps old
SCRIPTS = {
    "sd15": "train_network_ABM.py",
    "sdxl": "sdxl_train_network_ABM.py",
    "flux": "flux_train_qrlora.py",
}
FAMILIES = tuple(SCRIPTS)
LAYERS = "exclude=^(?!.*(to_q|q_proj)$)"  # few layers, so that a run is short


# ------------------------------------------------------------------ inside the run


_SIGNALS = {
    "kill": (signal.SIGKILL,),
    "term": (signal.SIGTERM,),
    "term2": (signal.SIGTERM, signal.SIGTERM),
    "int": (signal.SIGINT,),
}


@dataclass(frozen=True)
class Fault:
    """What happens at the file operation number `at` (from 1) below `folder`, in the process of the run.

    "kill", "term" and "int" send that signal, "term2" sends it twice; "save" and "stop" make that file in the
    folder; "full" lets this operation and every later one that needs space fail, as a full disk does, and
    "readonly" all later ones; "limit" lets no file become larger than `at` bytes; "none" does nothing.
    From the start of the run its clock is `clock` seconds wrong.
    """

    kind: str
    at: int
    folder: str
    clock: float = 0.0

    def install(self) -> None:
        if self.clock:
            true_time = time.time
            time.time = lambda: true_time() + self.clock
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
            if count >= self.at and self.kind == "readonly":
                raise OSError(30, "Read-only file system", str(arguments[0]))
            if count == self.at:
                for sent in _SIGNALS.get(self.kind, ()):
                    os.kill(os.getpid(), sent)
                if self.kind in ("save", "stop"):
                    (Path(self.folder) / self.kind.upper()).touch()

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
            "network_args": LAYERS,
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
    only = names(whole) ^ names(out)
    if any(_step_of(name) % EVERY for name in only):  # SAVE, STOP or a signal asked for one more checkpoint
        only = {name for name in only if not name.startswith("checkpoint-")}
    found = [f"only in one: {name}" for name in sorted(only)]
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


def _step_of(name: str) -> int:
    """The step of the checkpoint that a file is in, or 0."""
    match = re.match(r"checkpoint-(\d+)/", name)
    return int(match[1]) if match else 0


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


# ------------------------------------------------------------------ strikes


def make_world(work: Path, family: str) -> World:
    """The models and pictures of a family; made once in a folder."""
    from tools import make_tiny_flux, make_tiny_sd

    model, pictures = work / family, work / "pictures"
    if not pictures.exists():
        make_pictures(pictures)
    if not model.exists():
        make_tiny_flux.make(model) if family == "flux" else make_tiny_sd.make(model, family)
    return World(family, model, pictures, work / f"cache-{family}")


def check_refusal(code: int, log: Path, what: str) -> None:
    """A run that could not write has ended with one sentence."""
    last = log.read_text().strip().splitlines()[-1]
    assert code == 1 and last.startswith("error: "), f"{what}: exit code {code}, {last}"


def strike(world: World, out: Path, log: Path, fault: Fault, wait: float | None = None) -> int:
    """Start or continue a run with a fault, and check its folder and its last line; return the exit code.

    With `wait`, a run is killed from outside after so many seconds.
    """
    if wait is None:
        code = world.run(out, log, fault)
    else:
        process = world.start(out, log)
        process.join(wait)
        process.kill()
        code = finished(process)
    check_folder(out, log)
    if fault.kind in ("full", "limit", "readonly") and code:
        check_refusal(code, log, f"{fault.kind} {fault.at}")
    return code


def strike_two(world: World, out: Path, logs: list[Path], rng: random.Random) -> list[int]:
    """A run on two processes, one of which is killed after a random time; the other must end by itself."""
    resume = ("--resume", "latest") if checkpoints(out) else ()
    (out / ".lock").unlink(missing_ok=True)  # of a killed run; the new one shows that the two are connected
    pair = [
        call(run_script, (SCRIPTS[world.family], *world.words(out, *resume)), log, variables)
        for log, variables in zip(logs, ranks({"LOWRANK_CACHE": str(world.cache)}), strict=True)
    ]
    while not (out / ".lock").exists() and all(process.is_alive() for process in pair):
        time.sleep(0.01)
    dying = rng.randrange(2)
    pair[dying].join(rng.uniform(0, 5))
    pair[dying].kill()
    begin = time.monotonic()
    codes = [finished(process) for process in pair]
    for log in logs:
        check_folder(out, log)
    other = 1 - dying
    if codes[dying] == -signal.SIGKILL and codes[other] not in (0, 130):
        seconds = time.monotonic() - begin
        assert seconds < 30, f"the other process ended after {seconds:.0f} s"
        # before the two are connected, the other may have refused for a reason of its own
        assert logs[other].read_text().count("error: ") == 1, logs[other].read_text()[-1000:]
    return codes


def is_over(code: int, log: Path) -> bool:
    """Whether a run reached its end, or found that an earlier one had."""
    return code == 0 or (code == 1 and f"the run ends at {STEPS}" in log.read_text())


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[str, str], None]]:
    """Mount a tmpfs on a folder; yields a function that sets its size and whether it is "ro" or "rw"."""
    folder.mkdir(parents=True, exist_ok=True)

    def mount(*words: str) -> None:
        subprocess.run(["mount", *words, str(folder)], check=True, capture_output=True)

    mount("-t", "tmpfs", "-o", "size=1g", "tmpfs")
    try:
        yield lambda size, mode: mount("-o", f"remount,{mode},size={size}")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def can_mount(work: Path) -> bool:
    """Whether this user may mount a tmpfs; only root may."""
    try:
        with small_disk(work / "can-mount"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


# ------------------------------------------------------------------ lives

KINDS = ("kill", "term", "term2", "int", "full", "limit", "readonly", "save", "stop")
_WEIGHTS = (80, 3, 3, 3, 4, 3, 3, 4, 4)
_OPERATIONS = {"sd15": 170, "sdxl": 170, "flux": 150}  # of an undisturbed run
MOST = 8  # strikes in a life


def _strikes(world: World, out: Path, log: Path, rng: random.Random, counts: Counter) -> int:
    """Strike one run at file operations and at random times; the exit code of its last process."""
    code = 1
    for _ in range(MOST):
        kind = rng.choices(KINDS, _WEIGHTS)[0]
        wait = rng.uniform(0, 3) if kind == "kill" and rng.random() < 0.25 else None
        limits = (2_000, 20_000, 60_000, 100_000)
        at = rng.choice(limits) if kind == "limit" else rng.randint(1, _OPERATIONS[world.family])
        clock = rng.choice((0, 0, 0, -(10**8), 10**8))
        if clock:
            counts["clock"] += 1
            for path in [*out.glob("*"), *out.glob("*/*")]:
                os.utime(path, (time.time() - rng.uniform(0, 10**8),) * 2)
        code = strike(world, out, log, Fault(kind, at, str(out), clock), wait)
        counts[kind] += code != 0 or kind == "save"
        if is_over(code, log):
            break
    return code


def _disk_strikes(world: World, out: Path, log: Path, rng: random.Random, counts: Counter) -> int:
    """A run on a disk that is full again and again, and read-only once; the exit code of its last process."""
    code = 1
    with small_disk(out) as remount:
        for size in sorted(rng.randint(1, 1_500) for _ in range(4)):
            remount(f"{size}k", "rw")
            code = world.run(out, log)
            check_folder(out, log)
            if not is_over(code, log):
                check_refusal(code, log, f"{size} KiB")
                counts["tmpfs"] += 1
        remount("1g", "ro")
        check_refusal(world.run(out, log), log, "read-only")
        counts["mounted read-only"] += 1
        remount("1g", "rw")
        code = world.run(out, log)
        check_folder(out, log)
        shutil.copytree(out, out.with_name(f"{out.name}-kept"))
    out.rmdir()
    out.with_name(f"{out.name}-kept").rename(out)
    return code


def _rival_strikes(world: World, out: Path, log: Path, rng: random.Random, counts: Counter) -> int:
    """Two runs in one folder, one of which is killed again and again; the exit code of the last process."""
    code, rival_log = 1, out.with_suffix(".rival.log")
    for _ in range(3):
        pair = [world.start(out, log), world.start(out, rival_log)]
        pair[0].join(rng.uniform(0, 4))
        pair[0].kill()
        codes = [finished(process) for process in pair]
        counts["kill"] += codes[0] == -signal.SIGKILL
        counts["rival"] += 1
        for kept in (log, rival_log):
            check_folder(out, kept)
        if codes[1] and not is_over(codes[1], rival_log):
            check_refusal(codes[1], rival_log, "rival")
        if 0 in codes:
            code = 0
            break
    return code


def _rank_strikes(world: World, out: Path, log: Path, rng: random.Random, counts: Counter) -> int:
    """A run on two processes that loses one of them again and again; the exit code of the first one."""
    logs = [out.with_suffix(f".{rank}.log") for rank in range(2)]
    codes = [1, 1]
    for _ in range(4):
        codes = strike_two(world, out, logs, rng)
        counts["rank"] += -signal.SIGKILL in codes
        counts["kill"] += -signal.SIGKILL in codes
        if 0 in codes or any(is_over(code, kept) for code, kept in zip(codes, logs, strict=True)):
            break
    codes = run_two(world, out, logs)
    shutil.copyfile(logs[0], log)
    return codes[0]


def run_two(world: World, out: Path, logs: list[Path]) -> list[int]:
    """The exit codes of a run on two processes that nothing disturbs."""
    resume = ("--resume", "latest") if checkpoints(out) else ()
    strikes = zip(logs, ranks({"LOWRANK_CACHE": str(world.cache)}), strict=True)
    words = (SCRIPTS[world.family], *world.words(out, *resume))
    return [finished(process) for process in [call(run_script, words, log, more) for log, more in strikes]]


SCENES = {"disk": _disk_strikes, "rival": _rival_strikes, "ranks": _rank_strikes, "strikes": _strikes}


def live(world: World, whole: Path, out: Path, rng: random.Random, scene: str) -> dict[str, Any]:
    """One run that is struck in the way of a scene, then ends; the counts, and what is wrong with it."""
    log, counts, problems = out.with_suffix(".log"), Counter(), []
    try:
        code = SCENES[scene](world, out, log, rng, counts)
        if not is_over(code, log):
            code = world.run(out, log)
            check_folder(out, log)
        if not is_over(code, log):
            problems.append(f"exit code {code}: {log.read_text()[-500:]}")
        problems += differences(whole, out) + [f"leftover: {path}" for path in leftovers(out, world.cache)]
    except (AssertionError, ValueError, OSError, TimeoutError) as error:  # ValueError: a broken checkpoint
        problems.append(f"{type(error).__name__}: {str(error)[-1000:]}")
    return {"family": world.family, "scene": scene, **counts, "problems": problems}


def _whole(world: World, work: Path, scene: str) -> Path:
    """An undisturbed run on one process or, for the scene "ranks", on two; made once in a folder."""
    folder = work / f"whole-{world.family}{'-two' * (scene == 'ranks')}"
    if not (folder / "cat-state").exists():
        shutil.rmtree(folder, ignore_errors=True)
        if scene == "ranks":
            assert run_two(world, folder, [work / "whole.log", work / "whole.1.log"]) == [0, 0]
        else:
            assert world.run(folder, work / "whole.log") == 0, (work / "whole.log").read_text()
    return folder


def lives(work: Path, first: int = 0) -> Iterator[dict[str, Any]]:
    """Endless lives of the three families in turn; the number of a life is the seed of its strikes."""
    work.mkdir(parents=True, exist_ok=True)
    worlds, mounts = [make_world(work, family) for family in FAMILIES], can_mount(work)
    for number in itertools.count(first):
        world, out = worlds[number % len(worlds)], work / f"life-{number}"
        scene = {3: "rival", 6: "ranks", 8: "disk" if mounts else "strikes"}.get(number % 10, "strikes")
        shutil.rmtree(out, ignore_errors=True)  # of a soak that was cut
        if number % 5 == 0:
            shutil.rmtree(world.cache, ignore_errors=True)  # so that caches are written under fire too
        whole = _whole(world, work, scene)
        row = {"life": number} | live(world, whole, out, random.Random(number), scene)
        yield row
        if not row["problems"]:
            shutil.rmtree(out)
