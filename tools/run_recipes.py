"""Run recipes of tools/recipes.py in one process: a fresh interpreter for each would cost eight seconds.

    python tools/run_recipes.py TREE WORK [NAME…]

TREE is a checkout, also of another commit: its scripts are run by path, with the tree first on sys.path. This
file imports nothing from lowrank. Each recipe leaves `run.json` (exit code, seconds, key) and `output.txt` in
its folder. A recipe is run again only if its command line, its inputs or a recipe that it reads has changed.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import inspect
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.recipes import Recipe

RESULT, OUTPUT, PRINTED = "run.json", "output.txt", "printed.json"
FAILED, INTERRUPTED = 70, 130  # exit codes: an exception that no script caught, and Ctrl-C
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
ASSETS = ("demo", "sty", "cnt")  # the folders of assets/ that recipes read


def write_data(root: Path, work: Path) -> None:
    """Make `data` (pictures, captions, masks, a dataset file) and link `assets` in the work folder."""
    assets = work / "assets"
    if not assets.exists() or assets.resolve() != (root / "assets").resolve():
        assets.unlink(missing_ok=True)  # of a tree that was removed
        assets.symlink_to(root / "assets")
    data = work / "data"
    if data.exists():
        return
    part = work / f"data.{os.getpid()}.part"
    _write_pictures(root, part)
    listed = {f"{index}": {"caption": f"cat {index}", "tags": "a, b"} for index in range(3)}
    (part / "listed.json").write_text(json.dumps(listed))
    (part / "dataset.toml").write_text(
        "[general]\nenable_bucket = true\nbucket_reso_steps = 32\nmin_bucket_reso = 32\n\n"
        "[[datasets]]\nresolution = 64\nbatch_size = 2\n\n[[datasets.subsets]]\n"
        'image_dir = "data/listed"\nmetadata_file = "data/listed.json"\n'
        "num_repeats = 2\nshuffle_caption = true\n"
    )
    (part / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\na dog --w 64 --h 64 --s 2 --d 2\n")
    part.rename(data)


def _write_pictures(root: Path, data: Path) -> None:
    from PIL import Image

    for folder in ("train/2_cat", "reg/1_animal", "masks", "alpha/1_cat", "source", "class", "listed"):
        (data / folder).mkdir(parents=True)
    cat = Image.open(root / "assets/sty/cat/sty_cat.png").convert("RGB")
    dog = Image.open(root / "assets/cnt/dog/cnt_dog.png").convert("RGB")
    for index, (picture, size) in enumerate([(cat, (64, 64)), (dog, (96, 64)), (cat.rotate(90), (64, 96))]):
        resized = picture.resize(size)
        for folder in ("train/2_cat", "source", "listed"):
            resized.save(data / folder / f"{index}.png")
        for folder in ("train/2_cat", "source"):
            caption = f"a <s> cat, number {index}, (sitting:1.2), outside"
            (data / folder / f"{index}.caption").write_text(caption)
        mask = Image.new("L", size, 255)
        mask.paste(60 * index, (0, 0, size[0] // 2, size[1]))
        mask.convert("RGB").save(data / "masks" / f"{index}.png")
        resized.putalpha(mask)
        resized.save(data / "alpha/1_cat" / f"{index}.png")
    for index in range(2):
        dog.resize((64, 64)).rotate(180 * index).save(data / "reg/1_animal" / f"{index}.png")
        dog.resize((64, 64)).rotate(90 * index).save(data / "class" / f"{index}.png")


def inputs_key(root: Path) -> str:
    """A hash of what recipes read: the functions that write `data`, and the files of assets/ except pages."""
    digest = hashlib.sha256((inspect.getsource(write_data) + inspect.getsource(_write_pictures)).encode())
    for folder in ASSETS:
        for path in sorted((root / "assets" / folder).rglob("*")):
            if path.is_file() and path.suffix != ".md":
                digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def recipe_keys(recipes: dict[str, Recipe], inputs: str) -> dict[str, str]:
    """A hash for each recipe, of its command line, the inputs and the recipes whose output it reads."""
    keys: dict[str, str] = {}
    for name, recipe in recipes.items():  # each stands after those that it needs
        facts = [inputs, name, recipe.script, *recipe.words, *(keys[needed] for needed in recipe.needs)]
        keys[name] = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    return keys


def read_result(folder: Path) -> dict[str, Any]:
    """The exit code, seconds and key of a recipe's output folder; empty if the recipe has not been run."""
    path = folder / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def missing(recipes: dict[str, Recipe], work: Path, keys: dict[str, str]) -> dict[str, Recipe]:
    """The recipes that have no result in the work folder, or one of another command line or input."""
    return {
        name: recipe for name, recipe in recipes.items() if read_result(work / name).get("key") != keys[name]
    }


def unexpected(recipe: Recipe, code: int | None) -> bool:
    """Whether a recipe ended otherwise than it should: a refusal is an exit code, never an exception."""
    return code is None or code == FAILED or bool(code) != recipe.refused


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


def run(tree: Path, work: Path, recipe: Recipe, key: str = "") -> int:
    """Run one recipe with the tree's scripts in the work folder; the exit code of the script."""
    output, lines = work / recipe.name, io.StringIO()
    shutil.rmtree(output, ignore_errors=True)  # of a run that was interrupted, or of another command line
    output.mkdir(parents=True)
    notes = io.StringIO() if recipe.printed else lines
    started = time.monotonic()
    with restored(work), contextlib.redirect_stdout(lines), contextlib.redirect_stderr(notes):
        sys.argv, sys.path[:0] = [recipe.script, *recipe.words], [str(tree)]
        try:
            runpy.run_path(str(tree / recipe.script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:  # an exception of any kind is a result here, and stands in the output
            traceback.print_exc()
            code = FAILED
    printed = lines.getvalue()
    (output / OUTPUT).write_text(printed + (notes.getvalue() if recipe.printed else ""), encoding="utf-8")
    if recipe.printed:
        (output / PRINTED).write_text(printed, encoding="utf-8")
    if code != INTERRUPTED:  # an unfinished run is not a result
        seconds = round(time.monotonic() - started, 3)
        result = {"code": code, "seconds": seconds, "key": key}
        (output / RESULT).write_text(json.dumps(result), encoding="utf-8")
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
    every = recipes.every()
    keys = recipe_keys(every, inputs_key(root))
    chosen = {name: recipe for name, recipe in every.items() if not words[2:] or name in words[2:]}
    work.mkdir(parents=True, exist_ok=True)
    write_data(root, work)
    for name, recipe in missing(chosen, work, keys).items():
        code = run(tree, work, recipe, keys[name])
        if code == INTERRUPTED:
            return code
        if unexpected(recipe, code):
            print(f"{name}: exit code {code}, see {work / name / OUTPUT}", file=sys.stderr, flush=True)
    loaded = getattr(sys.modules.get("lowrank"), "__file__", None)
    if loaded and not Path(loaded).is_relative_to(tree):
        print(f"error: lowrank was imported from {loaded} and not from {tree}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
