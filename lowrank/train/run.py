"""A training run: check the job, read and cache the data, attach the network, train, save."""

from __future__ import annotations

import contextlib
import logging
import random
from pathlib import Path

from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler

from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.rates import decay_targets
from lowrank.config.flag import pairs
from lowrank.data.loader import Loader
from lowrank.data.sources import training_datasets
from lowrank.files import only_writer, remove_leftovers
from lowrank.models import memory
from lowrank.models.family import Models
from lowrank.train import (
    abm,
    check,
    data,
    dry_run,
    fit_memory,
    layer_sampling,
    metadata,
    optim,
    peers,
    plan_memory,
    processes,
    setup,
    warmup,
)
from lowrank.train.attach import adapt, changes_text, keep_vae, load_components, merge_base_weights
from lowrank.train.checkpoints import Checkpoint, Names, Progress, as_resumed
from lowrank.train.job import RunningJob, TrainJob
from lowrank.train.log import RunLog
from lowrank.train.loop import Run, loss_components, run_forward, train
from lowrank.train.network_module import KohyaNetwork, facade_of, find_module, optimizer_groups
from lowrank.train.phases import phase
from lowrank.train.preview import preview_prompts, run_preview
from lowrank.train.prompts import Prompt
from lowrank.train.record import begin_record
from lowrank.train.requests import Requests, remove_requests
from lowrank.train.saving import Saver
from lowrank.train.schedule import RunPlan, build_scheduler, check_schedule, plan_run
from lowrank.train.text_conditions import TextConditions, text_conditions
from lowrank.train.validation import validation_loss

logger = logging.getLogger(__name__)


def launch(job: TrainJob) -> int:
    """Check a job, lock its output folder and train; return the exit code. Raises `Refused`."""
    options, saving = job.options, job.options.saving
    assert saving.output_dir is not None  # each script has a default or requires it
    folder = Path(saving.output_dir)
    names = Names(folder, saving.output_name, saving.save_model_as, job.script.unnamed)
    resumed = check.check_paths(options, names)
    sharding = processes.launched_sharding(options)
    accelerator = setup.run_accelerator(options, folder)
    setup.start_log(job, accelerator)
    networks = find_module(options.network.network_module or "")
    logger.info("import network module: %s", networks.__name__)
    arguments = pairs("--network_args", options.network.network_args)
    if (facade := facade_of(networks)) is not None:
        facade.check(arguments)
    optim.chosen(options.optimizer)
    check_schedule(options.optimizer)
    running = RunningJob(
        **vars(job),
        accelerator=accelerator,
        names=names,
        networks=networks,
        arguments=arguments,
        seed=_seed(options.train.seed, resumed),
        resumed=resumed,
        sharding=sharding,
    )
    writes = accelerator.is_main_process and not options.train.dry_run
    with peers.watched(accelerator), only_writer(folder) if writes else contextlib.nullcontext():
        if writes:
            remove_leftovers(folder, locked=True)
            remove_leftovers(folder / "sample")
            remove_requests(folder, "before this run began")
        code = _launch(running)
        if writes:
            remove_requests(folder, "after the last step")
        return code


def _launch(job: RunningJob) -> int:
    """Read and encode the data with one part of the model at a time in memory, attach the network, train."""
    options, family, accelerator = job.options, job.family, job.accelerator
    source = setup.run_source(job)
    models = family.load(source, ())
    setup.check_prediction(job.objective, family, models)
    if not options.train.dry_run:
        data.make_class_images(job, source)
    loader = Loader(
        training_datasets(options),
        seed=job.seed,
        prior_loss_weight=options.prior.prior_loss_weight,
        skip_bad_images=options.data.skip_bad_images,
        multiple=family.bucket_step(models),
        workers=options.data.max_data_loader_n_workers,
    )
    held_out = loader.held_out()
    loader = loader.shard(accelerator.process_index, accelerator.num_processes)
    denoiser_shapes, network_shapes = check.rehearse(job, models)
    phases = None
    if options.memory.vram is not None:
        shapes = denoiser_shapes if network_shapes is not None else None
        job, phases = fit_memory.fitted(job, models, loader, shapes)
        options = job.options
    if options.abm.abm_enabled and job.resumed is None:
        abm.check_abm(job, models, denoiser_shapes)
    if options.train.dry_run:
        if network_shapes is not None and phases is None:
            phases = plan_memory.plan_memory(job, models, loader)
        return dry_run.show(job, loader, _plan(job, loader), denoiser_shapes, network_shapes, phases or [])
    if job.resumed is not None:
        fingerprint = as_resumed(check.run_fingerprint(job, loader, models), job.resumed, loader)
        check.check_resumed(job, fingerprint, _plan(job, loader).steps)

    prompts = preview_prompts(job, models)
    texts = [p.prompt for p in prompts] + [p.negative_prompt or "" for p in prompts if p.scale > 1]
    text_merged = changes_text(job)
    planned = plan_memory.Prediction(job, models, loader, phases)
    change = "free memory, or give --mixed_precision bf16"
    with phase("encoding the captions", change, None, lambda: planned.of("text encoding")):
        load_components(job, models, ("text",))
        if text_merged:
            load_components(job, models, ("denoiser",))  # a file is merged into both in one call
            merge_base_weights(job, models)
        text = text_conditions(job, models, [loader] if held_out is None else [loader, held_out], texts)
    change = "give --vae_batch_size 1 and a lower --resolution"
    with phase("encoding the pictures", change, None, lambda: planned.of("VAE encoding")):
        load_components(job, models, ("vae",))  # text encoders are freed by now
        loader = data.encode_latents(job, loader, models)
        if held_out is not None:
            held_out = data.encode_latents(job, held_out, models)
    keep_vae(models, loader.encoded and (held_out is None or held_out.encoded), bool(prompts))
    doing, change = "reading the denoiser and making the adapter", "give --fp8_base or a lower --network_dim"
    with phase(doing, change, None, lambda: planned.of("training step")):
        load_components(job, models, ("denoiser",))
        if not text_merged:
            merge_base_weights(job, models)
        network = adapt(job, models, text.encoders)
    return _train(job, models, loader, held_out, text, prompts, network, planned)


def _seed(given: int | None, resumed: Checkpoint | None) -> int:
    if given is not None:
        return given
    return random.SystemRandom().randrange(2**31) if resumed is None else resumed.seed


def _train(
    job: RunningJob,
    models: Models,
    loader: Loader,
    held_out: Loader | None,
    text: TextConditions,
    prompts: list[Prompt],
    network: KohyaNetwork,
    planned: plan_memory.Prediction,
) -> int:
    """Build the saver and the loop, resume or warm up, train, and save the final file."""
    plan, folder = _plan(job, loader), job.names.output_dir
    optimizer, scheduler, description, group_names = _optimizer(job, network, plan)
    forward = run_forward(job, models, network, text)
    # the moving average covers one epoch, as in kohya's scripts, or 20 steps if an epoch has one step
    window = plan.steps_per_epoch if plan.steps_per_epoch > 1 else 20
    log = RunLog(job.accelerator, folder, loss_components(network), plan.steps, window)
    together = job.sharding is not None
    sampler = layer_sampling.layer_sampler(network, forward, held_out, loader, job.seed, together)
    requests = Requests(folder, job.accelerator)
    saver = Saver(
        job=job,
        network=network,
        optimizer=optimizer,
        metadata=metadata.at_start(
            job, models, network, loader=loader, held_out=held_out, plan=plan, optimizer=description
        ),
        fingerprint=check.run_fingerprint(job, loader, models),
        plan=plan,
        log=log,
        preview=run_preview(job, models, prompts, text),
        validation=validation_loss(job.options.validation, held_out, forward.losses, job.seed, together),
        layer_sampler=sampler,
        requests=requests,
        planned=planned,
    )
    run = Run(
        forward=forward,
        denoiser=models.denoiser,
        text_encoders=text.encoders,
        loader=loader,
        optimizer=optimizer,
        scheduler=scheduler,
        group_names=group_names,
        steps=plan.steps,
        epochs=plan.epochs,
        seed=job.seed,
        max_grad_norm=job.options.optimizer.max_grad_norm,
        scale_weight_norms=job.options.network.scale_weight_norms,
        log=log,
        after_step=saver.after_step,
        after_epoch=saver.after_epoch,
        last_checkpoint=saver.last_checkpoint,
        mask_gradients=sampler.mask_gradients if sampler else None,
        sharded=together,
    )
    return _start_or_resume(job, run, saver, requests, held_out, planned)


def _optimizer(
    job: RunningJob, network: KohyaNetwork, plan: RunPlan
) -> tuple[AcceleratedOptimizer, AcceleratedScheduler, str, list[str]]:
    """The prepared optimizer and scheduler, the optimizer's name with arguments, and its groups' names."""
    options = job.options.optimizer
    groups, group_names = optimizer_groups(
        network, options.text_encoder_lr, options.unet_lr, setup.base_rate(job)
    )
    name, arguments, optimizer = optim.build_optimizer(groups, options)
    if isinstance(network, AdapterNetwork):
        optim.decay_towards(optimizer, decay_targets(network))
    scheduler = build_scheduler(optimizer, options, plan.steps, job.accelerator.num_processes)
    return (*job.accelerator.prepare(optimizer, scheduler), f"{name}({arguments})", group_names)


def _start_or_resume(
    job: RunningJob,
    run: Run,
    saver: Saver,
    requests: Requests,
    held_out: Loader | None,
    planned: plan_memory.Prediction,
) -> int:
    """Take the run from its checkpoint or its warm-up to its last file; return the exit code."""
    options = job.options
    progress = Progress() if job.resumed is None else saver.resume(job.resumed, run.loader)
    if progress.step >= run.steps:
        check.refuse_ended(job, progress.step, run.steps)
        saver.finish(progress)  # the run had stopped between its last checkpoint and its final file
        return 0
    if job.accelerator.is_main_process:
        begin_record(job.names, job.config(options), job.command, resumed=job.resumed is not None)
    setup.start_trackers(job)
    models = [run.denoiser, *run.text_encoders]
    setup.announce(job, run.loader, _plan(job, run.loader), run.network, models)
    if job.resumed is None:
        abm_stage = abm.stage(options.abm, run, held_out) if options.abm.abm_enabled else None
        with memory.tf32(options.train.allow_tf32):
            warmup.warm_up(run, abm_stage)
        saver.after_warmup()
    if options.sampling.sample_at_first and progress.step == 0:
        saver.draw("e000000", 0)
    try:
        change = (
            "give --gradient_checkpointing, --train_batch_size 1, a lower --resolution or --network_dim, or "
            "--fp8_base"
        )
        with (
            phase("training", change, saver.last_checkpoint, lambda: planned.of("training step")),
            requests.listening(),
            memory.tf32(options.train.allow_tf32),
            optim.training(run.optimizer),
        ):
            progress = train(run, progress)
        if not saver.stopped:
            saver.finish(progress)
    finally:
        run.log.close()
    return 130 if saver.stopped else 0


def _plan(job: RunningJob, loader: Loader) -> RunPlan:
    train = job.options.train
    return plan_run(
        len(loader),
        job.accelerator.num_processes,
        train.gradient_accumulation_steps,
        train.max_train_steps,
        train.max_train_epochs,
    )
