"""Write docs/compatibility.md from the tables in tests/support/compatibility.py, which the tests check.

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

from lowrank.formats.write import FORMATS  # noqa: E402

INTRODUCTION = """# What works with what

`tools/make_compatibility.py` writes this page from `tests/support/compatibility.py`.
`tests/contract/test_export.py` and `tests/contract/test_import.py` test every cell on small SD 1.5, SDXL and
FLUX models. *Exact* means: the program of that format loads the file with no tensor missing and none
unexpected, and the change of every layer equals ours to 10⁻⁵ of its size in fp32. How to export and import:
[export.md](export.md).
"""
EXPORT_NOTES = """
`merged` rounds once to the precision of the checkpoint and prints what the rounding loses. DoRA has two
conventions of norm, chosen with `--dora_norm`. diffusers ignores kohya's `dora_scale`; use `--to diffusers`.
diffusers 0.42 with transformers 5 does not load a DoRA's lengths into text encoders: `--to diffusers` of
such an adapter is refused, and exact with `--parts unet`. It does not read text encoders of kohya's files
right either.

### Several experts, by calibration

The ΔW of several experts depends on the input. `--model BASE --calibrate PROMPTS` draws pictures with the
adapter and exports the LoRA that is nearest over the inputs of all layers. The error is printed and stored in
the metadata; the files hold the nearest LoRA exactly. Without `--calibrate` these adapters are refused.

"""


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in escaped) + "\n"


def page() -> str:
    """Return the text of the page."""
    spec = importlib.util.spec_from_file_location(
        "compatibility", ROOT / "tests" / "support" / "compatibility.py"
    )
    assert spec and spec.loader  # the file exists
    known = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(known)

    def cell(method: str, to: str) -> str:
        families = [name for family, name in known.FAMILIES.items() if not known.refusal(family, method, to)]
        if not families:
            return "–"
        return "exact" if len(families) == len(known.FAMILIES) else f"exact on {', '.join(families)}"

    exports = [
        [f"`{m}`", text, *(cell(m, to) for to in FORMATS), "exact"] for m, text in known.METHODS.items()
    ]
    routed = [
        [f"`{m}`", text, *("–" if to == "qrlora" else "nearest" for to in FORMATS), "nearest"]
        for m, text in known.ROUTED.items()
    ]
    formats = [
        [f"`{to}`", form.readers, known.READERS.get(to, "our own reader")] for to, form in FORMATS.items()
    ]
    imports = [[name, how, what] for name, (how, what) in known.IMPORTS.items()]
    return (
        INTRODUCTION
        + "\n## Exports\n\n"
        + table(["method", "as", *(f"`{to}`" for to in FORMATS), "`merged`"], exports)
        + EXPORT_NOTES
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
