"""What is written while a run goes on, and when: checkpoints, states, adapter files, pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer

from lowrank.train import checkpoints, hub, metadata, optim
from lowrank.train.checkpoints import Checkpoint, Progress
from lowrank.train.ema import Ema
from lowrank.train.job import RunningJob
from lowrank.train.layer_sampling import LayerSampler
from lowrank.train.log import RunLog
from lowrank.train.network_module import KohyaNetwork
from lowrank.train.preview import Preview
from lowrank.train.schedule import RunPlan
from lowrank.train.validation import ValidationLoss


class Saver:
    """Called after every step and epoch; knows what is due and what may go."""

    def __init__(
        self,
        *,
        job: RunningJob,
        network: KohyaNetwork,
        optimizer: AcceleratedOptimizer,
        metadata: Mapping[str, str],
        fingerprint: Mapping[str, Any],
        plan: RunPlan,
        log: RunLog,
        preview: Preview,
        validation: ValidationLoss | None,
        layer_sampler: LayerSampler | None,
    ) -> None:
        self._options, self._hub, self._names = job.options.saving, job.options.hub, job.names
        self._accelerator, self._network, self._optimizer = job.accelerator, network, optimizer
        self._run_metadata, self._fingerprint, self._plan = metadata, fingerprint, plan
        self._log, self._preview, self._validation = log, preview, validation
        self._good: Path | None = None
        self.stop_asked = self.stopped = False
        decay = job.options.train.ema_decay
        self._ema = Ema(network.parameters(), decay) if decay else None
        self._stateful = [part for part in (self._ema, layer_sampler) if part]  # more of a checkpoint
        every = self._options.save_every_n_epochs
        if self._options.save_n_epoch_ratio:
            every = max(1, plan.epochs // self._options.save_n_epoch_ratio)
        self._every_epochs = every

    # ------------------------------------------------------------------ when

    def after_step(self, progress: Progress) -> bool:
        """Save and draw what is due after this step; True when the run shall stop here."""
        options, step = self._options, progress.step
        if self._ema:
            self._ema.update()
        last = step >= self._plan.steps
        if options.checkpointing_steps and (step % options.checkpointing_steps == 0 or last):
            self._checkpoint(progress)
        if options.save_every_n_steps and step % options.save_every_n_steps == 0 and not last:
            self._write(self._names.step(step), progress, options.save_state)
            self._expire(step, options.save_every_n_steps)
        if self._preview.due(step=step) and not last:
            self.draw(f"{step:06d}", step)
        if self._validation and self._validation.due(step=step):
            self._measure("step", step)
        if last and progress.position == self._plan.batches:  # the loop ends before it ends the epoch
            self._end_epoch(progress.epoch + 1)
        if self.stop_asked and not last:
            self._checkpoint(progress)
            self.stopped = True
            self._log.say(f"stopped at step {step}; go on with --resume {self._good}")
        return self.stopped

    def after_epoch(self, progress: Progress) -> None:
        """Save and draw what is due after an epoch; `progress.epoch` counts the epochs that ended."""
        epoch = progress.epoch
        self._end_epoch(epoch)
        if self._every_epochs and epoch % self._every_epochs == 0:
            path = self._names.epoch(epoch)
            self._write(path, progress, self._options.save_state)
            self._expire_epochs(epoch)
        if self._preview.due(epoch=epoch):
            self.draw(f"e{epoch:06d}", progress.step)

    def finish(self, progress: Progress) -> None:
        """The final file, and the final pictures."""
        options = self._options
        final = self._names.final()
        self._write(final, progress, options.save_state or options.save_state_on_train_end)
        self.draw("final", progress.step)
        self._log.say(f"model saved. {final}")

    def last_good(self) -> Path | None:
        """The newest whole checkpoint of this run."""
        return self._good

    # ------------------------------------------------------------------ what

    def _metadata(self, progress: Progress) -> dict[str, str]:
        begun = progress.epoch + (progress.position > 0)
        return metadata.at_save(
            self._run_metadata, step=progress.step, epoch=begun, minimum=self._options.no_metadata
        )

    def _checkpoint(self, progress: Progress) -> None:
        folder = self._names.checkpoint(progress.step)
        self._state(folder, progress)
        if self._accelerator.is_main_process:
            kept = self._options.checkpoints_total_limit
            checkpoints.prune(checkpoints.checkpoints(self._names.output_dir), kept, folder)

    def _state(self, folder: Path, progress: Progress) -> None:
        self._log.say(f"saving checkpoint: {folder}")

        def extra(part: Path) -> None:
            for state in self._stateful:
                state.save(part)

        checkpoints.save_state(
            folder,
            self._accelerator,
            self._network,
            progress,
            self._fingerprint,
            self._metadata(progress),
            extra,
        )
        self._good = folder

    def _write(self, path: Path, progress: Progress, with_state: bool) -> None:
        options = self._options
        precision = "float" if options.upcast_before_saving else options.save_precision
        if self._accelerator.is_main_process:
            self._log.say(f"saving checkpoint: {path}")
            with self._shown():
                path.parent.mkdir(parents=True, exist_ok=True)
                self._network.save_weights(
                    str(path), checkpoints.save_dtype(precision), self._metadata(progress)
                )
            hub.upload(self._hub, path)
        self._accelerator.wait_for_everyone()
        if with_state:
            self._state(self._names.state(path), progress)

    def draw(self, tag: str, step: int) -> None:
        """Pictures of the adapter as it would be saved."""
        with self._shown():
            self._preview.run(self._accelerator, self._network, tag, step)

    def _end_epoch(self, epoch: int) -> None:
        self._log.epoch(epoch)
        if self._validation and self._validation.due(epoch=epoch):
            self._measure("epoch", epoch)

    def _measure(self, kind: str, at: int) -> None:
        assert self._validation is not None  # the callers look
        with self._shown():
            value = self._validation.measure(self._accelerator, self._network)
        self._log.held_out(value, kind, at)

    @contextlib.contextmanager
    def _shown(self):
        """What is saved and drawn: schedule-free optimizers' averages, and the EMA where there is one."""
        with (
            optim.averaged_weights(self._optimizer),
            self._ema.applied() if self._ema else contextlib.nullcontext(),
        ):
            yield

    def _expire_epochs(self, epoch: int) -> None:
        files, every = self._options.save_last_n_epochs, self._every_epochs or 1
        states = self._options.save_last_n_epochs_state or files
        if files and epoch - files * every > 0:
            self._remove(self._names.epoch(epoch - files * every))
        if states and epoch - states * every > 0:
            self._remove(self._names.state(self._names.epoch(epoch - states * every)))

    def _expire(self, step: int, every: int) -> None:
        options = self._options
        states = options.save_last_n_steps_state or options.save_last_n_steps
        for keep, name in (
            (options.save_last_n_steps, self._names.step),
            (states, lambda n: self._names.state(self._names.step(n))),
        ):
            gone = checkpoints.expired(step, every, keep, name)
            if gone is not None:
                self._remove(gone)

    def _remove(self, path: Path) -> None:
        if self._accelerator.is_main_process and path.exists():
            self._log.say(f"removing old checkpoint: {path}")
            checkpoints.remove(path)

    def warmed_up(self) -> None:
        """The adapter now starts elsewhere, and so does its average."""
        if self._ema:
            self._ema.restart()

    def resume(self, checkpoint: Checkpoint) -> Progress:
        """Continue from a checkpoint."""
        progress = checkpoints.load_state(checkpoint, self._accelerator, self._network, self._fingerprint)
        for state in self._stateful:
            state.load(checkpoint.folder)
        self._good = checkpoint.folder
        self._log.say(
            f"resumed from {checkpoint.folder}: step {progress.step}, epoch {progress.epoch + 1}, batch "
            f"{progress.position + 1}"
        )
        return progress
