"""Extract the directions that a collection of LoRAs shares, for networks that train inside a basis.

    python tools/extract_universal_basis.py --lora_dir loras/ --output basis.safetensors --report basis.json

Reads LoRA files of kohya, diffusers, PEFT and lowrank, one at a time, and writes an orthonormal left and
right basis for each layer. The printed table shows which fraction of the LoRAs lies in the basis, and which
fraction of a LoRA lies in the basis of the others. docs/universal.md explains the columns.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lowrank.bases.basis_file import write_basis
from lowrank.combine.shared_basis import LEAST, Extracted, Extraction, extract, find_files
from lowrank.config.tools import EXTRACT_BASIS, UniversalBasis
from lowrank.errors import Refused
from lowrank.files import atomic, writable_folder
from lowrank.tensors import read_metadata

COLUMNS = ("right", "left", "both", "held_out", "least_held_out", "random")
HEAD = ("right", "left", "both", "held out", "least", "random")


def main(argv: list[str] | None = None) -> int:
    """Extract one basis. Returns 0, or 1 after printing an error, before anything is written."""
    try:
        parsed = EXTRACT_BASIS.parse(argv)
        for note in parsed.notes:
            print(f"note: {note}")
        return run(parsed.options)
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 1


def run(options: UniversalBasis) -> int:
    """Extract the basis, write basis and report, print the table."""
    assert options.output
    for flag, path in (("--output", options.output), ("--report", options.report)):
        if path is not None:
            writable_folder(Path(path).parent, flag)
            if Path(path).is_dir():
                raise Refused(f"{flag} {path} is a folder; give a file name in it")
    if Path(options.output).exists() and read_metadata(options.output).get("lowrank.kind") != "basis":
        raise Refused(
            f"--output {options.output} exists and is no basis, it may be a LoRA; give another file name"
        )
    if options.report and options.report.endswith(".safetensors"):
        raise Refused(f"--report {options.report} is JSON, not .safetensors; give another file name")
    files, copies = find_files(options.lora_dir)
    extraction = Extraction(
        options.rank, options.tau, options.center, options.normalize, options.sketch or 4 * options.rank
    )
    extracted = extract(files, extraction)
    facts = {
        **{"options": extraction._asdict(), "loras": extracted.loras, "means": means(extracted)},
        **{"skipped": dict(sorted((extracted.other + copies).items())), "too_few": extracted.few},
        "layers": {name: row._asdict() for name, row in extracted.table.items()},
    }
    basis_hash = write_basis(
        options.output,
        extracted.layers,
        extracted.values,
        "universal",
        {**extracted.facts, **{key: json.dumps(value, sort_keys=True) for key, value in facts.items()}},
    )
    if options.report:
        with atomic(options.report) as part:
            report = {"basis_hash": basis_hash, **extracted.facts, **facts}
            part.write_text(json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    print("\n".join([*table(extracted), *remarks(extracted, extraction, facts["skipped"])]))
    counts = f"{len(extracted.layers)} layers from {extracted.loras} LoRAs"
    left = ", ".join(f"{count} {kind}" for kind, count in facts["skipped"].items()) or "nothing"
    print(f"{options.output}: {counts}, basis {basis_hash[:12]}; left out: {left}")
    return 0


def means(extracted: Extracted) -> dict[str, float]:
    """Return the mean of each column over the layers."""
    return {key: fmean(getattr(row, key) for row in extracted.table.values()) for key in COLUMNS}


def table(extracted: Extracted) -> list[str]:
    """Return the lines of the table: one per layer, and the means; `~` marks approximate layers."""
    width = max(map(len, ("layer", *extracted.table)))

    def shares(values: Mapping[str, float]) -> str:
        return "".join(f" {values[key]:>8.4f}" for key in COLUMNS)

    rows = [f"{'layer':{width}} {'O×I':>11} {'LoRAs':>5} {'K':>3}" + "".join(f" {head:>8}" for head in HEAD)]
    for name, row in extracted.table.items():
        size = f"{row.outputs}×{row.inputs}"
        mark = "" if row.exact else " ~"
        rows.append(
            f"{name:{width}} {size:>11} {row.loras:>5} {row.directions:>3}{shares(row._asdict())}{mark}"
        )
    return [*rows, f"{'mean':{width}} {'':>21}{shares(means(extracted))}"]


def remarks(extracted: Extracted, extraction: Extraction, skipped: Mapping[str, int]) -> list[str]:
    """Return the lines on skipped files and layers, and warnings on the numbers."""
    counts = ", ".join(f"{count} {kind}" for kind, count in skipped.items())
    lines = [f"skipped: {counts}"] if skipped else []
    if extracted.few:
        lines.append(
            f"skipped: {len(extracted.few)} layers in fewer than {LEAST} LoRAs: {next(iter(extracted.few))} …"
        )
    if inexact := sum(not row.exact for row in extracted.table.values()):
        lines.append(
            f"{inexact} layers (~) had over {2 * extraction.sketch} columns: their directions are "
            "approximate, and right and left are lower bounds; raise --sketch for more accuracy"
        )
    if extracted.loras < extraction.rank:
        lines.append(
            f"warning: {extracted.loras} LoRAs are too few for {extraction.rank} directions; lower --rank"
        )
    mean = means(extracted)
    if mean["held_out"] < 2 * mean["random"]:
        lines.append(
            "warning: a held-out LoRA lies in the basis no more than in random directions; these LoRAs share "
            "nothing, train with basis_path=auto:grad instead"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
