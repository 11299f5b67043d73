"""ABM: a warm-up before training that matches the signs of the pre-activations to a teacher's.

    L = mean over samples and layers l of  w_l · mean max(0, m_l − τ ⊙ z)²     τ = sign of the teacher's z

Paper: *ABM-LoRA: Activation Boundary Matching*, arXiv 2511.19145, stage 1; its teacher is the base with an
adapter that is trained already. A new adapter computes the base bit for bit, so the base as teacher changes
nothing (docs/abm.md). Differences from the paper: z is the input of each nonlinearity
(`abm_hooks.PREACTIVATIONS`), not the output of every adapted layer; the margin is relative to the layer by
default; the result of a harmful warm-up is discarded.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.adapters.method import Warmup, WarmupBatches
from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.network_module import FromFile, network_named
from lowrank.adapters.targets import as_passed
from lowrank.config.flags_training import Abm
from lowrank.data.loader import Batch, Loader
from lowrank.errors import Refused
from lowrank.files import parse_json
from lowrank.models.family import DTYPES, Models
from lowrank.naming import keys
from lowrank.tensors import has_values, read_tensors
from lowrank.train import network_module, setup
from lowrank.train.abm_hooks import Boundaries, activations, depth_weights
from lowrank.train.attach import check_base
from lowrank.train.job import RunningJob
from lowrank.train.loop import Forward, Run, average_gradients, batch_generator
from lowrank.train.validation import NOISE_LEVELS
from lowrank.train.warmup import NOISE, abm_name, log, noise, training_batches

logger = logging.getLogger(__name__)

HARMFUL = 1.005  # the guard's limit of the loss after ABM, relative to before
MEASURED = 2  # batches that the guard measures, at each of NOISE_LEVELS


@contextlib.contextmanager
def _at_strength(*networks: tuple[AdapterNetwork, float]) -> Iterator[None]:
    """Set the multipliers of networks for a block and restore them afterwards."""
    before = [(layer, layer.multiplier) for network, _ in networks for layer in network.layers()]
    for network, multiplier in networks:
        network.set_multiplier(multiplier)
    try:
        yield
    finally:
        for layer, multiplier in before:
            layer.multiplier = multiplier


# ------------------------------------------------------------------ the teacher


def check_abm(job: RunningJob, models: Models, shapes: nn.Module | None) -> None:
    """Check the network and the teacher file before any data is encoded. Raises `Refused`.

    `shapes` is the denoiser on the meta device, or None.
    """
    path = job.options.abm.abm_teacher
    if network_module.facade_of(job.networks) is None:
        raise Refused(
            "--abm_enabled needs a network module of this program, whose adapters can be switched off, and "
            f"{job.networks.__name__} is another program's; leave it out"
        )
    if path != "base":
        check_base(job, models, path)
        teacher = load_teacher(path, shapes or job.family.empty(models), [], only_denoiser=True)
        if teacher is not None:
            network_module.report_unused(path, teacher.unused, job.options.network.strict)


def load_teacher(
    path: str, denoiser: nn.Module, encoders: list[nn.Module], only_denoiser: bool = False
) -> FromFile | None:
    """Load a teacher from an adapter file with the module that its metadata names, else LoRA; not attached.

    `only_denoiser` leaves out layers of text encoders; returns None if no layer is left. Raises `Refused` for
    a file that is no adapter, of another base, or of another program's module.
    """
    whole, facts = read_tensors(path)
    state = {key: value for key, value in whole.items() if not (only_denoiser and keys.is_text_encoder(key))}
    if not state:
        return None
    name = facts.get("ss_network_module", "networks.lora")
    facade = network_named(name.removeprefix("networks."))
    if facade is None:
        raise Refused(
            f"the teacher {path} was made by {name}, and ABM reads only adapters of the modules in "
            "networks/; give another file"
        )
    given = parse_json(facts.get("ss_network_args") or "{}", f"ss_network_args in {path}")
    if not isinstance(given, dict):
        raise Refused(f"ss_network_args in {path} is not a JSON object; use another file")
    arguments = {key: value for key, value in given.items() if key in facade.known}
    part = None if len(state) == len(whole) else state
    made = facade.from_file(1.0, path, as_passed(encoders, denoiser), denoiser, part, **arguments)
    if has_values(next(denoiser.parameters())):
        made.network.read_state(state, facts, path)
    return made


@contextlib.contextmanager
def _teaching(run: Run, path: str) -> Iterator[tuple[Forward, Callable[[], Any]]]:
    """Yield the teacher's forward and a context manager that switches the model from student to teacher.

    Outside the context the student is active, also while a backward recomputes activations.
    """
    student = run.network
    assert isinstance(student, AdapterNetwork)  # `check_abm` refuses others
    if path == "base":
        yield run.forward, lambda: _at_strength((student, 0.0))
        return
    loaded = load_teacher(path, run.denoiser, run.text_encoders)
    assert loaded is not None
    teacher = loaded.network
    teacher.requires_grad_(False).eval()
    teacher.cast_frozen(DTYPES[run.accelerator.mixed_precision])
    teacher.to(run.accelerator.device)
    teacher.apply_to(run.text_encoders, run.denoiser, bool(run.text_encoders), True)
    try:
        teacher.set_multiplier(0.0)
        yield replace(run.forward, network=teacher), lambda: _at_strength((student, 0.0), (teacher, 1.0))
    finally:
        teacher.restore()


# ------------------------------------------------------------------ the stage


class Measured(NamedTuple):
    """Loss on fixed images and noise, and the share of pre-activations with the teacher's sign."""

    loss: float
    agreement: float


def stage(abm: Abm, run: Run, held_out: Loader | None) -> Warmup:
    """The ABM warm-up stage; its guard measures `held_out` images, or training images if it is None."""

    def work(network: AdapterNetwork, _: WarmupBatches) -> None:
        _Stage(abm, run, held_out, network).work()

    return Warmup(abm_name(abm), work)


class _Stage:
    def __init__(self, abm: Abm, run: Run, held_out: Loader | None, network: AdapterNetwork) -> None:
        self.abm, self.run, self.network = abm, run, network
        self.batch_size = abm.abm_batch_size or network.method.options.get("abm_batch_size")
        measured = run.loader.shard(0, 1) if held_out is None else held_out
        self.measured = list(itertools.islice(measured.epoch(0), MEASURED))

    def work(self) -> None:
        abm, message = self.abm, self.run.log.message
        with contextlib.ExitStack() as stack:
            self.teacher_forward, self.as_teacher = stack.enter_context(_teaching(self.run, abm.abm_teacher))
            self.boundaries = self._survey()
            stack.enter_context(self.boundaries.watched())
            before = self._measure()
            self._tell(before, 0)
            agreed = before.agreement == 1
            if agreed and (abm.abm_margin == 0 or (abm.abm_guard and abm.abm_teacher == "base")):
                message(
                    "ABM is skipped: every pre-activation already has the sign that the teacher "
                    f"{abm.abm_teacher} gives it; give --abm_teacher FILE with a trained adapter"
                )
                return
            values = [p.detach().clone() for p in self.network.parameters()]
            self._train()
            after = self._measure()
            self._tell(after, abm.abm_steps)
            summary = (
                f"loss {before.loss:.5f} → {after.loss:.5f}, equal signs {before.agreement:.2%} → "
                f"{after.agreement:.2%}"
            )
            worse = not after.loss <= HARMFUL * before.loss or not after.agreement >= before.agreement
            if abm.abm_guard and worse:
                with torch.no_grad():
                    for parameter, value in zip(self.network.parameters(), values, strict=True):
                        parameter.copy_(value)
                message(
                    f"ABM is undone: it raised the loss or lowered the share of equal signs ({summary}); "
                    "give --no-abm_guard to keep its result"
                )
            else:
                message(f"ABM: {summary}")

    # ------------------------------------------------------------------ passes

    def _pass(
        self, mode: str, batch: Batch, generator: Callable[[], torch.Generator], at: float | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Values by activation from one forward, and its losses (B,) if the forward was complete."""
        teaches, losses = mode == "teach", []
        forward = self.teacher_forward if teaches else self.run.forward
        with self.as_teacher() if teaches else contextlib.nullcontext():
            values = self.boundaries.during(
                mode, lambda: losses.append(forward.losses(batch, generator(), at)[0])
            )
        return values, losses[0] if losses else None

    def _compare(
        self, mode: str, batch: Batch, generator: Callable[[], torch.Generator], at: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run teacher and student on the same noise; return the mean over layers of the values of `mode`."""
        with torch.no_grad():
            self._pass("teach", batch, generator, at)
        values, losses = self._pass(mode, batch, generator, at)
        return torch.stack(list(values.values())).mean(), losses

    def _survey(self) -> Boundaries:
        """Find the activations behind trained layers in the order of the forward, and their loss weights."""
        abm, run = self.abm, self.run
        named = [(f"text encoder {n + 1}", encoder) for n, encoder in enumerate(run.text_encoders)]
        everywhere = [
            activation
            for part, root in (*named, ("denoiser", run.denoiser))
            for activation in activations(part, root)
        ]
        self.boundaries = Boundaries(everywhere, abm.abm_margin, abm.abm_margin_mode == "relative")
        batch = _first(self.measured[0], 1)
        self.network.eval()  # dropout must not skip a layer
        with self.boundaries.watched():
            values, _ = self._pass("survey", batch, lambda: noise(run, batch), None)
        self.network.train()
        weights: dict[str, float] = {}
        for part in dict.fromkeys(name.partition(".")[0] for name in values):
            behind = [name for name, after in values.items() if after and name.partition(".")[0] == part]
            last = behind[len(behind) - math.ceil(abm.abm_layers * len(behind)) :]
            weights |= zip(last, depth_weights(len(last), abm.abm_weight_strategy), strict=True)
        if not weights:
            raise Refused(
                "no nonlinearity of this model comes after a trained layer, so ABM has nothing to match; "
                "leave --abm_enabled out"
            )
        kept = [place for place in everywhere if place.name in weights]
        return replace(self.boundaries, places=kept, weights=weights)

    @torch.no_grad()
    def _measure(self) -> Measured:
        accelerator = self.run.accelerator
        sums = torch.zeros(3, device=accelerator.device)
        self.network.eval()
        for index, batch in enumerate(self.measured):
            if index % accelerator.num_processes == accelerator.process_index:
                for number, level in enumerate(NOISE_LEVELS):
                    same = partial(batch_generator, self.run.seed, NOISE // 2 - number, batch.position)
                    differing, losses = self._compare("count", batch, same, level)
                    assert losses is not None  # "count" runs the complete forward
                    sums += torch.stack([losses.mean().float(), differing, torch.ones_like(differing)])
        self.network.train()
        summed: Any = accelerator.reduce(sums, "sum")
        loss, differing, count = summed.tolist()
        return Measured(loss / count, 1 - differing / count)

    # ------------------------------------------------------------------ steps

    def loss(self, batch: Batch) -> Tensor:
        """The hinge of one batch, or of its first --abm_batch_size samples; differentiable."""
        batch = _first(batch, self.batch_size) if self.batch_size else batch
        return self._compare("learn", batch, lambda: noise(self.run, batch))[0]

    def _train(self) -> None:
        run, abm, accelerator = self.run, self.abm, self.run.accelerator
        trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        groups, _ = network_module.optimizer_groups(self.network, abm.abm_lr, abm.abm_lr, abm.abm_lr)
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) in trained]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], abm.abm_lr, weight_decay=0.0)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # a separate scaler: the state of the run's scaler must not change before training
        scaler = torch.amp.GradScaler(accelerator.device.type, enabled=accelerator.scaler is not None)
        if any(p.dtype == torch.float16 for p in parameters):
            setup.scale_fp16_gradients(scaler)
        quiet = not accelerator.is_main_process
        bar = tqdm(
            itertools.islice(training_batches(run), abm.abm_steps), "ABM", abm.abm_steps, disable=quiet
        )
        for step, batch in enumerate(bar, 1):
            loss = self.loss(batch)
            if not torch.isfinite(loss):
                raise Refused(
                    f"the loss of ABM is not finite at its step {step}; lower --abm_lr {abm.abm_lr:g} or "
                    f"--abm_margin {abm.abm_margin:g}"
                )
            scaler.scale(loss).backward()
            average_gradients(accelerator, parameters)
            scaler.unscale_(optimizer)
            if run.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters, run.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            mean: Any = accelerator.reduce(loss.detach(), "mean")
            bar.set_postfix_str(f"loss={float(mean):.5f}")
            log(run, {"abm/loss": float(mean)}, step)

    def _tell(self, measured: Measured, step: int) -> None:
        log(self.run, {"abm/held_out_loss": measured.loss, "abm/equal_signs": measured.agreement}, step)


def _first(batch: Batch, count: int) -> Batch:
    """The first samples of a batch."""
    cut = {name: value[:count] for name, value in vars(batch).items() if isinstance(value, (Tensor, tuple))}
    return replace(batch, **cut)
