"""Write another program's adapter as a native file, which every tool here then takes.

python tools/import_lora.py kohya.safetensors native.safetensors
python tools/import_lora.py peft_folder native.safetensors
python tools/import_lora.py lora.safetensors delta_r.safetensors --method delta_r --model FLUX.1-dev --rank 64

A LoRA becomes ΔR by projection onto the basis of a base model, and what that loses is said. docs/export.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lowrank.cli.run import run

if __name__ == "__main__":
    run("importing")
