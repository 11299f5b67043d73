"""One training run from its options: read the data, cache it, put the network on the model, loop, save."""

from __future__ import annotations

import contextlib
import logging
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from lowrank.config.checks import trains_text
from lowrank.config.command_line import Parsed, pairs
from lowrank.data.loader import Loader
from lowrank.files import only_writer
from lowrank.models import memory
from lowrank.models.family import DTYPES, Family, Models
from lowrank.train import (
    abm,
    check,
    checkpoints,
    data,
    dry_run,
    layer_sampling,
    metadata,
    network_module,
    optim,
    setup,
    warmup,
)
from lowrank.train.attach import Job, Script, adapt, keep_vae, merge_base_weights
from lowrank.train.base_weights import changes_text
from lowrank.train.checkpoints import Names, Progress
from lowrank.train.log import RunLog, describe_run
from lowrank.train.loop import Forward, Run, loss_components, train
from lowrank.train.prompts import Prompt
from lowrank.train.saving import Saver
from lowrank.train.schedule import RunPlan, build_scheduler, check_schedule, plan_run
from lowrank.train.text_conditions import Text, all_captions

logger = logging.getLogger(__name__)


def launch(parsed: Parsed, family: Family, objective: Any, options: Any, script: Script) -> int:
    """Train as `parsed` says; `objective` and `options` are the family's records."""
    folder = Path(parsed.value("output_dir"))
    names = Names(folder, parsed.value("output_name"), parsed.value("save_model_as"), script.unnamed)
    check.check_paths(parsed, names)
    accelerator = setup.accelerator(parsed, folder)
    setup.quiet(accelerator, parsed)
    networks = network_module.find_module(parsed.value("network_module"))
    logger.info("import network module: %s", networks.__name__)
    arguments = pairs("--network_args", parsed.value("network_args"))
    if (facade := network_module.facade_of(networks)) is not None:
        facade.check(arguments)
    optim.chosen(parsed.optimizer)
    check_schedule(parsed.optimizer)
    seed = _seed(parsed, folder)
    job = Job(parsed, script, family, options, objective, accelerator, names, networks, arguments, seed)
    writes = accelerator.is_main_process and not parsed.value("dry_run")
    with only_writer(folder) if writes else contextlib.nullcontext():
        return _launch(job)


def _launch(job: Job) -> int:
    parsed, family, accelerator = job.parsed, job.family, job.accelerator
    source = setup.source(parsed, accelerator)
    models = family.load(source, ())
    setup.check_prediction(job.objective, family, models)
    if not job.value("dry_run"):
        data.make_class_images(parsed, family, source, job.options, job.script.prompt, accelerator)
    loader = Loader(
        data.training_datasets(parsed),
        seed=job.seed,
        prior_loss_weight=job.value("prior_loss_weight"),
        skip_bad_images=job.value("skip_bad_images"),
        multiple=family.bucket_step(models),
        workers=job.value("max_data_loader_n_workers"),
    )
    held = loader.held_out()
    loader = loader.shard(accelerator.process_index, accelerator.num_processes)
    shapes, rehearsal = check.rehearse(job, models)
    if parsed.abm.abm_enabled and not job.value("resume"):
        abm.check_abm(job, models, shapes)
    if job.value("dry_run"):
        return dry_run.show(
            parsed, loader, shapes, rehearsal, accelerator, DTYPES[accelerator.mixed_precision]
        )
    if job.value("resume"):
        check.check_resumed(job, loader, models, _plan(job, loader).steps)

    prompts = setup.prompts(parsed, family, models, job.script.prompt)
    drawn = [p.prompt for p in prompts] + [p.negative_prompt or "" for p in prompts if p.scale > 1]
    check.load_components(job, models, ("text", "vae"))
    if text_merged := changes_text(parsed):
        check.load_components(job, models, ("denoiser",))  # one file's layers for both are merged in one call
        merge_base_weights(job, models)
    captions = all_captions([loader] if held is None else [loader, held])
    text = Text(parsed, captions, family, models, job.options, tuple(drawn), trains_text(parsed), accelerator)
    loader = data.encode_latents(parsed, loader, family, models, accelerator)
    if held is not None:
        held = data.encode_latents(parsed, held, family, models, accelerator)
    encoders = text.keep()
    keep_vae(models, loader.encoded and (held is None or held.encoded), bool(prompts))
    check.load_components(job, models, ("denoiser",))
    if not text_merged:
        merge_base_weights(job, models)
    network = adapt(job, models, encoders)
    return _train(job, models, loader, held, text, prompts, encoders, network)


def _seed(parsed: Parsed, folder: Path) -> int:
    if parsed.value("seed") is not None:
        return parsed.value("seed")
    if parsed.value("resume"):
        return checkpoints.seed_of(checkpoints.find_state(parsed.value("resume"), folder))
    return random.SystemRandom().randrange(2**31)


# ------------------------------------------------------------------ the run


def _train(
    job: Job,
    models: Models,
    loader: Loader,
    held: Loader | None,
    text: Text,
    prompts: list[Prompt],
    encoders: list[nn.Module],
    network: Any,
) -> int:
    parsed, family, accelerator, options = job.parsed, job.family, job.accelerator, job.options
    plan = _plan(job, loader)
    groups, group_names = network_module.optimizer_groups(
        network, job.value("text_encoder_lr"), job.value("unet_lr"), setup.rate(parsed, accelerator)
    )
    optimizer_name, optimizer_args, optimizer = optim.build_optimizer(groups, parsed.optimizer)
    scheduler = build_scheduler(optimizer, parsed.optimizer, plan.steps, accelerator.num_processes)
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)

    told = metadata.of_run(
        parsed,
        family,
        models,
        loader,
        held,
        optimizer=f"{optimizer_name}({optimizer_args})",
        steps=plan.steps,
        epochs=plan.epochs,
        network=setup.network_facts(parsed, network) | {"mixed_precision": accelerator.mixed_precision},
        arguments=job.arguments,
        base_hash=family.model_hash(models, "denoiser"),
        seed=job.seed,
    )
    folder = job.names.output_dir
    preview = setup.preview(parsed, prompts, folder, family, models, options, text, accelerator)
    sizes = data.batch_size_conditions(family, accelerator.device)
    forward = Forward(
        accelerator,
        network,
        job.objective,
        data.latents_of(family, models, accelerator.device),
        lambda batch: {**text(batch.captions), **sizes(batch)},
        lambda noisy, t, conditions: family.denoise(models.denoiser, noisy, t, conditions, options),
    )
    # kohya averages over one epoch; an epoch of one step would average nothing
    window = plan.steps_per_epoch if plan.steps_per_epoch > 1 else 20
    log = RunLog(accelerator, folder, loss_components(network), plan.steps, window)
    facts = check.run_fingerprint(job, loader, models)
    measured = setup.held_out(parsed, held, forward.losses, job.seed)
    chooser = layer_sampling.layer_sampler(network, forward, held, loader, job.seed)
    keeper = Saver(
        parsed, accelerator, network, optimizer, told, log, preview, measured, chooser, job.names, facts, plan
    )

    progress = keeper.resume() if job.value("resume") else Progress()
    if progress.step >= plan.steps:
        check.refuse_ended(job, progress.step, plan.steps)
        keeper.finish(progress)  # the run was stopped between its last checkpoint and its last file
        return 0
    if accelerator.is_main_process:
        describe_run(folder, parsed.toml(), parsed.command)
    setup.start_trackers(parsed, accelerator, job.script.tracker)
    setup.announce(loader, plan, parsed, network, accelerator)
    run = Run(
        forward,
        models.denoiser,
        encoders,
        loader,
        optimizer,
        scheduler,
        group_names,
        plan.steps,
        plan.epochs,
        job.seed,
        job.value("max_grad_norm"),
        job.value("scale_weight_norms"),
        log,
        keeper.after_step,
        keeper.after_epoch,
        keeper.last_good,
        chooser.let_through if chooser else lambda step: {},
    )
    if not job.value("resume"):
        boundaries = abm.stage(parsed.abm, run, held) if parsed.abm.abm_enabled else None
        with memory.tf32(job.value("allow_tf32")):
            warmup.warm_up(run, boundaries)
        keeper.warmed_up()
    if job.value("sample_at_first") and progress.step == 0:
        keeper.draw("e000000", 0)
    try:
        with _stoppable(keeper), memory.tf32(job.value("allow_tf32")), optim.training(optimizer):
            progress = train(run, progress)
        if not keeper.stopped:
            keeper.finish(progress)
    finally:
        log.close()
    return 130 if keeper.stopped else 0


def _plan(job: Job, loader: Loader) -> RunPlan:
    return plan_run(
        len(loader),
        job.accelerator.num_processes,
        job.value("gradient_accumulation_steps"),
        job.value("max_train_steps"),
        job.value("max_train_epochs"),
    )


@contextlib.contextmanager
def _stoppable(keeper: Saver) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) ends the run at the next step, saving it; the second ends it at once."""

    def stop(number, _frame):
        if keeper.stop_asked:
            raise KeyboardInterrupt
        keeper.stop_asked = True
        logger.warning("stopping: a checkpoint is written after this step; once more to stop at once")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
