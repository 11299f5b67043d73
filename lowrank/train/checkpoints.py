"""File names of a run, its checkpoint folders, and how a run resumes from one.

A checkpoint folder is written under a temporary name and renamed when it is complete; `train_state.json`
lists every file with its SHA-256, so that an incomplete or altered folder is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator

from lowrank.errors import Refused
from lowrank.files import atomic_folder, part_of, sha256
from lowrank.train.network_module import KohyaNetwork

WEIGHTS = "pytorch_lora_weights.safetensors"
DIFFUSERS, KOHYAS = "pytorch_lora_weights", "last"  # stems of the final file without --output_name
STATE = "train_state.json"


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


def find_state(wanted: str, output_dir: Path) -> Path:
    """The folder for `--resume`: a path, a name in `output_dir`, or the "latest" whole `checkpoint-N`."""
    if wanted == "latest":
        candidates = checkpoints(output_dir)
        if not candidates:
            raise Refused(
                f"there is no checkpoint-N folder in {output_dir} to resume from; leave --resume out to "
                "start anew"
            )
        return candidates[-1]
    for folder in (Path(wanted), output_dir / wanted):
        if folder.is_dir():
            return folder
    raise Refused(
        f"the folder {wanted} to resume from does not exist, neither as a path nor in {output_dir}; name a "
        'checkpoint-N or -state folder, or "latest"'
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


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the checkpoint in a folder and compare every file with its SHA-256.

    Raises `Refused` for a folder that is not as `save_state` wrote it.
    """
    try:
        state = json.loads((folder / STATE).read_text())
        counts = [state[name] for name in ("current_step", "current_epoch", "position")]
        whole = all(type(count) is int and count >= 0 for count in (*counts, state["run"].get("seed", 0)))
        if not (whole and {WEIGHTS, "optimizer.bin"} <= state["files"].keys()):
            raise ValueError("its entries are not those of a checkpoint")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(
            f"{folder} is not a whole checkpoint of this program: {STATE} is missing or unreadable; resume "
            "from an earlier one, or start from its weights with --network_weights"
        ) from error
    for name, digest in state["files"].items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise Refused(
                f"{folder} is damaged: {name} is missing or altered; resume from an earlier checkpoint"
            )
    return Checkpoint(folder, state["run"], *counts)


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


def load_state(
    checkpoint: Checkpoint, accelerator: Accelerator, network: KohyaNetwork, run: Mapping[str, object]
) -> Progress:
    """Continue from a checkpoint. Raises `Refused` if it belongs to another run."""
    agree(checkpoint, run)
    network.load_weights(str(checkpoint.folder / WEIGHTS))
    accelerator.load_state(str(checkpoint.folder))
    return Progress(checkpoint.step, checkpoint.epoch, checkpoint.position)


def remove(path: Path) -> None:
    """Delete a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def prune(folders: list[Path], keep: int | None, newest: Path) -> None:
    """Delete the oldest folders until `keep` remain (None: keep all); `newest` is never deleted."""
    others = sorted((f for f in folders if f != newest), key=lambda folder: folder.stat().st_mtime_ns)
    for path in others[: max(0, len(others) + 1 - keep)] if keep else []:
        remove(path)


def checkpoints(output_dir: Path) -> list[Path]:
    """`checkpoint-N` folders, oldest first."""
    return sorted(
        (p for p in output_dir.glob("checkpoint-*") if p.name[11:].isdigit()), key=lambda p: int(p.name[11:])
    )
