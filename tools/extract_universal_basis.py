"""Find the directions that a collection of LoRAs shares, for networks that train inside a basis.

    python tools/extract_universal_basis.py --lora_dir loras/ --output basis.safetensors --report basis.json

Reads kohya's, diffusers' and PEFT's files and this program's own, one at a time, and writes an orthonormal
left and right basis for each layer. The table says how much of the LoRAs lies in it, and how much of a LoRA
that the basis was made without. docs/universal.md explains the columns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lowrank.bases.basis_file import write_basis
from lowrank.combine.collection import gather
from lowrank.combine.shared_basis import LEAST, Extracted, Extraction, extract
from lowrank.config.tools import EXTRACT_BASIS, UniversalBasis
from lowrank.errors import Refused
from lowrank.files import atomic, writable_folder
from lowrank.tensors import read_metadata

COLUMNS = ("right", "left", "both", "held_out", "least_held_out", "random")
HEAD = ("right", "left", "both", "held out", "least", "random")


def main(argv: list[str] | None = None) -> int:
    """Make one basis; 0, or 1 with a sentence before anything is written."""
    try:
        parsed = EXTRACT_BASIS.parse(argv)
        for note in parsed.notes:
            print(f"note: {note}")
        return run(parsed.universal_basis)
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 1


def run(told: UniversalBasis) -> int:
    """Extract, write the basis and the report, print the table."""
    assert told.output
    for flag, path in (("--output", told.output), ("--report", told.report)):
        if path is not None:
            writable_folder(Path(path).parent, flag)
            if Path(path).is_dir():
                raise Refused(f"{flag} {path} is a folder; name a file in it")
    if Path(told.output).exists() and read_metadata(told.output).get("lowrank.kind") != "basis":
        raise Refused(f"--output {told.output} exists and is no basis, it may be a LoRA; name another file")
    if told.report and told.report.endswith(".safetensors"):
        raise Refused(f"--report {told.report} is JSON and no .safetensors file; name another file")
    files, copies = gather(told.lora_dir)
    how = Extraction(told.rank, told.tau, told.center, told.normalize, told.sketch or 4 * told.rank)
    found = extract(files, how)
    facts = {
        **{"options": how._asdict(), "loras": found.loras, "means": means(found)},
        **{"skipped": dict(sorted((found.other + copies).items())), "too_few": found.few},
        "layers": {name: row._asdict() for name, row in found.table.items()},
    }
    written = write_basis(
        told.output,
        found.layers,
        found.values,
        "universal",
        {**found.facts, **{key: json.dumps(value, sort_keys=True) for key, value in facts.items()}},
    )
    if told.report:
        with atomic(told.report) as part:
            report = {"basis_hash": written, **found.facts, **facts}
            part.write_text(json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    print("\n".join([*table(found), *remarks(found, how, facts["skipped"])]))
    print(f"{told.output}: {len(found.layers)} layers from {found.loras} LoRAs, basis {written[:12]}")
    return 0


def means(found: Extracted) -> dict[str, float]:
    """Each column's mean over the layers."""
    return {key: fmean(getattr(row, key) for row in found.table.values()) for key in COLUMNS}


def table(found: Extracted) -> list[str]:
    """A row for each layer and one of means; `~` marks layers whose sketch had to leave something out."""
    wide = max(map(len, ("layer", *found.table)))

    def shares(values: Mapping[str, float]) -> str:
        return "".join(f" {values[key]:>8.4f}" for key in COLUMNS)

    rows = [f"{'layer':{wide}} {'O×I':>11} {'LoRAs':>5} {'K':>3}" + "".join(f" {head:>8}" for head in HEAD)]
    for name, row in found.table.items():
        size = f"{row.outputs}×{row.inputs}"
        mark = "" if row.exact else " ~"
        rows.append(
            f"{name:{wide}} {size:>11} {row.loras:>5} {row.directions:>3}{shares(row._asdict())}{mark}"
        )
    return [*rows, f"{'mean':{wide}} {'':>21}{shares(means(found))}"]


def remarks(found: Extracted, how: Extraction, skipped: Mapping[str, int]) -> list[str]:
    """What was left out, and what the numbers warn of."""
    told = [f"left out: {', '.join(f'{count} {kind}' for kind, count in skipped.items())}"] if skipped else []
    if found.few:
        told.append(
            f"left out: {len(found.few)} layers that fewer than {LEAST} LoRAs have: {next(iter(found.few))} …"
        )
    if inexact := sum(not row.exact for row in found.table.values()):
        told.append(
            f"{inexact} layers (~) had over {2 * how.sketch} columns: their directions are approximate, and "
            "right and left are lower bounds; --sketch gives more room"
        )
    if found.loras < how.rank:
        told.append(
            f"warning: {found.loras} LoRAs are few for --rank {how.rank} directions, which fit them alone"
        )
    mean = means(found)
    if mean["held_out"] < 2 * mean["random"]:
        told.append(
            "warning: a LoRA that the basis was made without has no more in it than in random directions; "
            "these LoRAs share nothing, train with basis_path=auto:grad instead"
        )
    return told


if __name__ == "__main__":
    sys.exit(main())
