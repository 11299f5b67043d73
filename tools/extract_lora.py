"""Write the adapter that is nearest to the difference of two checkpoints.

python tools/extract_lora.py base.safetensors tuned.safetensors lora.safetensors --rank 32
python tools/extract_lora.py base tuned lora.safetensors --rank auto:sv_fro=0.9,max=64 --dtype fp16

docs/export.md explains the options and what is lost.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lowrank.cli.run import run

if __name__ == "__main__":
    run("extraction")
