"""The curvature of a base model on source pictures, from the command line: LaLoRA's context file."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lowrank import __version__
from lowrank.adapters.targets import Target, as_passed, find_all, host_shape
from lowrank.cli import source_pictures as pictures
from lowrank.cli.base_model import base, device_of, model_family, own_side
from lowrank.config.command_line import Parsed
from lowrank.config.context import CALC_CONTEXT, ContextOptions
from lowrank.data.cache import Cache
from lowrank.data.loader import Batch, Loader
from lowrank.errors import Refused
from lowrank.files import writable_folder
from lowrank.laplace.context_file import GAUSS_NEWTON, Context, write_context
from lowrank.laplace.fisher import Fisher, gauss_newton_draw
from lowrank.models import blocks, memory
from lowrank.models.family import Family, FamilyOptions, Models, Source, align, release
from lowrank.models.sd import SdOptions
from lowrank.objective.diffusion import Diffusion
from lowrank.objective.flow import Flow
from lowrank.objective.objective import Draw, Objective
from lowrank.tensors import read_tensors
from lowrank.train import setup
from lowrank.train.attach import choose_attention
from lowrank.train.loop import batch_generator
from lowrank.train.text_conditions import TextConditions

logger = logging.getLogger(__name__)

# flags that not every family has
_SOME = ("v_parameterization", "min_snr_gamma", "clip_skip", "max_token_length")


def main(argv: list[str] | None = None) -> int:
    """Draw what is to be drawn, measure, write the file, and say what it holds. Raises `Refused`."""
    parsed = CALC_CONTEXT.parse(argv)
    logging.basicConfig(level="INFO", format="%(message)s")
    for note in parsed.notes:
        logger.warning("%s", note)
    options, sources, measure = parsed.options, parsed.options.sources, parsed.options.measure
    assert measure.output_path is not None  # required
    output = Path(measure.output_path)
    writable_folder(output.parent, "--output_path")
    folder = Path(sources.source_data_dir or output.with_name(f"{output.stem}_source"))
    pictures.check_source(folder, sources.train_data_dir, sources.force)
    if measure.basis_path:
        read_tensors(measure.basis_path)
    source = _source(options)
    family = model_family(source)
    objective, switches = _records(parsed, family)
    models = family.load(source, ())
    setup.check_prediction(objective, family, models)
    sides = sources.resolution or (own_side(models), own_side(models))
    if sources.source_prompts:
        default = pictures.default_prompt(family, sides)
        pictures.draw_source(family, models, switches, sources, measure.seed, folder, default)
    loader = _loader(options, family, models, folder, sides)
    text = TextConditions(
        family, models, switches, loader.captions() or (), not measure.network_train_unet_only
    )
    loader = _encoded(loader, family, models)
    targets = _prepared(options, family, models, text.encoders)
    count = measure.num_samples or measure.max_steps * measure.batch_size
    _check_room(targets, measure.curvature, source.device)
    fisher = Fisher(targets, measure.curvature, measure.kfac_rank, measure.seed, source.device)
    logger.info("%d layers, %d samples of %d pictures in %s", len(targets), count, len(loader.placed), folder)
    loss = _run(
        fisher, family, models, objective, switches, loader, text, count, measure.batch_size, measure.seed
    )
    context = fisher.context(_facts(parsed, family, models, sides, count, loss))
    write_context(output, context)
    _report(output, context, loss)
    return 0


# ------------------------------------------------------------------ from options to records


def _source(options: ContextOptions) -> Source:
    model = options.base_model
    device, precision = device_of(model.device), model.mixed_precision
    if precision == "fp16" and device == "cpu":
        logger.warning("there is no GPU, and mixed precision fp16 needs one: this run computes in fp32")
        precision = "no"
    flag = "pretrained_model_name_or_path"
    assert model.pretrained_model_name_or_path is not None  # required
    source = base(model.pretrained_model_name_or_path, precision, device, model.tokenizer_cache_dir, flag)
    if model.fp8_base and source.dtype == torch.float32:
        raise Refused(
            f"--fp8_base needs --mixed_precision fp16 or bf16, and it is {precision}; set both or none"
        )
    return dataclasses.replace(
        source,
        vae=model.vae,
        vae_dtype=torch.float32 if model.no_half_vae else None,
        v_parameterization=options.measure.v_parameterization,
    )


def _records(parsed: Parsed[ContextOptions], family: Family) -> tuple[Objective, FamilyOptions]:
    """The objective and the family's switches; a flag that is another family's is refused."""
    measure = parsed.options.measure
    for name in _SOME:
        if name not in family.tool_flags and parsed.value(name):
            raise Refused(f"{parsed.flag(name)} is not for {family.name}; leave it out")
    if issubclass(family.options, SdOptions):
        switches = SdOptions(clip_skip=measure.clip_skip, max_token_length=measure.max_token_length)
        objective = Diffusion(
            v_parameterization=measure.v_parameterization, min_snr_gamma=measure.min_snr_gamma
        )
        return objective, switches
    return Flow(), family.options()


def _loader(
    options: ContextOptions, family: Family, models: Models, folder: Path, sides: tuple[int, int]
) -> Loader:
    """One picture a batch, so that how they come does not depend on --batch_size."""
    buckets = dataclasses.asdict(options.buckets) | {"resolution": sides, "batch_size": 1}
    if buckets["enable_bucket"]:
        buckets["min_bucket_reso"] = min(buckets["min_bucket_reso"], *sides)
        buckets["max_bucket_reso"] = max(buckets["max_bucket_reso"], *sides)
    return Loader(
        pictures.source_datasets(folder, options.sources.caption_extension, **buckets),
        seed=options.measure.seed,
        skip_bad_images=options.sources.skip_bad_images,
        multiple=family.bucket_step(models),
    )


def _encoded(loader: Loader, family: Family, models: Models) -> Loader:
    family.add(models, ("vae",))
    align(models)
    loader = loader.encode_all(
        lambda pixels: family.encode_images(models, pixels), model_hash="", cache=Cache(None), progress=True
    )
    release(models, ("vae",))
    return loader


def _prepared(
    options: ContextOptions, family: Family, models: Models, encoders: Sequence[nn.Module]
) -> list[Target]:
    """The denoiser as it is trained, and the layers that adapters would change."""
    family.add(models, ("denoiser",))
    align(models)
    denoiser, measure = models.denoiser, options.measure
    choose_attention(options.base_model.xformers, denoiser, denoiser.device)
    passed = as_passed(encoders, denoiser) if encoders else []
    targets = find_all(passed, denoiser, target=measure.target, exclude=measure.exclude, conv=measure.conv)
    if options.base_model.fp8_base:
        blocks.freeze_base(denoiser)
        blocks.store_base(denoiser, "fp8")
    if options.base_model.gradient_checkpointing:
        memory.checkpoint_blocks(denoiser)
    return targets


# ------------------------------------------------------------------ measuring


def picture_groups(loader: Loader, count: int, size: int) -> Iterator[list[Batch]]:
    """`count` pictures, epoch after epoch, in groups of one shape and of at most `size`."""
    waiting: dict[Any, list[Batch]] = {}
    single = itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())
    for sample in itertools.islice(single, count):
        assert sample.encoded is not None  # they were encoded before
        group = waiting.setdefault(sample.encoded.shape, [])
        group.append(sample)
        if len(group) == size:
            yield waiting.pop(sample.encoded.shape)
    yield from waiting.values()


def _run(
    fisher: Fisher,
    family: Family,
    models: Models,
    objective: Objective,
    switches: FamilyOptions,
    loader: Loader,
    text: TextConditions,
    count: int,
    size: int,
    seed: int,
) -> float:
    """The mean loss of the base over the samples."""
    device, dtype = torch.device(models.source.device), models.source.dtype
    total = 0.0
    with fisher.watching(), tqdm(total=count, desc="curvature", unit="sample") as bar:
        for group in picture_groups(loader, count, size):
            drawn, signs = _drawn(family, models, objective, group, seed, device)
            losses: list[Tensor] = []

            def draws(
                group: list[Batch] = group,
                drawn: Draw = drawn,
                signs: Tensor = signs,
                losses: list[Tensor] = losses,
            ) -> Tensor:
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    conditions = text([sample.captions[0] for sample in group]) | _sizes(family, group)
                    prediction = family.denoise(
                        models.denoiser, drawn.noisy, drawn.timesteps, conditions, switches
                    )
                losses.append(objective.losses(prediction.detach(), drawn))
                return gauss_newton_draw(lambda f: objective.losses(f, drawn), prediction, signs)

            # √N times a draw has gradients near 1, as a half-precision backward needs
            fisher.add(len(group), draws, scale=float(signs[0].numel()) ** 0.5)
            total += float(losses[0].sum())
            bar.update(len(group))
    return total / count


def _drawn(
    family: Family, models: Models, objective: Objective, group: list[Batch], seed: int, device: torch.device
) -> tuple[Draw, Tensor]:
    """Noise and timesteps, and signs (B, C, h, w), which a picture has from its own place in its epoch."""
    draws, signs = [], []
    for sample in group:
        generator = batch_generator(seed, sample.epoch, sample.position)
        assert sample.encoded is not None
        draws.append(objective.draw(family.latents(models, sample.encoded.to(device), generator), generator))
        signs.append(torch.randint(0, 2, draws[-1].target.shape, generator=generator).mul_(2).sub_(1))
    drawn = Draw(*(torch.cat(column) for column in zip(*draws, strict=True)))
    return drawn, torch.cat(signs).to(drawn.target)


def _sizes(family: Family, group: list[Batch]) -> dict[str, Tensor]:
    if family.size_conditions is None:
        return {}
    sizes = zip(
        *((sample.original_sizes, sample.crop_top_lefts, sample.target_sizes) for sample in group),
        strict=True,
    )
    return family.size_conditions(*(torch.cat(column) for column in sizes))


def _check_room(targets: Sequence[Target], curvature: str, device: Any) -> None:
    """Raise `Refused` where whole matrices of all layers do not fit into memory."""
    if curvature != "kfac":
        return
    needed = sum(4 * (n * n) for t in targets for n in host_shape(t.module))
    if torch.device(device).type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > free:
        raise Refused(
            f"--curvature kfac keeps whole matrices of {len(targets)} layers, {needed / 1e9:.0f} GB, and "
            f"{device} has {free / 1e9:.0f} GB; use kfac_lr, or fewer layers with --target"
        )


# ------------------------------------------------------------------ what is written and printed


def _facts(
    parsed: Parsed[ContextOptions],
    family: Family,
    models: Models,
    sides: tuple[int, int],
    count: int,
    loss: float,
) -> dict[str, str]:
    measure, rank = parsed.options.measure, parsed.options.measure.kfac_rank
    facts = {
        "version": __version__,
        "fisher": GAUSS_NEWTON,
        "base_model": Path(models.source.path).name,
        "base_model_version": family.base_model_version(models),
        "base_hash": family.model_hash(models, "denoiser"),
        "kfac_rank": rank if measure.curvature in ("kfac_lr", "lora_diag") else None,
        "samples": count,
        "seed": measure.seed,
        "resolution": f"{sides[0]}x{sides[1]}",
        "prediction": family.prediction(models),
        "min_snr_gamma": measure.min_snr_gamma,
        "precision": str(models.source.dtype).removeprefix("torch."),
        "loss": f"{loss:.6g}",
        "command": parsed.command,
    }
    return {f"lowrank.{name}": str(value) for name, value in facts.items()}


def _report(output: Path, context: Context, loss: float) -> None:
    free = [name for name, layer in context.layers.items() if not layer.G.main.any()]
    texts = sum(name.startswith("lora_te") for name in context.layers)
    print(
        f"{output}: curvature ({context.curvature}) of {len(context.layers)} layers, {texts} of them of text "
        f"encoders, {output.stat().st_size / 1e6:.3g} MB; the base's loss on the source is {loss:.4f}"
    )
    if free:
        print(f"{len(free)} of them take no part in the loss and stay free, for example {free[0]}")
