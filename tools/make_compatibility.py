"""Write docs/compatibility.md from the tables in tests/compatibility.py, which the tests check.

python tools/make_compatibility.py           write the page
python tools/make_compatibility.py --check   exit 1 if the page is not up to date
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
sys.path.insert(0, str(ROOT))

from lowrank.formats.formats import FORMATS  # noqa: E402

INTRODUCTION = """# What works with what

Written by `tools/make_compatibility.py` from `tests/compatibility.py`; `tests/test_export.py` and
`tests/test_import.py` go through every cell on small SD 1.5, SDXL and FLUX models. *Exact* means: the program
that the format is of loads the file with no tensor missing and none unexpected, and every layer answers as
ours does to 10⁻⁵ of its change in fp32. How: [export.md](export.md).
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in escaped) + "\n"


def page() -> str:
    """Return the text of the page."""
    spec = importlib.util.spec_from_file_location("compatibility", ROOT / "tests" / "compatibility.py")
    assert spec and spec.loader  # the file exists
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)

    def cell(method: str, to: str) -> str:
        families = [name for key, name in tables.FAMILIES.items() if not tables.refusal(key, method, to)]
        if not families:
            return "–"
        return "exact" if len(families) == len(tables.FAMILIES) else f"exact on {', '.join(families)}"

    exports = [
        [f"`{m}`", kind, *(cell(m, to) for to in FORMATS), "exact"] for m, kind in tables.METHODS.items()
    ]
    routed = [
        [f"`{m}`", kind, *("–" if to == "qrlora" else "nearest" for to in FORMATS), "nearest"]
        for m, kind in tables.ROUTED.items()
    ]
    formats = [
        [f"`{to}`", form.readers, tables.READERS.get(to, "our own reader")] for to, form in FORMATS.items()
    ]
    imports = [[name, how, what] for name, (how, what) in tables.IMPORTS.items()]
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
    """Write or check the page; returns the exit status."""
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
