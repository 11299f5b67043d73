"""Source pictures of a context: where they are, that they are not the training's, and drawing them."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowrank.data.dataset import Dataset, from_folders, from_instance
from lowrank.data.images import suffixes
from lowrank.errors import Refused
from lowrank.files import atomic, existing_folder, writable_folder
from lowrank.models.family import Family, Models
from lowrank.train.preview import draw_files
from lowrank.train.prompts import Prompt, prompt_of, read_prompts

logger = logging.getLogger(__name__)

_COUNTED = re.compile(r"[1-9]\d*(_.*)?")  # kohya's folders, <repeats>_<class>


def pictures(folder: Path) -> Iterator[Path]:
    """The pictures of a folder and of those in it, in sorted order."""
    return (
        path for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes() and path.is_file()
    )


def check_source(source: Path, trained: str | None, force: bool) -> None:
    """Raise `Refused` where the source is what will be trained on, by its path or by a picture's bytes."""
    if not trained:
        return
    other = existing_folder(trained, "train_data_dir")
    same = source.is_dir() and other.resolve().samefile(source)
    shared = 0
    if not same and source.is_dir():
        known = {_digest(path) for path in pictures(other)}
        shared = sum(_digest(path) in known for path in pictures(source))
    if not (same or shared):
        return
    overlap = "is the training folder" if same else f"has {shared} pictures of the training folder {other}"
    if not force:
        raise Refused(
            f"--source_data_dir {source} {overlap}; a context of them holds back what they shall teach: give "
            "other pictures, or --source_prompts FILE alone, or --force to do it all the same"
        )
    logger.warning("--source_data_dir %s %s; it is taken all the same (--force)", source, overlap)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def default_prompt(family: Family, sides: tuple[int, int]) -> Prompt:
    """What a line of a prompt file leaves open: `sides` are width and height in pixels."""
    return replace(prompt_of(family), width=sides[0], height=sides[1])


def draw_source(
    family: Family, models: Models, switches: Any, options: Any, seed: int, folder: Path, default: Prompt
) -> None:
    """Draw every prompt of --source_prompts into the folder with a caption file, but what is there."""
    prompts = read_prompts(
        options.source_prompts, default, family.bucket_step(models), flag="--source_prompts"
    )
    writable_folder(folder, "--source_data_dir")
    files: dict[Path, tuple[Prompt, int]] = {}
    for index, prompt in enumerate(prompt for prompt in prompts for _ in range(options.images_per_prompt)):
        image_seed = seed + index if prompt.seed is None else prompt.seed + index % options.images_per_prompt
        name = hashlib.sha256(repr((replace(prompt, seed=None), image_seed)).encode()).hexdigest()[:8]
        path = folder / f"source_{index:05d}_{name}.png"
        if not path.exists():
            files[path] = (prompt, image_seed)
            with atomic(path.with_suffix(".txt")) as part:
                part.write_text(prompt.prompt + "\n", encoding="utf-8")
    if files:
        logger.info("drawing %d source pictures with the base into %s", len(files), folder)
        family.add(models, ("text", "vae", "denoiser"))
        draw_files(family, models, switches, files, "source pictures")


def source_datasets(folder: Path, extension: str | None, **values: Any) -> tuple[Dataset, ...]:
    """The source folder as a dataset: kohya's numbered folders in it, or itself. Raises `Refused`."""
    folder = existing_folder(folder, "source_data_dir")
    counted = any(path.is_dir() and _COUNTED.fullmatch(path.name) for path in folder.iterdir())
    if extension is None:
        texts = any(path.with_suffix(".txt").exists() for path in pictures(folder))
        extension = ".txt" if texts else ".caption"
    if counted:
        return from_folders(folder, caption_extension=extension, **values)
    return from_instance(folder, None, caption_extension=extension, **values)
