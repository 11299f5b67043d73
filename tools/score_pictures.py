"""Say what the demo's scorer sees in pictures of the glyph world.

    python tools/score_pictures.py demo_output/images                        # every picture of a folder
    python tools/score_pictures.py demo_output/images --content poodle --style "stained glass"

A grid of `inference_merge.py` (files named inference_s0.50_c1.00.png) is told as a table, style strengths
down and content strengths across; other pictures one by one. With --content and --style the pictures that
show both are counted. Needs transformers and assets/demo/scorer, no font.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowrank.errors import Refused, nearest
from tools.glyph_world import scorer
from tools.glyph_world.world import SIZE

ROOT = Path(__file__).resolve().parents[1]
CELL = re.compile(r"inference_s(-?[\d.]+)_c(-?[\d.]+)(?:_(\d+))?\.png$")
Seen = dict[str, tuple[str, float]]  # "content", "style", "background" → name and probability


def found(given: list[Path]) -> list[Path]:
    """The pictures of a command line: files as they are, and a folder's PNG files but the labelled sheet."""
    paths = []
    for path in given:
        inside = [p for p in sorted(path.glob("*.png")) if p.name != "sheet.png"] if path.is_dir() else [path]
        if not inside or not inside[0].is_file():
            raise Refused(f"there is no picture in {path}; give PNG files or folders of them")
        paths += inside
    return paths


def opened(path: Path) -> np.ndarray:
    """(64, 64, 3) uint8."""
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))
    except OSError as error:
        raise Refused(
            f"{path} cannot be read as a picture ({error}); make it anew or leave it out"
        ) from error


def seen(paths: list[Path], folder: Path) -> list[Seen]:
    """What the scorer in `folder` sees in each picture."""
    if not (folder / "config.json").is_file():
        raise Refused(f"--scorer {folder} has no config.json; the shipped scorer is assets/demo/scorer")
    pictures = np.stack([opened(path) for path in paths])
    told = scorer.read(scorer.load(folder), pictures)
    return [
        {kind: (scorer.LABELS[kind][labels[i]], float(sure[i])) for kind, (labels, sure) in told.items()}
        for i in range(len(paths))
    ]


def table(cells: dict[tuple[float, float], list[Seen]]) -> str:
    """A grid in text; a cell with several pictures tells its first."""
    rows, columns = sorted({a for a, _ in cells}), sorted({b for _, b in cells})
    body = [["", *(f"content {b:g}" for b in columns)]]
    for a in rows:
        body.append([f"style {a:g}", *(_told(cells[a, b][0]) if (a, b) in cells else "" for b in columns)])
    widths = [max(len(row[i]) for row in body) for i in range(len(body[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in body
    )


def _told(one: Seen) -> str:
    return ", ".join(f"{one[kind][0]} {one[kind][1]:.2f}" for kind in ("content", "style"))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pictures", type=Path, nargs="+", help="pictures, or folders of them")
    parser.add_argument("--scorer", type=Path, default=ROOT / "assets/demo/scorer")
    parser.add_argument("--content", help="count pictures with this content")
    parser.add_argument("--style", help="count pictures with this style")
    options = parser.parse_args(argv)
    wanted = {kind: getattr(options, kind) for kind in ("content", "style") if getattr(options, kind)}
    try:
        for kind, name in wanted.items():
            if name not in (known := scorer.LABELS[kind]):
                raise Refused(
                    f"--{kind} {name!r} is unknown{nearest(name, known)}; choose from {', '.join(known)}"
                )
        paths = found(options.pictures)
        answers = seen(paths, options.scorer)
    except Refused as refused:
        sys.exit(f"error: {refused}")
    cells: dict[tuple[float, float], list[Seen]] = {}
    for path, one in zip(paths, answers, strict=True):
        if match := CELL.search(path.name):
            cells.setdefault((float(match[1]), float(match[2])), []).append(one)
        else:
            print(f"{path}: {_told(one)}")
    if cells:
        print(table(cells))
    if wanted:
        right = sum(all(one[kind][0] == name for kind, name in wanted.items()) for one in answers)
        print(f"{right} of {len(answers)} pictures show {' and '.join(wanted.values())}")


if __name__ == "__main__":
    main()
