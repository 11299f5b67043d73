"""The log of a run: trackers, loss.csv, the progress bar, and the files that describe the run."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from lowrank.config.flag import parse_text
from lowrank.errors import Refused
from lowrank.files import atomic
from lowrank.report import tables

INTERVAL = 30.0  # seconds between two lines of progress where the output is no terminal
BINS = 4  # of the timestep range 0..1000
NORMS = ("norm/gradient", "norm/avg_key_norm", "max_norm/max_key_norm")
BIN_NAMES = tuple(f"t{1000 * i // BINS}-{1000 * (i + 1) // BINS}" for i in range(BINS))


class Meter:
    """Sums of the losses of one optimizer step, kept on the device and read once per step."""

    def __init__(self, components: Sequence[str], device: torch.device) -> None:
        self.components = tuple(components)
        self._sums = torch.zeros(1 + len(self.components) + 2 * BINS, device=device)
        self._batches = 0

    def add(self, components: Mapping[str, Tensor], per_sample: Tensor, timesteps: Tensor) -> None:
        """Add a micro-batch: scalar components, unweighted losses (B,) and timesteps (B,) in 0..1000."""
        parts = torch.stack([components[name].detach().float() for name in self.components])
        bins = (timesteps * BINS / 1000).long().clamp(0, BINS - 1)
        sums = torch.zeros(BINS, device=parts.device).index_add_(0, bins, per_sample.detach().float())
        counts = torch.zeros(BINS, device=parts.device).index_add_(
            0, bins, torch.ones_like(per_sample).float()
        )
        self._sums += torch.cat([parts.sum()[None], parts, sums, counts])
        self._batches += 1

    def read(self, accelerator: Accelerator) -> dict[str, float | None]:
        """Means over micro-batches and processes by name, None for an empty bin; resets the sums."""
        return self.read_with(accelerator, ())[0]

    def read_with(
        self, accelerator: Accelerator, scalars: Sequence[Tensor]
    ) -> tuple[dict[str, float | None], list[float]]:
        """`read`, and the values of this process's `scalars` in the same transfer.

        The host waits for the device once, not once for each value.
        """
        means: Tensor = accelerator.reduce(self._sums, "sum")  # pyright: ignore[reportAssignmentType]
        means = means / (self._batches * accelerator.num_processes)
        others = [scalar.detach().float().reshape(1) for scalar in scalars]
        values, n = torch.cat([means, *others]).tolist(), 1 + len(self.components)
        losses: dict[str, float | None] = dict(zip(("loss", *self.components), values[:n], strict=True))
        sums, counts = values[n : n + BINS], values[n + BINS : n + 2 * BINS]
        for name, total, count in zip(BIN_NAMES, sums, counts, strict=True):
            losses[name] = total / count if count else None
        self._sums.zero_()
        self._batches = 0
        return losses, values[n + 2 * BINS :]


class Table:
    """A CSV file of numbers by step, made at its first row; a resumed run drops the rows after its step."""

    def __init__(self, path: Path, columns: Sequence[str], number: str) -> None:
        """`number` is a column that every whole row has a number in."""
        self.path, self._columns, self._number = path, tuple(columns), number

    def begin(self, step: int, empty: bool = False) -> list[dict[str, str]]:
        """Keep the rows up to `step` and return them; with `empty` the file is made without rows too."""
        rows: list[dict[str, str]] = []
        if step and self.path.is_file():
            with open(self.path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if _is_row(row, step, self._number)]
        if rows or empty:
            with atomic(self.path) as part, open(part, "w", newline="") as file:
                self._writer(file).writeheader()
                self._writer(file).writerows(rows)
        else:
            self.path.unlink(missing_ok=True)
        return rows

    def add(self, row: Mapping[str, object]) -> None:
        """Append a row. Raises `Refused` if the disk takes none."""
        try:
            with open(self.path, "a", newline="") as file:
                if file.tell() == 0:
                    self._writer(file).writeheader()
                self._writer(file).writerow(row)
        except OSError as error:
            raise Refused(
                f"could not write {self.path}: {error}; free disk space and continue with --resume latest"
            ) from error

    def _writer(self, file: Any) -> csv.DictWriter:
        return csv.DictWriter(file, self._columns, extrasaction="ignore")


class RunLog:
    """Writes the numbers of each step; every process has one, and only the main process writes."""

    def __init__(
        self, accelerator: Accelerator, folder: Path, components: Sequence[str], total: int, window: int
    ) -> None:
        self._accelerator = accelerator
        columns = ("step", "epoch", "lr", "loss", "avr_loss", *components, *BIN_NAMES)
        self._losses = Table(folder / tables.LOSSES, columns, "loss")
        self._norms = Table(folder / tables.NORMS, ("step", *NORMS), "step")
        self._held_out = Table(folder / tables.VALIDATION, ("step", "kind", "value"), "value")
        self._summary = folder / tables.SUMMARY
        self._last, self._begun, self._started, self._running = 0, 0, time.monotonic(), False
        self._recent: deque[float] = deque(maxlen=max(1, window))
        self._of_epoch: list[float] = []
        self._total, self._images = total, 0
        self._bar = tqdm(disable=True)  # until `begin`: a run can fail and close its log before

    def begin(self, step: int) -> None:
        """Start loss.csv and the progress bar at a step; a resumed run drops the rows after it."""
        self._started, self._running = time.monotonic(), True
        self._printed = self._started
        main, self._begun = self._accelerator.is_main_process, step
        self._in_lines = main and not sys.stderr.isatty()  # a file or a pipe: lines in place of a bar
        self._bar = tqdm(
            total=self._total,
            initial=step,
            desc="steps",
            dynamic_ncols=True,
            disable=not main or self._in_lines,
        )
        if not self._accelerator.is_main_process:
            return
        rows = self._losses.begin(step, empty=True)
        self._norms.begin(step)
        self._held_out.begin(step)
        self._recent.extend(float(row["loss"]) for row in rows)

    def step(
        self,
        step: int,
        epoch: int,
        losses: Mapping[str, float | None],
        rates: Mapping[str, float],
        images: int,
        extra: Mapping[str, float],
    ) -> None:
        """Log an optimizer step: losses, learning rates by group, number of images, other scalars."""
        loss = losses["loss"] or 0.0
        rates = {name: float(rate) for name, rate in rates.items()}  # an Adafactor's own rate is a tensor
        self._recent.append(loss)
        self._of_epoch.append(loss)
        average = sum(self._recent) / len(self._recent)
        self._images += images
        speed = self._images / (time.monotonic() - self._started)
        base = [rate for name, rate in rates.items() if not name.endswith(" plus")]  # not LoRA+'s
        first = next(iter(base or rates.values()), 0.0)
        numbers = f"loss={loss:.4f}, avr_loss={average:.4f}, lr={first:.3g}, images/s={speed:.2f}"
        self._bar.update()
        self._bar.set_postfix_str(numbers)
        self._print_progress(step, numbers)
        scalars = {"loss/current": loss, "loss/average": average}
        for name, value in losses.items():
            if name != "loss" and value is not None:
                scalars[f"loss/{name}"] = value
        scalars |= {f"lr/{name.strip()}": rate for name, rate in rates.items()} | dict(extra)
        if "lr/textencoder 1" in scalars:  # the name that kohya's dashboards read
            scalars.setdefault("lr/textencoder", scalars["lr/textencoder 1"])
        self._accelerator.log(scalars, step=step)
        if self._accelerator.is_main_process:
            self._losses.add({"step": step, "epoch": epoch, "lr": first, "avr_loss": average, **losses})
            if norms := {name: extra[name] for name in NORMS if name in extra}:
                self._norms.add({"step": step, **norms})
        self._last = step

    def _print_progress(self, step: int, numbers: str) -> None:
        """Without a terminal: print the bar as a line after the first and last step, and each `INTERVAL`."""
        now = time.monotonic()
        due = now - self._printed >= INTERVAL or step in (self._begun + 1, self._total)
        if self._in_lines and due:
            self._printed, elapsed = now, now - self._started
            rate = (step - self._begun) / elapsed if elapsed else None
            line = tqdm.format_meter(
                step, self._total, elapsed, prefix="steps", postfix=numbers, rate=rate, ncols=120
            )
            print(line, file=sys.stderr, flush=True)

    def epoch(self, epoch: int) -> None:
        """Log the mean loss of the steps since the last call under kohya's tag, at the end of an epoch."""
        if self._of_epoch:
            self._accelerator.log(
                {"loss/epoch_average": sum(self._of_epoch) / len(self._of_epoch)}, step=epoch
            )
            self._of_epoch.clear()

    def validation(self, value: float, kind: str, at: int) -> None:
        """Log the validation loss after a "step" or "epoch" (`kind`), and its excess over the moving average.

        The tags are kohya's.
        """
        recent = sum(self._recent) / max(1, len(self._recent))
        scalars = {
            f"loss/validation/{kind}_average": value,
            f"loss/validation/{kind}_divergence": value - recent,
        }
        self._accelerator.log(scalars, step=at)
        if self._accelerator.is_main_process:
            self._held_out.add({"step": self._last, "kind": kind, "value": value})
        self.message(f"validation loss after {kind} {at}: {value:.6f} (training {recent:.6f})")

    def message(self, text: str) -> None:
        """Print a line above the progress bar, on the main process."""
        if self._accelerator.is_main_process:
            tqdm.write(text)

    def write_summary(self) -> None:
        """Write summary.json: steps, images, seconds and peak memory since the run was started or resumed."""
        if not self._accelerator.is_main_process or not self._running:
            return
        facts: dict[str, float] = {"steps": self._last - self._begun, "images": self._images}
        facts["seconds"] = round(time.monotonic() - self._started, 2)
        if torch.cuda.is_available():
            facts["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        with atomic(self._summary) as part:
            part.write_text(json.dumps(facts) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Write the summary, and end the trackers."""
        self.write_summary()
        if self._running:
            self._bar.close()
        self._accelerator.end_training()


def _is_row(row: Mapping[str | None, str | None], last: int, number: str) -> bool:
    """Whether a row is whole and of a step up to `last`; a kill can leave a part of a row."""
    step = row.get("step") or ""
    counted = tables.is_whole(row) and step.isdecimal()
    return counted and int(step) <= last and parse_text(float, row.get(number) or "") is not None
