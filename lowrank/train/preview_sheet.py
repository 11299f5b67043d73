"""One sheet of the pictures drawn while training: epochs or steps down, prompts across. It grows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lowrank.files import atomic
from lowrank.models.contact_sheet import sheet

SIDE = 256  # pixels of the longer side of a picture on the sheet
ROWS = 60  # of a sheet; of more, rows are left out evenly, never the first or the last


def sheet_path(folder: Path, name: str) -> Path:
    """The file of the sheet, beside the `folder` of the pictures; `name` is their prefix, or empty."""
    return folder.parent / (f"{name}_samples.png" if name else "samples.png")


def write_sheet(folder: Path, name: str, prompts: Sequence[str]) -> Path | None:
    """Write the sheet of all pictures in the folder; a resumed run goes on with the rows it finds there.

    `prompts` are the names of the columns, one for each picture of a row. Returns None without pictures.
    """
    rows = _rows(folder, name)
    if not rows:
        return None
    kept = _spread(list(rows), ROWS)
    cells = {
        (tag, column): _small(rows[tag][column])
        for tag in kept
        for column in range(len(prompts))
        if column in rows[tag]
    }
    if not cells:
        return None
    title = name or folder.parent.name
    page = sheet(cells, title, None, _row_name, lambda column: str(prompts[column]))
    path = sheet_path(folder, name)
    with atomic(path) as part:
        page.save(part, "PNG")
    return path


def _rows(folder: Path, name: str) -> dict[str, dict[int, Path]]:
    """The newest picture of each tag and column, in the order in which they were drawn."""
    prefix = re.escape(f"{name}_") if name else ""
    pattern = re.compile(prefix + r"(e?\d{6}|final)_(\d{2,})_(\d{14})_\d+\.png")
    drawn = sorted(
        (match[3], match[1], int(match[2]), path)
        for path in folder.iterdir()
        if (match := pattern.fullmatch(path.name))
    )
    newest = {(tag, column): (time, path) for time, tag, column, path in drawn}
    rows: dict[str, dict[int, Path]] = {}
    for (tag, column), (_, path) in sorted(newest.items(), key=lambda item: item[1][0]):
        rows.setdefault(tag, {})[column] = path
    return rows


def _spread(tags: list[str], count: int) -> list[str]:
    if len(tags) <= count:
        return tags
    return [tags[round(i * (len(tags) - 1) / (count - 1))] for i in range(count)]


def _small(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.thumbnail((SIDE, SIDE))
        return image.convert("RGB")


def _row_name(tag: str) -> str:
    if tag == "final":
        return "final"
    return f"epoch {int(tag[1:])}" if tag.startswith("e") else f"step {int(tag)}"
