"""Draw the pictures of assets/: a stained-glass cat (the style) and a white poodle (the content).

    python tools/draw_assets.py [--output assets]

Pillow and the standard library only, and no chance: the same Pillow draws the same picture every time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from draw_cat import cat
from draw_dog import dog


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of assets/.")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent.parent / "assets")
    folder = parser.parse_args().output
    for place, picture in (("sty/cat/sty_cat.png", cat()), ("cnt/dog/cnt_dog.png", dog())):
        file = folder / place
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file, optimize=True)
        print(f"{file}: {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
