"""Write an adapter as a plain LoRA: python tools/export_lora.py in.safetensors out.safetensors

ΔR keeps its rank r, QR-LoRA becomes rank 2r; both are exact. The keys are diffusers'
(`transformer.….lora_A.weight`), which ComfyUI reads as well. The file is read back and compared layer by
layer before the command ends.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lowrank.errors import Refused
from lowrank.weights.export import export_lora, ranks_of, worst_difference


def main(argv: list[str] | None = None) -> int:
    """Export one file; 0, or 1 with a sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="ΔR, QR-LoRA or LoRA file")
    parser.add_argument("target", help="the plain LoRA to write")
    args = parser.parse_args(argv)
    try:
        state = export_lora(args.source, args.target)
        worst = worst_difference(args.source, args.target)
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 1
    ranks = sorted(ranks_of(state))
    print(
        f"{args.target}: {len(state) // 3} layers of rank {', '.join(map(str, ranks))}; "
        f"read back, the largest relative difference of a layer is {worst:.1e}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
