"""One training run from its options: read the data, cache it, put the network on the model, loop, save."""

from __future__ import annotations

import contextlib
import logging
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lowrank.adapters.network import AdapterNetwork
from lowrank.data.loader import Loader
from lowrank.errors import Refused
from lowrank.models import memory
from lowrank.models.family import Family, Models, move, release
from lowrank.options import Parsed, pairs
from lowrank.train import dry, inputs, metadata, module, optim, setup
from lowrank.train.log import RunLog, describe_run
from lowrank.train.loop import Run, components, train
from lowrank.train.saving import Keeper
from lowrank.train.state import Names, Progress

logger = logging.getLogger(__name__)


def launch(parsed: Parsed, family: Family, objective: Any, options: Any, tracker: str) -> int:
    """Train as `parsed` says; `objective` and `options` are the family's records, `tracker` a folder name."""
    if not parsed.value("output_dir"):
        raise Refused("--output_dir is missing; say where the run's folder shall be")
    folder = Path(parsed.value("output_dir"))
    accelerator = setup.accelerator(parsed, folder)
    setup.quiet(accelerator, parsed)
    seed = (
        parsed.value("seed") if parsed.value("seed") is not None else random.SystemRandom().randrange(2**31)
    )
    networks = module.find_module(parsed.value("network_module"))
    arguments = pairs("--network_args", parsed.value("network_args"))
    if (facade := module.facade_of(networks)) is not None:
        facade.check(arguments)

    source = setup.source(parsed, accelerator)
    optim.chosen(parsed.optimizer)  # a misspelt name is refused before anything is loaded
    models = family.load(source, ())
    if not parsed.value("dry_run"):
        inputs.make_class_images(parsed, family, source, options, accelerator)
    loader = Loader(
        inputs.datasets(parsed),
        seed=seed,
        prior_loss_weight=parsed.value("prior_loss_weight"),
        skip_bad_images=parsed.value("skip_bad_images"),
        multiple=family.bucket_step,
        workers=parsed.value("max_data_loader_n_workers"),
    )
    loader = loader.shard(accelerator.process_index, accelerator.num_processes)
    if parsed.value("dry_run"):
        return dry.show(
            parsed,
            family,
            models,
            loader,
            networks,
            arguments,
            accelerator,
            setup.DTYPES[accelerator.mixed_precision],
        )

    prompts = setup.prompts(parsed)
    family.add(models, ("text", "vae"))
    text = inputs.Text(parsed, loader, family, models, options, tuple(p.prompt for p in prompts), accelerator)
    loader = inputs.encode_latents(parsed, loader, family, models, accelerator)
    trains_text = parsed.value("train_text_encoder") or parsed.value("network_train_text_encoder_only")
    if trains_text and text.live:
        raise Refused(
            "--train_text_encoder needs captions that can be listed; leave out --shuffle_caption, "
            "--caption_tag_dropout_rate, --enable_wildcard and --token_warmup_step"
        )
    encoders = family.keep_trained_text(models) if trains_text else []
    text.trained = trains_text
    if not trains_text and not text.live:
        release(models, ("text",))
    live_pixels = next(iter(loader.epoch(0))).encoded is None
    if not live_pixels and prompts:
        move(models, ("vae",), "cpu")
    elif not live_pixels:
        release(models, ("vae",))

    family.add(models, ("denoiser",))
    _prepare_denoiser(parsed, models, accelerator)
    torch.manual_seed(seed)
    _merge_base_weights(parsed, networks, models)
    network = module.create(
        networks,
        models.denoiser,
        encoders,
        rank=parsed.value("network_dim"),
        alpha=parsed.value("network_alpha"),
        dropout=parsed.value("network_dropout"),
        arguments=arguments,
        weights=parsed.value("network_weights"),
        dim_from_weights=parsed.value("dim_from_weights"),
        train_denoiser=not parsed.value("network_train_text_encoder_only"),
    )
    _prepare_network(parsed, network, models, accelerator)

    plan = optim.plan(
        len(loader),
        accelerator.num_processes,
        parsed.value("gradient_accumulation_steps"),
        parsed.value("max_train_steps"),
        parsed.value("max_train_epochs"),
    )
    groups, group_names = module.optimizer_groups(
        network, parsed.value("text_encoder_lr"), parsed.value("unet_lr"), setup.rate(parsed, accelerator)
    )
    optimizer_name, optimizer_args, optimizer = optim.build_optimizer(groups, parsed.optimizer)
    scheduler = optim.build_scheduler(optimizer, parsed.optimizer, plan.steps, accelerator.num_processes)
    optimizer, scheduler = accelerator.prepare(optimizer, scheduler)

    base_hash = family.model_hash(models, "denoiser")
    told = metadata.of_run(
        parsed,
        family,
        models,
        loader,
        optimizer=f"{optimizer_name}({optimizer_args})",
        steps=plan.steps,
        epochs=plan.epochs,
        network=setup.network_facts(parsed, network),
        arguments=arguments,
        base_hash=base_hash,
        seed=seed,
    )
    preview = setup.preview(parsed, prompts, folder, family, models, options, text, accelerator)
    log = RunLog(accelerator, folder, components(network), plan.steps, max(plan.steps_per_epoch, 20))
    keeper = Keeper(
        parsed,
        accelerator,
        network,
        optimizer,
        told,
        log,
        preview,
        Names(folder, parsed.value("output_name"), parsed.value("save_model_as")),
        run_facts={
            "network_module": networks.__name__,
            "network_dim": parsed.value("network_dim"),
            "seed": seed,
            "batches_per_epoch": len(loader),
            "processes": accelerator.num_processes,
            "base": base_hash,
        },
        plan=plan,
    )

    progress = keeper.resume() if parsed.value("resume") else Progress()
    if progress.step >= plan.steps:
        raise Refused(
            f"{parsed.value('resume')} is at step {progress.step} and the run ends at {plan.steps}; raise "
            "--max_train_steps to go on from it"
        )
    if accelerator.is_main_process:
        describe_run(folder, parsed.toml(), parsed.command)
    names = {"wandb": {"name": parsed.value("wandb_run_name")}} if parsed.value("wandb_run_name") else {}
    accelerator.init_trackers(setup.tracker_name(parsed, tracker), init_kwargs=names)
    setup.announce(loader, plan, parsed, network, accelerator)
    run = Run(
        accelerator,
        network,
        models.denoiser,
        encoders,
        loader,
        objective,
        inputs.latents_of(family, models, accelerator.device),
        text,
        lambda noisy, timesteps, conditions: family.denoise(
            models.denoiser, noisy, timesteps, conditions, options
        ),
        optimizer,
        scheduler,
        group_names,
        plan.steps,
        plan.epochs,
        seed,
        parsed.value("max_grad_norm"),
        parsed.value("scale_weight_norms"),
        log,
        keeper.after_step,
        keeper.after_epoch,
        keeper.last_good,
    )
    if parsed.value("sample_at_first") and progress.step == 0:
        keeper.draw("000000", 0)
    with _stoppable(keeper), memory.tf32(parsed.value("allow_tf32")), optim.training(optimizer):
        progress = train(run, progress)
    if keeper.stopped:
        log.close()
        return 130
    keeper.finish(progress)
    log.close()
    return 0


def _prepare_denoiser(parsed: Parsed, models: Models, accelerator: Accelerator) -> None:
    models.denoiser.requires_grad_(False).eval()
    if parsed.value("fp8_base") or parsed.value("fp8_base_unet"):
        memory.store_in_fp8(models.denoiser, setup.DTYPES[accelerator.mixed_precision])


def _merge_base_weights(parsed: Parsed, networks: Any, models: Models) -> None:
    strengths = parsed.value("base_weights_multiplier")
    for index, path in enumerate(parsed.value("base_weights")):
        strength = strengths[index] if index < len(strengths) else 1.0
        other, state = networks.create_network_from_weights(
            strength, path, None, [], models.denoiser, for_inference=True
        )
        logger.info("merging module: %s with multiplier %s", path, strength)
        other.merge_to(
            [],
            models.denoiser,
            state,
            None,
            "cpu" if next(models.denoiser.parameters()).device.type == "cpu" else None,
        )


def _prepare_network(parsed: Parsed, network: Any, models: Models, accelerator: Accelerator) -> None:
    own = isinstance(network, AdapterNetwork)
    if parsed.value("gradient_checkpointing"):
        memory.checkpoint_blocks(models.denoiser, network.clock.now if own else contextlib.nullcontext)
        network.enable_gradient_checkpointing()
    if own:
        network.cast_frozen(setup.DTYPES[accelerator.mixed_precision])
    network.to(accelerator.device)
    if parsed.value("full_fp16") or parsed.value("full_bf16"):
        network.to(setup.DTYPES[accelerator.mixed_precision])
    if parsed.value("scale_weight_norms") and not hasattr(network, "apply_max_norm_regularization"):
        raise Refused("--scale_weight_norms is not offered by this network module; leave it out")


@contextlib.contextmanager
def _stoppable(keeper: Keeper) -> Iterator[None]:
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
