"""Saving during a run: which files, checkpoints, pictures and measurements are due, and which old ones go."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from accelerate.optimizer import AcceleratedOptimizer

from lowrank.data.loader import Loader
from lowrank.errors import Refused
from lowrank.files import remove
from lowrank.train import checkpoints, metadata, optim
from lowrank.train.checkpoints import Checkpoint, Progress
from lowrank.train.ema import Ema
from lowrank.train.hub import Uploads
from lowrank.train.job import RunningJob
from lowrank.train.layer_sampling import LayerSampler
from lowrank.train.log import RunLog
from lowrank.train.network_module import KohyaNetwork
from lowrank.train.phases import phase
from lowrank.train.plan_memory import Prediction
from lowrank.train.preview import Preview
from lowrank.train.requests import Requests
from lowrank.train.schedule import RunPlan
from lowrank.train.validation import ValidationLoss

# --save_precision, and what --upcast_before_saving means; None keeps the dtype of training
_PRECISIONS = {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def _due(count: int, every: int | None) -> bool:
    return bool(every) and count % every == 0


class Saver:
    """Saves, draws and measures what is due after a step or an epoch; the loop calls it after each."""

    def __init__(
        self,
        *,
        job: RunningJob,
        network: KohyaNetwork,
        optimizer: AcceleratedOptimizer,
        metadata: Mapping[str, str],
        fingerprint: Mapping[str, object],
        plan: RunPlan,
        log: RunLog,
        preview: Preview,
        validation: ValidationLoss | None,
        layer_sampler: LayerSampler | None,
        requests: Requests,
        planned: Prediction,
    ) -> None:
        self._options, self._names = job.options.saving, job.names
        self._uploads = Uploads(job.options.hub)
        self._accelerator, self._network, self._optimizer = job.accelerator, network, optimizer
        self._run_metadata, self._fingerprint, self._plan = metadata, fingerprint, plan
        self._log, self._preview, self._validation = log, preview, validation
        self._last_checkpoint: Path | None = None
        self._requests, self._planned, self.stopped = requests, planned, False
        decay = job.options.train.ema_decay
        self._ema = Ema(network.parameters(), decay) if decay else None
        self._stateful = [part for part in (self._ema, layer_sampler) if part]  # saved in checkpoints too
        self._every_epochs = self._options.save_every_n_epochs
        if self._options.save_n_epoch_ratio:
            self._every_epochs = max(1, plan.epochs // self._options.save_n_epoch_ratio)

    # ------------------------------------------------------------------ when

    def after_step(self, progress: Progress) -> bool:
        """Save, draw and measure what is due after this step; return True if the run must stop here."""
        options, step, last = self._options, progress.step, progress.step >= self._plan.steps
        if self._ema:
            self._ema.update()
        asked = self._requests.after_step()
        due = options.checkpointing_steps and (last or _due(step, options.checkpointing_steps))
        if due or (any(asked) and not last):
            self._save_checkpoint(progress)
        if _due(step, options.save_every_n_steps) and not last:
            self._save_adapter(self._names.step(step), progress, options.save_state, progress.epoch)
            self._remove_old_steps(step)
        if _due(step, self._preview.every_steps) and not last:
            self.draw(f"{step:06d}", step)
        every = self._validation.every_steps if self._validation else None
        if self._validation and every and (last or _due(step, every)):
            self._validate(self._validation, "step", step)
        if last:  # the loop returns before it ends this epoch, which may be a part of one
            self._end_epoch(progress.epoch + 1, last=True)
        if asked.stop and not last:
            self.stopped = True
            self._log.message(f"stopped after step {step}; continue with --resume {self._last_checkpoint}")
            self._uploads.finish()
        return self.stopped

    def after_epoch(self, progress: Progress) -> None:
        """Save, draw and measure what is due after an epoch; `progress.epoch` epochs have ended."""
        epoch = progress.epoch
        self._end_epoch(epoch)
        if _due(epoch, self._every_epochs):
            self._save_adapter(self._names.epoch(epoch), progress, self._options.save_state)
            self._remove_old_epochs(epoch)
        if _due(epoch, self._preview.every_epochs):
            self.draw(f"e{epoch:06d}", progress.step)

    def _end_epoch(self, epoch: int, last: bool = False) -> None:
        """Log the mean loss of an epoch, and measure what is due; at the end of the run it always is."""
        self._log.epoch(epoch)
        every = self._validation.every_epochs if self._validation else None
        if self._validation and every and (last or _due(epoch, every)):
            self._validate(self._validation, "epoch", epoch)

    def finish(self, progress: Progress) -> None:
        """Save the final file and draw the final pictures."""
        options, final = self._options, self._names.final()
        self._save_adapter(final, progress, options.save_state or options.save_state_on_train_end)
        self.draw("final", progress.step)
        self._report()
        self._log.message(f"model saved. {final}")
        self._uploads.finish()

    def after_warmup(self) -> None:
        """Restart the average: the warm-up stages changed the adapter's values."""
        if self._ema:
            self._ema.restart()

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint of this run."""
        return self._last_checkpoint

    # ------------------------------------------------------------------ what

    def draw(self, tag: str, step: int) -> None:
        """Draw the pictures of the adapter as it would be saved."""
        change = "draw smaller pictures, with --w and --h in a file of --sample_prompts, or none"
        planned = partial(self._planned.of, "sampling preview")
        with self._averaged(), phase("drawing pictures", change, self.last_checkpoint, planned):
            self._preview.run(self._accelerator, self._network, tag, step)

    def _validate(self, validation: ValidationLoss, kind: str, count: int) -> None:
        with self._averaged():
            loss = validation.measure(self._accelerator, self._network)
        self._log.validation(loss, kind, count)

    def _save_adapter(
        self, path: Path, progress: Progress, with_state: bool, ended: int | None = None
    ) -> None:
        """Write an adapter file; `ended` epochs are in its metadata (None: one that has begun counts)."""
        precision = "float" if self._options.upcast_before_saving else self._options.save_precision
        if self._accelerator.is_main_process:
            self._log.message(f"saving checkpoint: {path}")
            with self._averaged():
                path.parent.mkdir(parents=True, exist_ok=True)
                facts = self._metadata(progress, ended)
                self._network.save_weights(str(path), _PRECISIONS[precision], facts)
        self._accelerator.wait_for_everyone()
        if with_state:
            self._save_state(self._names.state(path), progress)
        self._report()
        if self._accelerator.is_main_process:  # after the state: an upload can fail or take long
            self._uploads.upload(path)

    def _report(self) -> None:
        """Write the report of the run so far; what goes wrong there does not stop the run."""
        if not (self._options.report and self._accelerator.is_main_process):
            return
        from lowrank.report.write import NAME, write_report  # with matplotlib, so only if it is asked for

        try:
            self._log.write_summary()
            write_report([self._names.output_dir], self._names.output_dir / NAME)
        except (Refused, OSError) as error:
            self._log.message(f"the report was not written: {error}")

    def _save_checkpoint(self, progress: Progress) -> None:
        folder = self._names.checkpoint(progress.step)
        self._save_state(folder, progress)
        self._prune(folder)

    def _prune(self, newest: Path) -> None:
        if self._accelerator.is_main_process:
            limit = self._options.checkpoints_total_limit
            checkpoints.prune(checkpoints.checkpoints(self._names.output_dir), limit, newest)

    def _save_state(self, folder: Path, progress: Progress) -> None:
        self._log.message(f"saving checkpoint: {folder}")
        checkpoints.save_state(
            folder,
            self._accelerator,
            self._network,
            progress,
            self._fingerprint,
            self._metadata(progress),
            self._stateful,
        )
        self._last_checkpoint = folder

    def resume(self, checkpoint: Checkpoint, loader: Loader) -> Progress:
        """Load the states of a checkpoint; return how far it is in the batches of `loader`."""
        progress = checkpoints.load_state(
            checkpoint, self._accelerator, self._network, self._fingerprint, loader
        )
        with checkpoints.reading_state(checkpoint):
            for part in self._stateful:
                part.load(checkpoint.folder)
        self._last_checkpoint = checkpoint.folder
        self._log.message(
            f"resumed from {checkpoint.folder}: step {progress.step}, epoch {progress.epoch + 1}, batch "
            f"{progress.position + 1}"
        )
        if os.path.realpath(checkpoint.folder.parent) == os.path.realpath(self._names.output_dir):
            self._write_owed(progress, checkpoint.folder.name)
        return progress

    def _write_owed(self, progress: Progress, resumed: str) -> None:
        """Do what a killed run had still to do when it wrote the checkpoint that this run resumes from.

        These are the adapter file, the state folder and the pictures of this step or epoch, and the removal
        of old ones. Old checkpoint-N folders are removed where this one is the newest.
        """
        names, step, epoch = self._names, progress.step, progress.epoch
        newest = checkpoints.checkpoints(names.output_dir)[-1:]
        if newest and newest[0].name == resumed:
            self._prune(newest[0])
        if step < self._plan.steps:
            every, pictures = self._options.save_every_n_steps, self._preview.every_steps
            self._owed(progress, step, every, names.step, pictures, f"{step:06d}", self._remove_old_steps)
        if progress.position == 0 and epoch:  # the state of an epoch
            every, pictures, tag = self._every_epochs, self._preview.every_epochs, f"e{epoch:06d}"
            self._owed(progress, epoch, every, names.epoch, pictures, tag, self._remove_old_epochs)

    def _owed(
        self,
        progress: Progress,
        count: int,
        every: int | None,
        name: Callable[[int], Path],
        pictures: int | None,
        tag: str,
        remove_old: Callable[[int], None],
    ) -> None:
        path, wants_state = name(count), self._options.save_state
        lacks_file, lacks_state = not path.exists(), wants_state and not self._names.state(path).exists()
        lacks_pictures = _due(count, pictures) and not self._preview.drawn(tag)
        self._accelerator.wait_for_everyone()  # before the main process changes what the others look at
        if _due(count, every):
            if lacks_file:
                self._save_adapter(path, progress, lacks_state)
            elif lacks_state:
                self._save_state(self._names.state(path), progress)
            remove_old(count)
        if lacks_pictures:
            self.draw(tag, progress.step)

    def _metadata(self, progress: Progress, ended: int | None = None) -> dict[str, str]:
        epoch = progress.epoch + (progress.position > 0) if ended is None else ended
        return metadata.at_save(
            self._run_metadata, step=progress.step, epoch=epoch, minimum=self._options.no_metadata
        )

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The values to save and draw: the averages of a schedule-free optimizer, and the EMA if it is on."""
        ema = self._ema.applied() if self._ema else contextlib.nullcontext()
        with optim.averaged_weights(self._optimizer), ema:
            yield

    # ------------------------------------------------------------------ what goes

    def _remove_old_steps(self, step: int) -> None:
        """kohya's rule for step files: the one at (step − limit − 1), rounded down to `every`, goes."""
        options, every = self._options, self._options.save_every_n_steps or 1
        self._remove_old(
            self._names.step,
            lambda limit: (step - limit - 1) // every * every,
            options.save_last_n_steps,
            options.save_last_n_steps_state,
        )

    def _remove_old_epochs(self, epoch: int) -> None:
        options, every = self._options, self._every_epochs or 1
        self._remove_old(
            self._names.epoch,
            lambda limit: epoch - limit * every,
            options.save_last_n_epochs,
            options.save_last_n_epochs_state,
        )

    def _remove_old(
        self,
        name: Callable[[int], Path],
        old: Callable[[int], int],
        files: int | None,
        states: int | None,
    ) -> None:
        """Remove a file and a state folder; `old` maps a limit to the step or epoch that is over it."""
        if not self._accelerator.is_main_process:
            return
        for limit, path_of in ((files, name), (states or files, lambda n: self._names.state(name(n)))):
            if limit and old(limit) > 0 and (path := path_of(old(limit))).exists():
                self._log.message(f"removing old checkpoint: {path}")
                remove(path)
