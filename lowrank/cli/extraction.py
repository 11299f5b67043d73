"""tools/extract_lora.py: the adapter that is nearest to the difference of two checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tqdm import tqdm

from lowrank import __version__
from lowrank.cli.export import described, flat_clip, lost_text
from lowrank.config.tools import EXTRACT_LORA
from lowrank.formats import verify
from lowrank.formats.base_checkpoint import BaseCheckpoint
from lowrank.formats.extraction import Extracted, extract_adapter
from lowrank.formats.resize import RankRule
from lowrank.formats.write import check_target, readers_of, write
from lowrank.formats.writers import Choices
from lowrank.models.family import DTYPES


def main(argv: list[str] | None = None) -> int:
    """Extract one adapter and print what it loses. Raises `Refused`."""
    parsed = EXTRACT_LORA.parse(argv)
    args = parsed.options
    check_target(args.to, Path(args.target))  # before the work
    base, tuned = BaseCheckpoint(args.model), BaseCheckpoint(args.tuned)
    with tqdm(desc="layers") as bar:

        def watch(_place: object, number: int, count: int) -> None:
            bar.total = count
            bar.update(number - bar.n)

        extracted = extract_adapter(
            base,
            tuned,
            RankRule(*(args.rank or ("fixed", 0.0, 64))),
            args.min_change,
            args.parts,
            args.base,
            watch,
        )
    facts = {"lowrank.version": __version__, "lowrank.command": parsed.command}
    facts |= {"lowrank.extracted_from": Path(args.tuned).name, "lowrank.base_model": Path(args.model).name}
    adapter = dataclasses.replace(extracted.adapter, metadata=facts)
    choices = Choices(DTYPES[args.dtype] if args.dtype else None, base=base, flat_clip=flat_clip())
    files = write(adapter, args.to, args.target, choices)
    print("\n".join(_summary(extracted)))
    print(f"{', '.join(map(str, files))}: {described(adapter)}; read by {readers_of(adapter, args.to)}")
    for result in verify.check_export(adapter, args.to, Path(args.target), choices):
        print(
            result.note
            or f"read back by {result.reader}: {result.layers} layers, at most {result.worst:.1e} of a "
            "change apart"
        )
    return 0


def _summary(extracted: Extracted) -> list[str]:
    """What the adapter loses, and what it leaves out, in lines."""
    lines = [f"{lost_text(extracted.loss)}; {extracted.equal} layers are equal in both checkpoints"]
    if extracted.left_out:
        counts = ", ".join(f"{kind} × {count}" for kind, count in extracted.left_out.items())
        lines.append(f"left out, since a LoRA has none: {counts}")
    return lines
