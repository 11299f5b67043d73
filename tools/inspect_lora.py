"""Say what an adapter file is: method, ranks, targets, training, base, the command that made it, norms.

python tools/inspect_lora.py FILE…            anyone's LoRA file; nothing in it is run
python tools/inspect_lora.py FILE --json
python tools/inspect_lora.py ONE OTHER        and what differs between the two
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lowrank.cli.run import run

if __name__ == "__main__":
    run("inspection")
