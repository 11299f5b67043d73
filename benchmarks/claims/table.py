"""The table of docs/evidence.md, from the JSON of every claim."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "benchmarks/results/claims", ROOT / "docs/evidence.md"
BEGIN, END = "<!-- claims: made by benchmarks/claims/run.py -->\n", "<!-- end of claims -->\n"
NOT_MEASURED = "not measured"


def render(names: tuple[str, ...], results: Path = RESULTS) -> str:
    """Return the table claim → verdict → numbers → figure in Markdown; claims without a result are named."""
    lines = ["| claim | verdict | difference, 95 % interval | seeds | source |", "|---|---|---|---|---|"]
    for name in names:
        file = results / f"{name}.json"
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        finished = record.get("statements")
        if finished is None:
            claim = importlib.import_module(f"benchmarks.claims.{name}").CLAIM
            lines += [f"| {s.text} | {NOT_MEASURED} | | | |" for s in claim.statements]
            continue
        source = f"[figure](images/claims/{name}.svg), [JSON](../benchmarks/results/claims/{name}.json)"
        edges = record["rates_at_an_edge"]
        lines += [_row(statement, source, edges) for statement in finished]
    return "\n".join(lines) + "\n"


def _row(statement: dict[str, Any], source: str, edges: list[str]) -> str:
    difference = statement["difference"]
    if difference is None:
        return f"| {statement['text']} | {statement['verdict']} | | | |"
    half = difference["half"]
    number = f"{difference['mean']:+.3g}" + ("" if half is None else f" ± {half:.2g}")
    at_edge = "¹" if {statement["arm"], statement["against"]} & set(edges) else ""
    return (
        f"| {statement['text']} | {statement['verdict']}{at_edge} | {number} {statement['metric']} | "
        f"{difference['n']} | {source} |"
    )


def rewritten(page: str, names: tuple[str, ...], results: Path = RESULTS) -> str:
    """Return the page with the table between its two marks made again."""
    before, _, after = page.partition(BEGIN)
    return before + BEGIN + "\n" + render(names, results) + "\n" + END + after.partition(END)[2]
