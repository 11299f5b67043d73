"""Write docs/composition.md: which methods go together. The table comes from the code.

python tools/make_compositions.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from compositions import ADDITIONS, FACTORS, export, joined  # noqa: E402  # pyright: ignore[reportMissingImports]

from lowrank.adapters.method import CONFLICTS  # noqa: E402

PAGE = ROOT / "docs" / "composition.md"
TEXT = """# Which methods go together

`tools/make_compositions.py` writes this page. `tests/contract/test_compositions.py` builds every pair, trains
it two steps, saves, reloads and exports it.

A method fills some of the slots factor, gate, experts, magnitude, penalty, rates and warm-up
([the slots](architecture.md#the-seven-slots-of-a-method)). `a | b` joins two methods. It refuses two values
for one slot. A row of the table is a factor, a column an addition. A cell has the form that an export for
other programs takes, or the number of the note that explains why the pair is refused. ABM goes with all.

"""
_NO_UP = "An expert is a trained up. The up of this factor is frozen, so there is nothing to multiply."
_NO_RATE = "LoRA+ raises the learning rate of the trained up. The up of this factor is frozen."
_COPY = "This factor subtracts an initial copy of one up. That difference is not defined for several ups."
REASONS = {  # (factor, addition) that the code refuses -> the reason, for a reader of the table
    ("delta_r", "experts"): _NO_UP,
    ("delta_r_triu", "experts"): _NO_UP,
    ("delta_r", "LoRA+"): _NO_RATE,
    ("delta_r_triu", "LoRA+"): _NO_RATE,
    ("vera", "experts"): _NO_UP,
    ("vera", "LoRA+"): _NO_RATE,
    ("qrlora", "experts"): _COPY,
    ("pissa", "experts"): _COPY,
    ("tlora", "experts"): _COPY,
    (
        "tlora",
        "DoRA",
    ): "T-LoRA's ΔW changes with the timestep, so DoRA's row norm would change within one batch.",
    ("tlora", "T-LoRA's gate"): "T-LoRA already has this gate.",
    ("effilora", "experts"): "EffiLoRA already has experts.",
}


def page() -> str:
    """Return the text of the page. Raises KeyError for a refused pair without a reason."""
    numbers: dict[str, int] = {}
    rows = [f"| | {' | '.join(ADDITIONS)} |", "|---" * (len(ADDITIONS) + 1) + "|"]
    for factor in FACTORS:
        cells = []
        for addition in ADDITIONS:
            method = joined(factor, addition)
            if isinstance(method, str):
                number = numbers.setdefault(REASONS[factor, addition], len(numbers) + 1)
                cells.append(f"no [{number}]")
            else:
                cells.append(export(method))
        rows.append(f"| `{factor}` | {' | '.join(cells)} |")
    notes = "\n".join(f"{number}. {reason}" for reason, number in numbers.items())
    never = "\n".join(f"- {' and '.join(pair)}: {reason}." for pair, reason in CONFLICTS.items())
    return TEXT + "\n".join(rows) + f"\n\n{notes}\n\nSlots that never go together:\n\n{never}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
