"""Run the main of a script by name: one sentence for an error of the user, and an exit code."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import NoReturn

from lowrank.errors import Refused, SeveralRefused, shortened

# Scripts whose main imports torch at once: their command line is parsed before, so that help and errors in
# flags come without waiting for torch.
_LINES = {
    "context": ("context", "CALC_CONTEXT"),
    "merge": ("merge", "INFERENCE_MERGE"),
    "residual": ("tools", "SAVE_RESIDUAL"),
    "similarity": ("tools", "VISUALIZE_SIMILARITY"),
}


def _printable(text: str) -> str:
    """The text with blanks for characters that a terminal could act on: it may quote a stranger's file."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def run(name: str, main: str = "main") -> NoReturn:
    """Run `lowrank.cli.<name>.<main>`; a `Refused` becomes one sentence on stderr and exit code 1.

    An error of the operating system becomes a sentence too; tracebacks are for our bugs. Libraries stay
    silent about parts that are not used here: torchvision, and CPU kernels of 4-bit formats.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if name in _LINES:
            module, line = _LINES[name]
            getattr(importlib.import_module(f"lowrank.config.{module}"), line).parse()
        code = getattr(importlib.import_module(f"lowrank.cli.{name}"), main)(None)
    except SeveralRefused as refused:
        print(f"error: {_printable(refused.title)}:", file=sys.stderr)
        for number, reason in enumerate(refused.reasons, 1):
            print(f"  {number}. {_printable(reason)}", file=sys.stderr)
        code = 1
    except Refused as refused:
        print(f"error: {_printable(str(refused))}", file=sys.stderr)
        code = 1
    except OSError as error:  # of the system: a disk, a network, a permission
        print(f"error: {shortened(str(error))}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("stopped by the keyboard; files already written are whole", file=sys.stderr)
        code = 130
    sys.exit(code)
