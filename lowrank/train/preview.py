"""Draw pictures from prompts and seeds: one, a set of files, and the previews during training."""

from __future__ import annotations

import glob
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from accelerate import Accelerator
from PIL import Image, PngImagePlugin
from torch import Tensor, nn
from tqdm import tqdm

from lowrank.errors import nearest
from lowrank.files import atomic
from lowrank.models.family import Family, FamilyOptions, Models, move, release
from lowrank.train.job import RunningJob
from lowrank.train.preview_sheet import write_sheet
from lowrank.train.prompts import Prompt, parse_lines, read_prompts
from lowrank.train.text_conditions import log_cut, stack_text
from lowrank.train.watch import evaluation_mode

logger = logging.getLogger(__name__)


def draw_picture(
    family: Family,
    models: Models,
    switches: FamilyOptions,
    text: Callable[[tuple[str, ...]], Mapping[str, Tensor]],
    prompt: Prompt,
    seed: int,
) -> Image.Image:
    """Draw one picture with the models in memory; `text` maps captions to conditions."""
    negative = text((prompt.negative_prompt or "",)) if prompt.scale > 1 else None
    return family.sample(
        models,
        text((prompt.prompt,)),
        switches,
        height=prompt.height,
        width=prompt.width,
        steps=prompt.sample_steps,
        generator=torch.Generator().manual_seed(seed),
        negative=negative,
        scale=prompt.scale,
        guidance=prompt.guidance_scale,
        sampler=prompt.sample_sampler,
    )[0]


def draw_files(
    family: Family,
    models: Models,
    switches: FamilyOptions,
    files: Mapping[Path, tuple[Prompt, int]],
    title: str,
) -> None:
    """Draw each file from its prompt and seed; the model must be loaded whole, and is released."""
    prompts = [prompt for prompt, _ in files.values()]
    texts = dict.fromkeys(
        text for prompt in prompts for text in (prompt.prompt, prompt.negative_prompt or "")
    )
    log_cut(family, models, list(texts), switches)
    encoded = {text: stack_text(family.encode_text(models, [text], switches)) for text in texts}
    release(models, ("text",))
    for path, (prompt, seed) in tqdm(files.items(), desc=title):
        image = draw_picture(family, models, switches, lambda captions: encoded[captions[0]], prompt, seed)
        save_png(path, image, describe(prompt, seed))
    release(models, ("vae", "denoiser"))


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The pictures to draw during training, and when. `draw(prompt, seed)` runs the stock pipeline."""

    prompts: Sequence[Prompt]
    draw: Callable[[Prompt, int], Image.Image]
    folder: Path
    name: str  # prefix of the file names, may be empty
    per_prompt: int = 1
    seed: int = 0
    every_epochs: int | None = None
    every_steps: int | None = None
    together: bool = False  # every process draws, because they share one sharded model; the first one saves

    def drawn(self, tag: str) -> bool:
        """Whether every picture of a `tag` is in the folder."""
        stem = f"{self.name}_" if self.name else ""
        count = len(list(self.folder.glob(f"{glob.escape(stem + tag)}_*.png")))
        return count >= len(self.prompts) * self.per_prompt

    def run(self, accelerator: Accelerator, network: nn.Module, tag: str, step: int) -> list[Path]:
        """Draw every prompt on the main process to `{name_}{tag}_{index:02d}_{time}_{seed}.png`.

        Each prompt has its seed, so that its pictures differ only by the adapter. A sheet of all tags and
        prompts grows beside them. TensorBoard gets the pictures as `validation/{index:02d}`, wandb under
        kohya's names `sample_{index}`.
        """
        writes = accelerator.is_main_process
        if not (writes or self.together) or not self.prompts:
            accelerator.wait_for_everyone()
            return []
        paths, images = [], []
        with evaluation_mode(network), torch.no_grad(), accelerator.autocast():
            jobs = [(prompt, copy) for prompt in self.prompts for copy in range(self.per_prompt)]
            for index, (prompt, copy) in enumerate(jobs):
                seed = (self.seed if prompt.seed is None else prompt.seed) + copy
                image = self.draw(prompt, seed)
                if not writes:
                    continue
                stem = f"{self.name}_" if self.name else ""
                path = self.folder / f"{stem}{tag}_{index:02d}_{time.strftime('%Y%m%d%H%M%S')}_{seed}.png"
                save_png(path, image, describe(prompt, seed))
                paths.append(path)
                images.append(image)
        if writes:
            write_sheet(self.folder, self.name, [prompt.prompt for prompt, _ in jobs])
        for tracker in accelerator.trackers if writes else ():
            if tracker.name == "tensorboard":
                for index, image in enumerate(images):
                    array = numpy.asarray(image)
                    tracker.writer.add_image(f"validation/{index:02d}", array, step, dataformats="HWC")
            elif tracker.name == "wandb":
                import wandb  # pyright: ignore[reportMissingImports]  # imported only if it is used

                samples = {
                    f"sample_{index}": wandb.Image(image, caption=prompt.prompt)
                    for index, (image, (prompt, _)) in enumerate(zip(images, jobs, strict=True))
                }
                tracker.log(samples, step=step)
        accelerator.wait_for_everyone()
        return paths


def describe(prompt: Prompt, seed: int) -> str:
    """The settings of a picture in the text form of the common web interfaces."""
    settings: dict[str, object] = {"Steps": prompt.sample_steps}
    if prompt.sample_sampler:
        settings["Sampler"] = prompt.sample_sampler
    if prompt.scale > 1:
        settings["CFG scale"] = f"{prompt.scale:g}"
    if prompt.guidance_scale is not None:
        settings["Guidance"] = f"{prompt.guidance_scale:g}"
    settings |= {"Seed": seed, "Size": f"{prompt.width}x{prompt.height}"}
    negative = f"\nNegative prompt: {prompt.negative_prompt}" if prompt.negative_prompt else ""
    return f"{prompt.prompt}{negative}\n{', '.join(f'{name}: {value}' for name, value in settings.items())}"


def save_png(path: Path, image: Image.Image, parameters: str) -> None:
    """Write a PNG with its settings in the text chunk `parameters`."""
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", parameters)
    with atomic(path) as part, open(part, "wb") as file:
        image.save(file, "PNG", pnginfo=text)


def preview_prompts(job: RunningJob, models: Models) -> list[Prompt]:
    """The prompts to draw during training, from --sample_prompts or --validation_prompt."""
    sampling, samplers = job.options.sampling, job.options.samplers
    width, height = job.options.sizes.resolution
    default, prompts = replace(job.script.prompt, width=width, height=height), []
    if sampling.sample_prompts:
        prompts = read_prompts(sampling.sample_prompts, default, job.family.bucket_step(models))
    elif sampling.sample_prompt_lines:
        prompts = parse_lines(sampling.sample_prompt_lines, default, job.family.bucket_step(models))
    elif sampling.validation_prompt:
        prompts = [replace(default, prompt=sampling.validation_prompt)]
    unknown = {prompt.sample_sampler for prompt in prompts} - {None, *samplers}
    for name in sorted(filter(None, unknown)):
        known = f"known: {', '.join(samplers)}" if samplers else "this model has one sampler"
        logger.warning("the sampler %r of a prompt is left out%s; %s", name, nearest(name, samplers), known)
    return [replace(p, sample_sampler=None) if p.sample_sampler in unknown else p for p in prompts]


def run_preview(
    job: RunningJob,
    models: Models,
    prompts: Sequence[Prompt],
    text: Callable[[tuple[str, ...]], Mapping[str, Tensor]],
) -> Preview:
    """The previews of a run. Without --sample_prompts, steps or epochs: every --validation_epochs."""
    sampling, sampler = job.options.sampling, job.options.sampler

    def picture(prompt: Prompt, seed: int) -> Image.Image:
        between = models.vae.device  # the CPU, if training does not need the VAE
        move(models, ("vae",), job.accelerator.device)
        image = draw_picture(job.family, models, job.switches, text, prompt, seed)
        move(models, ("vae",), between)
        return image

    by_file, steps = (
        bool(sampling.sample_prompts or sampling.sample_prompt_lines),
        sampling.sample_every_n_steps,
    )
    epochs = sampling.sample_every_n_epochs or (None if by_file or steps else sampling.validation_epochs)
    return Preview(
        prompts=[replace(prompt, sample_sampler=prompt.sample_sampler or sampler) for prompt in prompts],
        draw=picture,
        folder=job.names.output_dir / "sample",
        name=job.names.output_name or "",
        per_prompt=1 if by_file else sampling.num_validation_images,
        seed=job.seed,
        every_epochs=epochs if prompts else None,
        every_steps=steps if prompts and not epochs else None,  # epochs win, as in kohya's scripts
        together=job.sharding is not None,
    )
