"""What an adapter file says and holds, on the terminal or as JSON; of two files, what differs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.adapters.network_module import method_made_by
from lowrank.config.tools import INSPECT
from lowrank.errors import Refused
from lowrank.formats import inspect
from lowrank.formats.read import read_adapter
from lowrank.tensors import read_metadata

_BLOCK = re.compile(
    r"^((?:single_)?transformer_blocks|down_blocks|up_blocks|mid_block|text_model)(?:\.(\d+))?"
)
_FEW = 8


def main(argv: list[str] | None = None) -> int:
    """Show the files. Raises `Refused` for what is no file of tensors."""
    args = INSPECT.parse(argv).options
    told = [inspect.report(file, _method(file)) for file in args.files]
    apart = _apart(args.files, told) if len(told) == 2 else None
    if args.json:
        shown = told if apart is None else [*told, {"differences": apart}]
        print(json.dumps(shown[0] if len(shown) == 1 else shown, indent=1, ensure_ascii=False))
        return 0
    for one in told:
        print("\n".join(lines(one, every=args.layers, metadata=args.metadata)) + "\n")
    if apart is not None:
        print("\n".join(difference_lines(apart, args.layers)))
    return 0


def _method(file: str):
    try:
        return method_made_by(read_metadata(file), file)
    except Refused:  # its metadata are damaged; the tensors are told all the same
        return None


def _apart(files: Sequence[str], told: list[dict[str, Any]]) -> dict[str, Any]:
    apart = inspect.differences(*told)
    try:
        layers = [read_adapter(file).layers for file in files]
    except Refused as refused:
        return {**apart, "changes": {}, "not_compared": str(refused)}
    changes = inspect.compared(*layers)
    plain = {
        name: {k: None if not math.isfinite(v) else v for k, v in one.items()}
        for name, one in changes.items()
    }
    return {**apart, "changes": plain}


def lines(one: Mapping[str, Any], every: bool = False, metadata: bool = False) -> list[str]:
    """A file's facts as text."""
    found = [f"{one['file']}  ({one['bytes'] / 2**20:.1f} MiB, {one['tensors']} tensors)"]
    rows = {
        "method": one["method"],
        "model": one["model"],
        "layers": f"{len(one['layers'])} ({_table(one['parts'])})",
        "ranks": _table(one["ranks"]),
        "alphas": _table(one["alphas"]),
        "targets": _table(one["targets"]),
        "precision": _table(one["dtypes"]),
        "‖ΔW‖": f"{one['norm']:.4g}",
        "base": _pairs(one["base"]),
        "basis": one["basis_hash"],
        "routed": f"{one['experts']} experts a layer: ΔW depends on the input, and has no norm"
        if one["experts"] > 1
        else None,
        "schedule": _pairs(one["schedule"]),
        "options": _pairs(one["options"]) if isinstance(one["options"], dict) else one["options"],
        "made": _pairs(one["made"]),
        "training": _pairs(one["training"]),
        "command": one["command"],
        "sha256": one["sha256"],
    }
    found += [f"  {name:<10} {_plain(value)}" for name, value in rows.items() if value]
    other = one["other_keys"]
    if other["count"]:
        kinds = f" ({_table(other['kinds'])})" if other["kinds"] else ""
        found.append(f"  {'other keys':<10} {other['count']}{kinds}: {_plain(', '.join(other['examples']))}")
    for problem in one["problems"][: None if every else _FEW]:
        found.append(f"  problem    {_plain(problem)}")
    if len(one["problems"]) > _FEW and not every:
        found.append(f"  problem    … and {len(one['problems']) - _FEW} more; --layers shows all")
    found += _norms(one["layers"], every)
    if metadata:
        found += [f"  {name} = {_plain(value)}" for name, value in sorted(one["metadata"].items())]
    return found


def _plain(text: Any) -> str:
    """Text of a stranger without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def _table(counts: Mapping[str, int]) -> str:
    told = [f"{name} × {count}" for name, count in list(counts.items())[:_FEW]]
    return _plain(", ".join(told) + (f", … {len(counts)} kinds" if len(counts) > _FEW else ""))


def _pairs(found: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (found or {}).items() if value is not None)


def _norms(layers: list[Mapping[str, Any]], every: bool) -> list[str]:
    told = [layer for layer in layers if layer["norm"] is not None]
    if every:
        return [
            f"  {layer['norm']:10.4g}  rank {layer['rank']:<4} "
            f"{_plain(layer['part'])}.{_plain(layer['path'])}"
            for layer in told
        ]
    groups: dict[str, list[float]] = {}
    for layer in told:
        block = _BLOCK.match(layer["path"])
        name = ".".join(word for word in block.groups() if word) if block else layer["path"].split(".")[0]
        groups.setdefault(f"{layer['part']}.{name}", []).append(layer["norm"])
    return [
        f"  {math.sqrt(sum(n * n for n in norms)):10.4g}  ‖ΔW‖ of {_plain(name)} ({len(norms)} layers)"
        for name, norms in groups.items()
    ]


def difference_lines(apart: Mapping[str, Any], every: bool) -> list[str]:
    """What differs between two files, as text."""
    if apart["same_bytes"]:
        return ["the two files are the same, byte for byte"]
    found = ["between the first and the second:"]
    found += [f"  {name}: {_plain(a)} | {_plain(b)}" for name, (a, b) in apart["facts"].items()]
    for name, which in (("only_first", "only in the first"), ("only_second", "only in the second")):
        if apart[name]:
            found.append(f"  {which}: {len(apart[name])} layers, for example {_plain(apart[name][0])}")
    if apart["ranks"]:
        name, (a, b) = next(iter(apart["ranks"].items()))
        found.append(f"  ranks differ in {len(apart['ranks'])} layers, for example {_plain(name)}: {a} | {b}")
    if "not_compared" in apart:
        found.append(f"  ΔW is not compared: {_plain(apart['not_compared'])}")
    changes = apart["changes"]
    told = {k: v for k, v in changes.items() if v["distance"] is not None}
    if told:
        worst = sorted(told.items(), key=lambda item: -item[1]["distance"])
        mean = sum(v["distance"] for v in told.values()) / len(told)
        cosines = [v["cosine"] for v in told.values() if v["cosine"] is not None]
        told_cosine = f", mean cosine {sum(cosines) / len(cosines):.3f}" if cosines else ""
        found.append(f"  ‖ΔW₁ − ΔW₂‖/‖ΔW₁‖ of {len(told)} layers: mean {mean:.3g}{told_cosine}; the largest")
        found += [f"    {v['distance']:.3g}  {_plain(name)}" for name, v in worst[: None if every else _FEW]]
    return found
