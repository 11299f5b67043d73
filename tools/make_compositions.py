"""Write docs/composition.md: which methods can be combined, determined by combining them.

python tools/make_compositions.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from compositions import ADDITIONS, FACTORS, export, joined  # noqa: E402  # pyright: ignore[reportMissingImports]

from lowrank.adapters.method import CONFLICTS  # noqa: E402

PAGE = ROOT / "docs" / "composition.md"
TEXT = """# Which methods go together

Written by `tools/make_compositions.py`; `tests/test_compositions.py` builds every pair, trains it two steps,
saves, reloads and exports it.

A method fills some of the slots factor, gate, experts, magnitude, penalty, rates and warm-up; `a | b` is
both, and two values for one slot are refused. A row is a factor, a column an addition; a cell says what a
file becomes for other programs, or the number of the reason against it. ABM goes with all.

"""


def page() -> str:
    """Return the text of the page."""
    reasons: dict[str, int] = {}
    rows = [f"| | {' | '.join(ADDITIONS)} |", "|---" * (len(ADDITIONS) + 1) + "|"]
    for factor in FACTORS:
        cells = []
        for addition in ADDITIONS:
            method = joined(factor, addition)  # or the reason why not
            if isinstance(method, str):
                cells.append(f"[{reasons.setdefault(method, len(reasons) + 1)}]")
            else:
                cells.append(export(method))
        rows.append(f"| `{factor}` | {' | '.join(cells)} |")
    numbered = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    never = "\n".join(f"- {' and '.join(pair)}: {reason}." for pair, reason in CONFLICTS.items())
    return TEXT + "\n".join(rows) + f"\n\n{numbered}\n\nSlots that never go together:\n\n{never}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
