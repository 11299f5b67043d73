"""A metadata file (`--in_json`, `metadata_file`): image names to captions and tags, as JSON or JSON lines.

The two forms are kohya sd-scripts': one object `{image: {"caption": …, "tags": …}}`, or in a `.jsonl` file a
line `{"image_path": image, "caption": …, "tags": …}` for each image. Sizes in the file are ignored: they are
read from the images.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowrank.config.flag import quoted
from lowrank.data import images
from lowrank.data.dataset import Subset
from lowrank.errors import Refused
from lowrank.files import parse_json, read_text

LIMIT = 256 << 20  # bytes: about a million images
Entry = tuple[Path, tuple[str, ...]]  # an image and its captions


def entries(subset: Subset) -> list[Entry]:
    """Every image of the subset's `metadata_file` with its captions, in sorted order.

    A relative name starts at `image_dir`; a name without the ending of an image is a stem there. Raises
    `Refused` with file and entry for an entry of another form.
    """
    assert subset.metadata_file is not None
    file = Path(subset.metadata_file)
    read = _lines if file.suffix.lower() == ".jsonl" else _object
    stems: dict[str, str] = {}
    captions: dict[Path, tuple[str, ...]] = {}
    for name, entry in read(file, read_text(file, "metadata_file", LIMIT)):
        if not isinstance(entry, dict):
            raise Refused(
                f"metadata_file {file}: entry {quoted(name)} is {quoted(entry)}, not an object with a "
                "'caption'; write an object"
            )
        if os.path.splitext(name)[1].lower() not in images.suffixes():
            stems = stems or _stems(subset.image_dir)
            name = stems.get(name, name)
        captions[subset.image_dir / name] = _captions(file, name, entry, subset)
    if not captions:
        raise Refused(f"metadata_file {file} names no image; add entries, or leave the option out")
    return sorted(captions.items())


def _object(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    tree = parse_json(text, f"metadata_file {file}")
    if not isinstance(tree, dict):
        raise Refused(
            f"metadata_file {file} is a {type(tree).__name__} at the top; it must map images to entries"
        )
    yield from tree.items()


def _lines(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        entry = parse_json(line, f"metadata_file {file}, line {number}")
        name = entry.get("image_path") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise Refused(
                f"metadata_file {file}, line {number}: 'image_path' is missing; name the image there"
            )
        yield name, entry


def _stems(folder: Path) -> dict[str, str]:
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    known = images.suffixes()
    return {os.path.splitext(name)[0]: name for name in names if os.path.splitext(name)[1].lower() in known}


def _captions(file: Path, name: str, entry: dict[str, Any], subset: Subset) -> tuple[str, ...]:
    """The caption with the tags behind it; with `enable_wildcard` every line of the caption with them."""
    caption, tags = ("" if entry.get(key) is None else entry[key] for key in ("caption", "tags"))
    for key, text in (("caption", caption), ("tags", tags)):
        if not isinstance(text, str):
            raise Refused(
                f"metadata_file {file}: {key} of {quoted(name)} is {quoted(text)}, not a text; put it in "
                "quotes"
            )
    lines = [line.strip() for line in caption.splitlines() if line.strip()] or [""]
    tags = tags.replace("\n", subset.captions.caption_separator).strip()
    if tags:
        lines = [f"{line}{subset.captions.caption_separator}{tags}" if line else tags for line in lines]
    return tuple(lines) if subset.captions.enable_wildcard else (lines[0],)
