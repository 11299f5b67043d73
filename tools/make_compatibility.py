"""Write docs/compatibility.md from the tables that the tests go through (tests/support/compatibility.py).

python tools/make_compatibility.py           write it
python tools/make_compatibility.py --check   exit 1 when it is not what this would write
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
sys.path.insert(0, str(ROOT))

from lowrank.weights.formats import FORMATS  # noqa: E402

INTRODUCTION = """# What works with what

Written by `tools/make_compatibility.py` from `tests/support/compatibility.py`;
`tests/contract/test_export.py` and `tests/contract/test_import.py` go through every cell on small SD 1.5,
SDXL and FLUX models. *Exact* means: the program
that the format is of loads the file with no tensor missing and none unexpected, and every layer answers as
ours does to 10⁻⁵ of its change in fp32. How: [export.md](export.md).
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    told = [[cell.replace("|", "\\|") for cell in cells] for cells in lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in told) + "\n"


def page() -> str:
    """The page."""
    spec = importlib.util.spec_from_file_location(
        "compatibility", ROOT / "tests" / "support" / "compatibility.py"
    )
    assert spec and spec.loader  # the file is there
    known = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(known)

    def cell(method: str, to: str) -> str:
        held = [name for family, name in known.FAMILIES.items() if not known.refusal(family, method, to)]
        return (
            "–"
            if not held
            else "exact"
            if len(held) == len(known.FAMILIES)
            else f"exact on {', '.join(held)}"
        )

    exports = [
        [f"`{m}`", told, *(cell(m, to) for to in FORMATS), "exact"] for m, told in known.METHODS.items()
    ]
    routed = [
        [f"`{m}`", told, *("–" if to == "qrlora" else "nearest" for to in FORMATS), "nearest"]
        for m, told in known.ROUTED.items()
    ]
    formats = [
        [f"`{to}`", form.readers, known.READERS.get(to, "our own reader")] for to, form in FORMATS.items()
    ]
    imports = [[name, how, what] for name, (how, what) in known.IMPORTS.items()]
    return (
        INTRODUCTION
        + "\n## Exports\n\n"
        + table(["method", "as", *(f"`{to}`" for to in FORMATS), "`merged`"], exports)
        + "\n`merged` rounds once to the precision of the checkpoint and says what that loses. DoRA has two "
        "conventions\nof norm, `--dora_norm`; diffusers leaves kohya's `dora_scale` out, and reads "
        "`--to diffusers`.\n"
        + "\n### Several experts, by calibration\n\n"
        + "Their ΔW depends on the input. `--model BASE --calibrate PROMPTS` draws pictures with the\n"
        "adapter and exports the LoRA that is nearest over all its layers' inputs. What that loses is\n"
        "printed and in the metadata; files hold that LoRA exactly. Without the flag they are refused.\n\n"
        + table(["method", "as", *(f"`{to}`" for to in FORMATS), "`merged`"], routed)
        + "\n## Formats\n\n"
        + table(["`--to`", "read by", "read back in the tests by"], formats)
        + "\n## Imports\n\n"
        + table(["file", "looks like", "becomes native"], imports)
    )


def main() -> int:
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    if "--check" in sys.argv[1:]:
        print(f"{PAGE} is stale; run python tools/make_compatibility.py")
        return 1
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
