"""Which images of a folder have no caption file, and which files look like the captions that they lack."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

ENDINGS = (".txt", ".caption")  # the usual one, and the default of kohya sd-scripts
SHOWN = 5  # names in a message


def warn_of_missing(
    folder: Path,
    extension: str,
    class_tokens: str | None,
    missing: Sequence[str],
    total: int,
    names: Collection[str],
) -> None:
    """Log which of `total` images have no caption file `<stem><extension>`, with the reason if one is seen.

    `missing` are the names of these images, `names` those of all files in the folder. Images without any
    caption file in the whole folder are usual (the class is their caption): then this is no warning.
    """
    reasons = _reasons(extension, missing, names)
    if not missing or not (class_tokens or reasons):  # `scan` warns of empty captions
        return
    caption = f"{class_tokens!r}" if class_tokens else "an empty caption"
    level = logging.WARNING if reasons or len(missing) < total else logging.INFO
    log.log(
        level,
        "%s: %d of %d images have no %s file and train on %s: %s%s",
        folder,
        len(missing),
        total,
        extension,
        caption,
        shorten(missing),
        "".join(f"; {reason}" for reason in reasons),
    )


def shorten(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _reasons(extension: str, missing: Sequence[str], names: Collection[str]) -> list[str]:
    """Sentences about files that look like missing captions: another case, `x.png.txt`, another ending."""
    lower = {name.lower(): name for name in sorted(names)}
    other_case, with_image_ending, other_ending = [], [], []
    for name in missing:
        stem = os.path.splitext(name)[0]
        if (stem + extension).lower() in lower:
            other_case.append(lower[(stem + extension).lower()])
        elif (name + extension).lower() in lower:
            with_image_ending.append(lower[(name + extension).lower()])
        else:
            other_ending += [stem + ending for ending in ENDINGS if stem + ending in names][:1]
    reasons = []
    if other_case:
        reasons.append(f"{shorten(other_case)} differ in capitals: rename them to end in {extension}")
    if with_image_ending:
        wanted = os.path.splitext(os.path.splitext(with_image_ending[0])[0])[0] + extension
        reasons.append(
            f"{shorten(with_image_ending)} have the image's ending in their name: rename them, the first to "
            f"{wanted}"
        )
    if other_ending:
        reasons.append(
            f"{len(other_ending)} images have a caption file that is not read (first: {other_ending[0]}), as "
            f"caption_extension is {extension}; give --caption_extension "
            f"{os.path.splitext(other_ending[0])[1]} to read them"
        )
    return reasons
