"""tools/extract_lora.py: the adapter that is nearest to the difference of two checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tqdm import tqdm

from lowrank import __version__
from lowrank.cli.export import checked_text, described, flat_clip, lost_text
from lowrank.config.tools import EXTRACT_LORA
from lowrank.errors import Refused
from lowrank.files import staged
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
    if args.strict and extracted.left_out:
        raise Refused(
            f"--strict, and {args.tuned} differs from {args.model} in what a LoRA has not: "
            f"{_left_out(extracted)}; leave --strict out to extract the other layers"
        )
    with staged(args.target) as part:
        files = write(adapter, args.to, part, choices)
        checked = verify.check_export(adapter, args.to, part, choices)
    written = ", ".join(str(Path(args.target) / file.relative_to(part)) for file in files)
    print(f"{lost_text(extracted.loss)}; {extracted.equal} layers are equal in both checkpoints")
    print(f"{written}: {described(adapter)}; read by {readers_of(adapter, args.to)}")
    print("\n".join(map(checked_text, checked)))
    print(_used(args.tuned, extracted))
    return 0


def _used(tuned: str, extracted: Extracted) -> str:
    """The last line: what of the difference is in the adapter, and what is left out, by kind and count."""
    count = len(extracted.adapter.layers)
    whole = count + sum(extracted.left_out.values())
    used, left = f"{tuned}: {count} of {whole} differing weights and biases are used", _left_out(extracted)
    return f"{used}; left out: {left}" if left else f"{used}, nothing is left out"


def _left_out(extracted: Extracted) -> str:
    return ", ".join(f"{kind} × {count}" for kind, count in extracted.left_out.items())
