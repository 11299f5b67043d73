"""What is looked at during a run: pictures drawn with the adapter, the first number that is not finite."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import Accelerator
from PIL import Image, PngImagePlugin
from torch import Tensor, nn

from lowrank.errors import Refused
from lowrank.files import atomic
from lowrank.train.prompts import Prompt


@dataclass(frozen=True)
class Preview:
    """Which pictures are drawn and when. `draw(prompt, seed) -> image` runs the stock pipeline."""

    prompts: Sequence[Prompt]
    draw: Callable[[Prompt, int], Image.Image]
    folder: Path
    name: str  # goes before the file names, may be empty
    per_prompt: int = 1
    seed: int | None = None
    every_epochs: int | None = None
    every_steps: int | None = None

    def due(self, *, epoch: int | None = None, step: int | None = None) -> bool:
        """Whether to draw pictures after this epoch (from 1) or step; epochs win, as in kohya's."""
        if not self.prompts:
            return False
        if epoch is not None:
            return bool(self.every_epochs) and epoch % self.every_epochs == 0
        if self.every_epochs or not self.every_steps or step is None:
            return False
        return step % self.every_steps == 0

    def run(self, accelerator: Accelerator, network: nn.Module, tag: str, step: int) -> list[Path]:
        """Draw all on the main process: files `{name_}{tag}_{index:02d}_{time}_{seed}.png`.

        TensorBoard gets them as `validation`, wandb under kohya's names `sample_{index}`.
        """
        if not accelerator.is_main_process or not self.prompts:
            accelerator.wait_for_everyone()
            return []
        paths, images = [], []
        with evaluation_mode(network), torch.no_grad(), accelerator.autocast():
            jobs = [(prompt, copy) for prompt in self.prompts for copy in range(self.per_prompt)]
            for index, (prompt, copy) in enumerate(jobs):
                seed = prompt.seed if prompt.seed is not None else self.seed
                seed = (torch.seed() % 2**32 if seed is None else seed) + copy
                image = self.draw(prompt, seed)
                stem = f"{self.name}_" if self.name else ""
                path = self.folder / f"{stem}{tag}_{index:02d}_{time.strftime('%Y%m%d%H%M%S')}_{seed}.png"
                save_png(path, image, describe(prompt, seed))
                paths.append(path)
                images.append(image)
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                arrays = [numpy.asarray(image) for image in images]
                for shape in {array.shape for array in arrays}:  # TensorBoard stacks equal sizes only
                    batch = numpy.stack([array for array in arrays if array.shape == shape])
                    tracker.writer.add_images("validation", batch, step, dataformats="NHWC")
            elif tracker.name == "wandb":
                import wandb  # pyright: ignore[reportMissingImports]  # only when asked for

                shown = {
                    f"sample_{index}": wandb.Image(image, caption=prompt.prompt)
                    for index, (image, (prompt, _)) in enumerate(zip(images, jobs, strict=True))
                }
                tracker.log(shown, step=step)
        accelerator.wait_for_everyone()
        return paths


def describe(prompt: Prompt, seed: int) -> str:
    """The settings of a picture in the field's usual text form."""
    facts: dict[str, Any] = {"Steps": prompt.sample_steps}
    if prompt.sample_sampler:
        facts["Sampler"] = prompt.sample_sampler
    if prompt.scale > 1:
        facts["CFG scale"] = f"{prompt.scale:g}"
    if prompt.guidance_scale is not None:
        facts["Guidance"] = f"{prompt.guidance_scale:g}"
    facts |= {"Seed": seed, "Size": f"{prompt.width}x{prompt.height}"}
    against = f"\nNegative prompt: {prompt.negative_prompt}" if prompt.negative_prompt else ""
    return f"{prompt.prompt}{against}\n{', '.join(f'{name}: {fact}' for name, fact in facts.items())}"


def save_png(path: Path, image: Image.Image, parameters: str) -> None:
    """Write a PNG with its settings in the text chunk `parameters`."""
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", parameters)
    with atomic(path) as part, open(part, "wb") as file:
        image.save(file, "PNG", pnginfo=text)


@contextlib.contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for a block, then whatever it was."""
    before = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(before)


def first_not_finite(denoiser: nn.Module, again: Callable[[], Any]) -> str:
    """Run the step once more without gradient and name the first module whose output is not finite."""
    found: list[str] = []

    def watch(name: str):
        def hook(_module, _inputs, output):
            tensors = [
                t
                for t in (output if isinstance(output, (tuple, list)) else [output])
                if isinstance(t, Tensor)
            ]
            if not found and any(not torch.isfinite(t).all() for t in tensors):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in denoiser.named_modules() if name]
    try:
        with torch.no_grad():
            again()
    finally:
        for handle in handles:
            handle.remove()
    return f"module {found[0]}" if found else "the loss itself (every module's output is finite)"


def refuse_not_finite(what: str, step: int, images: Sequence[Path], where: str, kept: Path | None) -> None:
    """Stop the run: one sentence with step, module and image, and what is left to go on from."""
    told = f"the last good checkpoint is {kept}" if kept else "no checkpoint had been written yet"
    raise Refused(
        f"{what} is not finite at step {step}: first in {where}, with {', '.join(str(i) for i in images)}; "
        f"{told}; lower --learning_rate, use --mixed_precision bf16, or remove the image"
    )
