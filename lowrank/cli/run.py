"""How a script runs: its main by name, an exit code, and one sentence where something is wrong."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import NoReturn

from lowrank.errors import Refused


def run(name: str, main: str = "main") -> NoReturn:
    """Run `lowrank.cli.<name>.<main>`; a `Refused` becomes one sentence on stderr and exit code 1.

    Tracebacks are for our bugs. Libraries stay silent about parts that are not used here: torchvision, and
    CPU kernels of 4-bit formats.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        code = getattr(importlib.import_module(f"lowrank.cli.{name}"), main)(None)
    except Refused as refused:
        said = "".join(c if c.isprintable() else " " for c in str(refused))  # it may quote a stranger's file
        print(f"error: {said}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("stopped by the keyboard; files already written are whole", file=sys.stderr)
        code = 130
    sys.exit(code)
