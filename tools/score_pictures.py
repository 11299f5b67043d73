"""Print which content, style and background the demo's scorer finds in pictures of the glyph world.

    python tools/score_pictures.py demo_output/images                        # every picture of a folder
    python tools/score_pictures.py demo_output/images --content poodle --style "stained glass"
    python tools/score_pictures.py seeds --style blueprint --under sheet.png --json score.json

A grid of `inference_merge.py` (files named inference_s0.50_c1.00.png) is printed as a table, style strengths
down and content strengths across; other pictures one per line. With --content and --style, pictures that show
both are counted; --under writes the count below a sheet, --json into a file. Needs transformers and
assets/demo/scorer, no font.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowrank.errors import Refused, nearest
from lowrank.files import atomic
from tools.glyph_world import report, scorer
from tools.glyph_world.world import SIZE

ROOT = Path(__file__).resolve().parents[1]
CELL = re.compile(r"inference_s(-?[\d.]+)_c(-?[\d.]+)(?:_(\d+))?\.png$")
Reading = dict[str, tuple[str, float]]  # "content", "style", "background" → name and probability


def picture_files(arguments: list[Path]) -> list[Path]:
    """Return the picture files of a command line; folders stand for their PNG files, except sheet.png."""
    paths = []
    for path in arguments:
        inside = [p for p in sorted(path.glob("*.png")) if p.name != "sheet.png"] if path.is_dir() else [path]
        if not inside or not inside[0].is_file():
            raise Refused(f"there is no picture in {path}; give PNG files or folders of them")
        paths += inside
    return paths


def open_picture(path: Path) -> np.ndarray:
    """Read a picture as (64, 64, 3) uint8. Raises `Refused` if it cannot be read."""
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))
    except OSError as error:
        raise Refused(
            f"{path} cannot be read as a picture ({error}); make it again or leave it out"
        ) from error


def read_pictures(paths: list[Path], folder: Path) -> list[Reading]:
    """Return what the scorer in `folder` finds in each picture."""
    if not (folder / "config.json").is_file():
        raise Refused(f"--scorer {folder} has no config.json; the shipped scorer is assets/demo/scorer")
    pictures = np.stack([open_picture(path) for path in paths])
    readings = scorer.read(scorer.load(folder), pictures)
    return [
        {kind: (scorer.LABELS[kind][labels[i]], float(p[i])) for kind, (labels, p) in readings.items()}
        for i in range(len(paths))
    ]


def table(cells: dict[tuple[float, float], list[Reading]]) -> str:
    """Return a grid as text; of several pictures in a cell the first is shown."""
    rows, columns = sorted({a for a, _ in cells}), sorted({b for _, b in cells})
    body = [["", *(f"content {b:g}" for b in columns)]]
    for a in rows:
        body.append([f"style {a:g}", *(_text(cells[a, b][0]) if (a, b) in cells else "" for b in columns)])
    widths = [max(len(row[i]) for row in body) for i in range(len(body[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in body
    )


def _text(reading: Reading) -> str:
    return ", ".join(f"{reading[kind][0]} {reading[kind][1]:.2f}" for kind in ("content", "style"))


def write_below(sheet: Path, text: str) -> None:
    """Write a line of text below the picture `sheet`. Raises `Refused` if it cannot be read."""
    try:
        with Image.open(sheet) as picture:
            info, drawn = dict(getattr(picture, "text", {})), picture.convert("RGB")
    except OSError as error:
        raise Refused(f"--under {sheet} cannot be read as a picture ({error}); give a sheet.png") from error
    font = ImageFont.load_default(13)
    page = Image.new("RGB", (drawn.width, drawn.height + 26), "#ffffff")
    page.paste(drawn, (0, 0))
    ImageDraw.Draw(page).text((6, drawn.height + 5), text, fill="#222222", font=font)
    kept = PngInfo()
    for key, value in info.items():
        kept.add_text(key, value)
    with atomic(sheet) as part:
        page.save(part, format="PNG", pnginfo=kept)


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pictures", type=Path, nargs="+", help="pictures, or folders of pictures")
    parser.add_argument(
        "--scorer", type=Path, default=ROOT / "assets/demo/scorer", help="folder of the scorer model"
    )
    parser.add_argument("--content", help="count pictures with this content")
    parser.add_argument("--style", help="count pictures with this style")
    parser.add_argument("--under", type=Path, help="sheet of pictures to write the count below")
    parser.add_argument("--json", type=Path, help="file for the count and its 95 %% interval")
    options = parser.parse_args(argv)
    wanted = {kind: getattr(options, kind) for kind in ("content", "style") if getattr(options, kind)}
    try:
        for kind, name in wanted.items():
            if name not in (known := scorer.LABELS[kind]):
                raise Refused(
                    f"--{kind} {name!r} is unknown{nearest(name, known)}; choose from {', '.join(known)}"
                )
        if (options.under or options.json) and not wanted:
            raise Refused("--under and --json need something to count; give --content, --style or both")
        paths = picture_files(options.pictures)
        readings = read_pictures(paths, options.scorer)
    except Refused as refused:
        sys.exit(f"error: {refused}")
    cells: dict[tuple[float, float], list[Reading]] = {}
    for path, reading in zip(paths, readings, strict=True):
        if match := CELL.search(path.name):
            cells.setdefault((float(match[1]), float(match[2])), []).append(reading)
        else:
            print(f"{path}: {_text(reading)}")
    if cells:
        print(table(cells))
    if wanted:
        right = [all(reading[kind][0] == name for kind, name in wanted.items()) for reading in readings]
        line = f"{sum(right)} of {len(right)} pictures show {' and '.join(wanted.values())}"
        print(line)
        try:
            if options.under:
                write_below(options.under, f"{line}, by the demo's scorer")
        except Refused as refused:
            sys.exit(f"error: {refused}")
        if options.json:
            counted = {"wanted": wanted, "right": sum(right), **report.share(np.array(right))}
            with atomic(options.json) as part:
                part.write_text(json.dumps(counted, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
