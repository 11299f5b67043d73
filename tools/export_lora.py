"""Write an adapter as a file of another program, and have that program read it back.

python tools/export_lora.py in.safetensors out.safetensors                      kohya's keys: every interface
python tools/export_lora.py in.safetensors out.safetensors --to diffusers --dtype fp16
python tools/export_lora.py in.safetensors folder --to peft
python tools/export_lora.py in.safetensors out.safetensors --to merged --model sdxl.safetensors

docs/export.md says what each format holds; docs/compatibility.md what is exact.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lowrank.cli.run import run

if __name__ == "__main__":
    run("export")
