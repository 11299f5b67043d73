"""tools/inspect_lora.py: print the facts of adapter files, as text or JSON, and the differences of two."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.adapter_file import open_adapter_file
from lowrank.adapters.network_module import method_made_by
from lowrank.config.tools import INSPECT
from lowrank.errors import Refused
from lowrank.formats import inspect
from lowrank.formats.base_checkpoint import BaseCheckpoint
from lowrank.formats.read import read_adapter

_BLOCK = re.compile(
    r"^((?:single_)?transformer_blocks|down_blocks|up_blocks|mid_block|text_model)(?:\.(\d+))?"
)
_FEW = 8


def main(argv: list[str] | None = None) -> int:
    """Print the facts of the files. Raises `Refused` for a file without tensors."""
    args = INSPECT.parse(argv).options
    base = BaseCheckpoint(args.model) if args.model else None
    reports = [inspect.report(file, _method(file), base) for file in args.files]
    for report in reports:
        if args.strict and report["other_keys"]["count"]:
            raise Refused(f"--strict, and not all of the file is used: {_plain(report['usage'])}")
    differences = _differences(args.files, reports) if len(reports) == 2 else None
    if args.json:
        shown = reports if differences is None else [*reports, {"differences": differences}]
        print(json.dumps(shown[0] if len(shown) == 1 else shown, indent=1, ensure_ascii=False))
        return 0
    for report in reports:
        print("\n".join(report_lines(report, every=args.layers, metadata=args.metadata)) + "\n")
    if differences is not None:
        print("\n".join(difference_lines(differences, args.layers)))
    print("\n".join(_plain(report["usage"]) for report in reports))
    return 0


def _method(file: str):
    try:
        return method_made_by(open_adapter_file(file).metadata, file)
    except Refused:  # damaged metadata; the tensors are still reported
        return None


def _differences(files: Sequence[str], reports: list[dict[str, Any]]) -> dict[str, Any]:
    differences = inspect.differences(*reports)
    try:
        layers = [read_adapter(file).layers for file in files]
    except Refused as refused:
        return {**differences, "changes": {}, "not_compared": str(refused)}
    changes = inspect.compared(*layers)
    plain = {
        name: {k: None if not math.isfinite(v) else v for k, v in change.items()}
        for name, change in changes.items()
    }
    return {**differences, "changes": plain}


def report_lines(report: Mapping[str, Any], every: bool = False, metadata: bool = False) -> list[str]:
    """A file's facts as text."""
    lines = [f"{report['file']}  ({report['bytes'] / 2**20:.1f} MiB, {report['tensors']} tensors)"]
    rows = {
        "method": report["method"],
        "model": report["model"],
        "layers": f"{len(report['layers'])} ({_table(report['parts'])})",
        "ranks": _table(report["ranks"]),
        "alphas": f"{_table(report['alphas'])} (from: {_table(report['alpha_places'])})",
        "targets": _table(report["targets"]),
        "precision": _table(report["dtypes"]),
        "‖ΔW‖": f"{report['norm']:.4g}{_unmeasured(report)}",
        "base": _pairs(report["base"]),
        "basis": report["basis_hash"],
        "routed": f"{report['experts']} experts a layer: ΔW depends on the input, and has no norm"
        if report["experts"] > 1
        else None,
        "schedule": _pairs(report["schedule"]),
        "options": _pairs(report["options"]) if isinstance(report["options"], dict) else report["options"],
        "made": _pairs(report["made"]),
        "training": _pairs(report["training"]),
        "command": report["command"],
        "sha256": report["sha256"],
    }
    lines += [f"  {name:<10} {_plain(value)}" for name, value in rows.items() if value]
    other = report["other_keys"]
    if other["count"]:
        kinds = f" ({_table(other['kinds'])})" if other["kinds"] else ""
        lines.append(f"  {'other keys':<10} {other['count']}{kinds}: {_plain(', '.join(other['examples']))}")
    for problem in report["problems"][: None if every else _FEW]:
        lines.append(f"  problem    {_plain(problem)}")
    if len(report["problems"]) > _FEW and not every:
        lines.append(f"  problem    … and {len(report['problems']) - _FEW} more; --layers shows all")
    lines += _norms(report["layers"], every)
    if metadata:
        lines += [f"  {name} = {_plain(value)}" for name, value in sorted(report["metadata"].items())]
    return lines


def _unmeasured(report: Mapping[str, Any]) -> str:
    """The layers whose ΔW is not in the norm, because it depends on the base's weights."""
    count = report["without_norm"] if report["experts"] == 1 else 0
    return f" without {count} layers whose ΔW depends on the base (--model)" if count else ""


def _plain(text: Any) -> str:
    """Text of a file without control characters, which a terminal would execute."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def _table(counts: Mapping[str, int]) -> str:
    shown = [f"{name} × {count}" for name, count in list(counts.items())[:_FEW]]
    return _plain(", ".join(shown) + (f", … {len(counts)} kinds" if len(counts) > _FEW else ""))


def _pairs(facts: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (facts or {}).items() if value is not None)


def _norms(layers: list[Mapping[str, Any]], every: bool) -> list[str]:
    measured = [layer for layer in layers if layer["norm"] is not None]
    if every:
        return [
            f"  {layer['norm']:10.4g}  {layer.get('kind', '')} rank {layer['rank'] or '–':<4} "
            f"{_plain(layer['part'])}.{_plain(layer['path'])}"
            for layer in measured
        ]
    groups: dict[str, list[float]] = {}
    for layer in measured:
        block = _BLOCK.match(layer["path"])
        name = ".".join(word for word in block.groups() if word) if block else layer["path"].split(".")[0]
        groups.setdefault(f"{layer['part']}.{name}", []).append(layer["norm"])
    return [
        f"  {math.sqrt(sum(n * n for n in norms)):10.4g}  ‖ΔW‖ of {_plain(name)} ({len(norms)} layers)"
        for name, norms in groups.items()
    ]


def difference_lines(differences: Mapping[str, Any], every: bool) -> list[str]:
    """What differs between two files, as text."""
    if differences["same_bytes"]:
        return ["the two files are the same, byte for byte"]
    lines = ["between the first and the second:"]
    lines += [f"  {name}: {_plain(a)} | {_plain(b)}" for name, (a, b) in differences["facts"].items()]
    for name, which in (("only_first", "only in the first"), ("only_second", "only in the second")):
        if differences[name]:
            lines.append(
                f"  {which}: {len(differences[name])} layers, for example {_plain(differences[name][0])}"
            )
    if differences["ranks"]:
        name, (a, b) = next(iter(differences["ranks"].items()))
        lines.append(
            f"  ranks differ in {len(differences['ranks'])} layers, for example {_plain(name)}: {a} | {b}"
        )
    if "not_compared" in differences:
        lines.append(f"  ΔW is not compared: {_plain(differences['not_compared'])}")
    changes = differences["changes"]
    compared = {k: v for k, v in changes.items() if v["distance"] is not None}
    if compared:
        worst = sorted(compared.items(), key=lambda item: -item[1]["distance"])
        mean = sum(v["distance"] for v in compared.values()) / len(compared)
        cosines = [v["cosine"] for v in compared.values() if v["cosine"] is not None]
        mean_cosine = f", mean cosine {sum(cosines) / len(cosines):.3f}" if cosines else ""
        lines.append(
            f"  ‖ΔW₁ − ΔW₂‖/‖ΔW₁‖ of {len(compared)} layers: mean {mean:.3g}{mean_cosine}; the largest"
        )
        lines += [f"    {v['distance']:.3g}  {_plain(name)}" for name, v in worst[: None if every else _FEW]]
    return lines
