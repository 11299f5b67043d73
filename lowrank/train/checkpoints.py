"""File names of a run, its checkpoint folders, and how a run resumes from one.

A checkpoint folder is written under a temporary name and renamed when it is complete; `train_state.json`
lists every file with its SHA-256, so that an incomplete or altered folder is refused.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR

from lowrank.data.loader import Loader
from lowrank.errors import Refused
from lowrank.files import atomic_folder, parse_json, part_of, read_text, remove, sha256
from lowrank.tensors import NOT_A_PICKLE
from lowrank.train.network_module import KohyaNetwork

WEIGHTS = "pytorch_lora_weights.safetensors"
DIFFUSERS, KOHYAS = "pytorch_lora_weights", "last"  # stems of the final file without --output_name
STATE = "train_state.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Names:
    """The paths of a run's files. With an output name they are kohya's; else the final file is `unnamed`."""

    output_dir: Path
    output_name: str | None
    extension: str = "safetensors"
    unnamed: str = DIFFUSERS  # stem of the final file without an output name

    def final(self) -> Path:
        return self.output_dir / f"{self.output_name or self.unnamed}.{self.extension}"

    def epoch(self, epoch: int) -> Path:
        stem = f"{self.output_name}-{epoch:06d}" if self.output_name else f"epoch-{epoch:06d}"
        return self.output_dir / f"{stem}.{self.extension}"

    def step(self, step: int) -> Path:
        stem = f"{self.output_name}-step{step:08d}" if self.output_name else f"at-step{step:08d}"
        return self.output_dir / f"{stem}.{self.extension}"

    def state(self, weights: Path) -> Path:
        """kohya's state folder beside a weights file."""
        stem = "last" if weights == self.final() and not self.output_name else weights.stem
        return self.output_dir / f"{stem}-state"

    def checkpoint(self, step: int) -> Path:
        return self.output_dir / f"checkpoint-{step}"


@dataclass
class Progress:
    """How far a run is: optimizer steps done, and the next batch of this process as (epoch, position)."""

    step: int = 0
    epoch: int = 0
    position: int = 0


class Stateful(Protocol):
    """What a checkpoint keeps besides adapter, optimizer and scheduler: it adds a file of its own."""

    def save(self, folder: Path) -> None: ...


def save_state(
    folder: Path,
    accelerator: Accelerator,
    network: KohyaNetwork,
    progress: Progress,
    run: Mapping[str, object],
    metadata: Mapping[str, str],
    parts: Iterable[Stateful] = (),
) -> None:
    """Write a whole checkpoint folder: adapter in full precision, optimizer, scheduler, RNG, progress.

    Every process calls this. `run` is the fingerprint that a resumed run must match; `parts` add their files.
    """
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
        accelerator.save_state(str(part_of(folder)))
        accelerator.wait_for_everyone()
        accelerator.wait_for_everyone()
        return
    with atomic_folder(folder) as part:
        accelerator.wait_for_everyone()
        accelerator.save_state(str(part))
        accelerator.wait_for_everyone()
        network.save_weights(str(part / WEIGHTS), None, dict(metadata))
        for stateful in parts:
            stateful.save(part)
        files = {file.name: sha256(file) for file in sorted(part.iterdir())}
        state = {
            "current_step": progress.step,
            "current_epoch": progress.epoch,
            "position": progress.position,
            "run": dict(run),
            "files": files,
        }
        (part / STATE).write_text(json.dumps(state, indent=1))
    accelerator.wait_for_everyone()


def find_checkpoint(wanted: str, output_dir: Path) -> Checkpoint:
    """The checkpoint for `--resume`: a path, a name in `output_dir`, or the "latest" whole `checkpoint-N`.

    Raises `Refused`. With "latest", damaged checkpoints are left out with a warning.
    """
    if wanted != "latest":
        for folder in (wanted, os.path.join(output_dir, wanted)):
            if os.path.isdir(folder):
                return read_checkpoint(Path(folder))
        raise Refused(
            f"the folder {wanted} to resume from does not exist, neither as a path nor in {output_dir}; name "
            'a checkpoint-N or -state folder, or "latest"'
        )
    folders = checkpoints(output_dir)[::-1]
    for folder in folders:
        try:
            return read_checkpoint(folder)
        except Refused as refused:
            if folder == folders[-1]:
                raise
            logger.warning("%s; --resume latest takes the one before it", refused)
    raise Refused(
        f"there is no checkpoint-N folder in {output_dir} to resume from; leave --resume out to start anew"
    )


# settings that are kept as a hash, in words
_HASHED = {
    "base": "another base model",
    "base_weights": "other --base_weights or their multipliers",
    "pictures": "other pictures, masks, captions or repeats",
}
CONTENT = "sha256:"  # prefix of a setting that is a file, kept by its content


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint folder that was read and hashed once: the settings and progress of its run."""

    folder: Path
    run: Mapping[str, object]
    step: int
    epoch: int
    position: int

    @property
    def seed(self) -> int:
        """The seed of the run that wrote the checkpoint."""
        seed = self.run.get("seed")
        return seed if isinstance(seed, int) else 0

    @property
    def processes(self) -> int:
        """The number of processes of the run that wrote the checkpoint."""
        count = self.run.get("processes")
        return count if isinstance(count, int) and count > 0 else 1


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the checkpoint in a folder and compare every file with its SHA-256.

    Raises `Refused` for a folder that is not as `save_state` wrote it.
    """
    state = _state_of(folder)
    for name, digest in state["files"].items():
        if not os.path.isfile(folder / name) or sha256(folder / name) != digest:
            raise Refused(
                f"{folder} is damaged: {name} is missing or altered; resume from an earlier checkpoint"
            )
    return Checkpoint(folder, state["run"], *(state[name] for name in _COUNTS))


_COUNTS = ("current_step", "current_epoch", "position")


def _state_of(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's list of files. Raises `Refused` unless it is complete."""
    try:
        state = parse_json(read_text(folder / STATE, "the list of files"), folder / STATE)
        counts = [state[name] for name in _COUNTS]
        whole = all(type(count) is int and count >= 0 for count in (*counts, state["run"].get("seed", 0)))
        # a name with a folder would be outside the checkpoint
        plain = all(name and Path(name).name == name for name in state["files"])
        if not (whole and plain and {WEIGHTS, "optimizer.bin"} <= state["files"].keys()):
            raise ValueError("its entries are not those of a checkpoint")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(
            f"{folder} is not a whole checkpoint of this program: {STATE} is missing or unreadable; resume "
            "from an earlier one, or start from its weights with --network_weights"
        ) from error
    return state


def agree(checkpoint: Checkpoint, run: Mapping[str, object]) -> None:
    """Raise `Refused` for the first setting of a checkpoint that differs from this `run`."""
    for key, value in run.items():
        before = checkpoint.run.get(key)
        if before != value:
            raise Refused(
                f"{checkpoint.folder} belongs to another run: {_difference(key, before, value)}; use the "
                "same settings, or start from its weights with --network_weights"
            )


def _difference(name: str, old: object, new: object) -> str:
    if name in _HASHED:
        return f"it had {_HASHED[name]} than this run"
    if isinstance(old, Mapping) and isinstance(new, Mapping):  # network_args
        name = next(name for name in (*new, *old) if old.get(name) != new.get(name))
        return _difference(f"network argument {name}", old.get(name), new.get(name))
    if all(str(value).startswith(CONTENT) for value in (old, new)):
        return f"it had another file for its {name} than this run"
    old, new = ("unset" if value in (None, "") else value for value in (old, new))
    return f"its {name} is {old} and this run's is {new}"


def as_resumed(run: Mapping[str, object], checkpoint: Checkpoint, loader: Loader) -> Mapping[str, object]:
    """A fingerprint with the checkpoint's number of processes, and if that differs with its accumulation.

    Both may differ: two processes with one micro-batch each compute the same step as one process with two.
    """
    processes = checkpoint.processes
    if run["processes"] == processes:
        return run
    accumulation = "gradient_accumulation_steps"
    batches = len(loader.shard(0, processes))
    kept = {
        "processes": processes,
        "batches_per_epoch": batches,
        accumulation: checkpoint.run.get(accumulation),
    }
    return {**run, **kept}


@contextlib.contextmanager
def reading_state(checkpoint: Checkpoint) -> Iterator[None]:
    """Raise `Refused` for what a damaged or malicious file of a checkpoint raises while it is read.

    Its code is never run; torch's own message advises to run it.
    """
    try:
        yield
    except (Refused, torch.OutOfMemoryError):
        raise
    except NOT_A_PICKLE as error:
        raise Refused(
            f"a file in {checkpoint.folder} is damaged, or holds more than tensors and numbers, and code in "
            "it is not run; resume from another checkpoint, or start from its weights with --network_weights"
        ) from error


def load_state(
    checkpoint: Checkpoint,
    accelerator: Accelerator,
    network: KohyaNetwork,
    run: Mapping[str, object],
    loader: Loader,
) -> Progress:
    """Continue from a checkpoint, also one of another number of processes.

    `run` is this run's fingerprint, `loader` has the batches of this process. The new processes continue
    where the old ones were in the epoch; if their number does not divide the batches that were used, the last
    of these come again. Raises `Refused` if the checkpoint belongs to another run.
    """
    agree(checkpoint, as_resumed(run, checkpoint, loader))
    with reading_state(checkpoint):
        network.load_weights(str(checkpoint.folder / WEIGHTS))
        accelerator.load_state(str(checkpoint.folder))
    accelerator.step = 0  # of micro-batches: a checkpoint is at the end of a step
    before, now = checkpoint.processes, accelerator.num_processes
    if before != now:
        _count_again(accelerator, before, now)
    position = checkpoint.position * before // now
    return Progress(checkpoint.step, checkpoint.epoch, min(position, len(loader)))


def _count_again(accelerator: Accelerator, before: int, now: int) -> None:
    """Set the schedules from `before` of their steps for each optimizer step to `now`.

    accelerate makes one step of a schedule in every process (see `build_scheduler`).
    """
    for wrapped in accelerator._schedulers:
        schedule = wrapped.scheduler
        if not isinstance(schedule, LambdaLR):
            raise Refused(
                f"{type(schedule).__name__} cannot continue with {now} processes after {before}, because it "
                f"counts the steps of every process; use {before} processes, or another --lr_scheduler"
            )
        schedule.last_epoch = schedule.last_epoch * now // before


def prune(folders: list[Path], keep: int | None, newest: Path) -> None:
    """Delete folders until `keep` remain (None: keep all): broken ones first, then those of the first steps.

    `newest` is never deleted. The time of a folder does not count: a clock may be set back.
    """
    others = sorted(set(folders) - {newest}, key=lambda folder: (_is_whole(folder), _step(folder)))
    for path in others[: max(0, len(others) + 1 - keep)] if keep else []:
        remove(path)


def _is_whole(folder: Path) -> bool:
    """Whether a checkpoint has all of its files; their content is not compared."""
    try:
        names = _state_of(folder)["files"]
    except Refused:
        return False
    return all((folder / name).is_file() for name in names)


_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,18})")


def _step(folder: Path) -> int:
    match = _CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else 0


def checkpoints(output_dir: Path) -> list[Path]:
    """`checkpoint-N` folders, by their step."""
    folders = (path for path in output_dir.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name))
    return sorted(folders, key=_step)
