"""Run recipes of tools/recipes.py in one process: a fresh interpreter for each would cost eight seconds.

    python tools/run_recipes.py TREE WORK [NAME…]

TREE is a checkout, also of another commit: its scripts are run by path, with the tree first on sys.path. This
file imports nothing from lowrank. Each recipe leaves `run.json` (exit code, seconds) and `output.txt` in its
folder. A recipe with a `run.json` is not run again.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
import random
import runpy
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

RESULT, OUTPUT, PRINTED = "run.json", "output.txt", "printed.json"
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "ACCELERATE_USE_CPU": "true",
    "MPLBACKEND": "Agg",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "SOURCE_DATE_EPOCH": "0",
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextlib.contextmanager
def restored(work: Path) -> Iterator[None]:
    """The work folder as current folder; afterwards, what a script may have changed in the process."""
    import numpy
    import torch

    folder, words, path = os.getcwd(), list(sys.argv), list(sys.path)
    environment, dtype = dict(os.environ), torch.get_default_dtype()
    handlers = {name: signal.getsignal(name) for name in SIGNALS}
    log = logging.getLogger()
    listeners, level = list(log.handlers), log.level
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    os.environ.update(ENVIRONMENT | {"LOWRANK_CACHE": str(work / "cache")})
    os.chdir(work)
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.chdir(folder)
        sys.argv, sys.path[:] = words, path
        os.environ.clear()
        os.environ.update(environment)
        torch.set_default_dtype(dtype)
        for name, handler in handlers.items():
            signal.signal(name, handler)
        log.handlers[:] = listeners
        log.setLevel(level)
        _forget_accelerate()
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        gc.collect()


def _forget_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def run(tree: Path, work: Path, name: str, script: str, words: tuple[str, ...], printed: bool = False) -> int:
    """Run a script of the tree in the work folder; the exit code, or 70 for an exception."""
    output, lines = work / name, io.StringIO()
    shutil.rmtree(output, ignore_errors=True)  # of a run that was interrupted
    output.mkdir(parents=True)
    notes = lines if not printed else io.StringIO()
    started = time.monotonic()
    with restored(work), contextlib.redirect_stdout(lines), contextlib.redirect_stderr(notes):
        sys.argv, sys.path[:0] = [script, *words], [str(tree)]
        try:
            runpy.run_path(str(tree / script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:  # an exception of any kind is a result here, and stands in the output
            traceback.print_exc()
            code = 70
    (output / OUTPUT).write_text(lines.getvalue() + (notes.getvalue() if printed else ""), encoding="utf-8")
    if printed:
        (output / PRINTED).write_text(lines.getvalue(), encoding="utf-8")
    seconds = round(time.monotonic() - started, 3)
    (output / RESULT).write_text(json.dumps({"code": code, "seconds": seconds}))
    return code


def main(words: list[str]) -> int:
    """Run the named recipes, or all of them, in their order."""
    root = Path(__file__).resolve().parent.parent
    sys.path[0] = str(root)
    from tools import recipes

    for module in [name for name in sys.modules if name.split(".")[0] == "tools"]:
        del sys.modules[module]  # the tree has a `tools` of its own
    tree, work = Path(words[0]).resolve(), Path(words[1]).resolve()
    sys.path[0] = str(tree)
    sys.dont_write_bytecode = True
    os.environ.update(ENVIRONMENT)
    chosen = {name: recipe for name, recipe in recipes.every().items() if not words[2:] or name in words[2:]}
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "data").exists():
        recipes.write_data(root, work)
    for name, recipe in chosen.items():
        if not (work / name / RESULT).exists():
            code = run(tree, work, name, recipe.script, recipe.words, recipe.printed)
            if code == 130:  # interrupted: an unfinished run is not a result, and is run again
                (work / name / RESULT).unlink()
                return code
            if bool(code) != recipe.refused:
                print(f"{name}: exit code {code}, see {work / name / OUTPUT}", file=sys.stderr, flush=True)
    loaded = getattr(sys.modules.get("lowrank"), "__file__", None)
    if loaded and not Path(loaded).is_relative_to(tree):
        print(f"error: lowrank was imported from {loaded} and not from {tree}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
