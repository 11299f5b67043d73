"""How a script ends: an exit code, and one sentence where something is wrong."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from lowrank.errors import Refused

# Said at import by libraries about what we do not use (torchvision, CPU kernels of 4-bit formats).
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def run(main: Callable[[list[str] | None], int]) -> NoReturn:
    """Run a script's main: a `Refused` becomes one sentence on stderr and exit code 1; tracebacks are for our bugs."""
    try:
        code = main(None)
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("stopped by the keyboard; files already written are whole", file=sys.stderr)
        code = 130
    sys.exit(code)
