"""Count the files that answer a question: which files of this repository run between two events.

    python tools/trace_files.py                 every question, as a table
    python tools/trace_files.py step --show     one question, with the files and how many functions each ran

Questions:
    step    one training step
    live    from a LoRA file to live layers
    export  from a LoRA file to the written file of another program, without verifying it
    flag    from the command line to where a flag acts: files with a function that holds its value, or a
            record or table that has it, and the file that declares it; the worst of FLAGS counts
The models are the tiny ones of tools/make_tiny_sd.py, made in a temporary folder. The exit code is 1 if a
count is above its limit in LIMITS. A change that lowers a count lowers the limit too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import runpy
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]


class Limit(NamedTuple):
    """How many files may answer a question."""

    present: int
    """the count of today, which tests/tools/test_trace_files.py does not let grow"""
    target: int


# The target of `live`: kohya's networks/lora.py is one file for one method and one spelling of keys. Here 4
# files read a file of any spelling (adapter_file, keys, tensors, files), 3 fit it to a model (network_module,
# arguments, dialect), and 6 are the network itself (network, layer, clock, targets, method, the page).
LIMITS = {
    "step": Limit(present=17, target=18),  # with requests: SAVE and STOP
    "live": Limit(present=14, target=13),
    "export": Limit(present=18, target=8),  # with naming/families: every layer is one of the model's
    "flag": Limit(present=11, target=5),
}
CODE = (str(ROOT / "lowrank") + "/", str(ROOT / "networks") + "/")
# Flags that `flag` follows, with a value that no other number of a run equals.
FLAGS = {
    "noise_offset": 0.4321,
    "caption_tag_dropout_rate": 0.4322,
    "save_every_n_steps": 765432,
    "rank_dropout": 0.4324,
}


@contextlib.contextmanager
def traced(note: Callable[[FrameType], None]) -> Iterator[None]:
    """Call `note` with each frame of this repository's product code when a function begins or returns."""

    def profile(frame: FrameType, event: str, _argument: Any) -> None:
        if event in ("call", "return") and frame.f_code.co_filename.startswith(CODE):
            note(frame)

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


class Files:
    """How many different functions ran in each file; import-time code does not count."""

    def __init__(self) -> None:
        self._functions: set[tuple[str, str, int]] = set()
        self.active = True

    def note(self, frame: FrameType) -> None:
        code = frame.f_code
        if self.active and code.co_name not in ("<module>", "__annotate__") and not _is_class_body(frame):
            self._functions.add((code.co_filename, code.co_name, code.co_firstlineno))

    def count(self) -> Counter[str]:
        return Counter(str(Path(file).relative_to(ROOT)) for file, _, _ in self._functions)


def _is_class_body(frame: FrameType) -> bool:
    return "__module__" in frame.f_locals and "__qualname__" in frame.f_locals


def run_script(script: str, *arguments: object) -> None:
    """Run a script of the repository in this process. Raises SystemExit with its code unless that is 0."""
    before = sys.argv
    sys.argv = [script, *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise
    finally:
        sys.argv = before


def training(folder: Path, model: Path, *flags: object) -> list[object]:
    """The command line of a short LoRA training of the U-Net on one picture."""
    from PIL import Image

    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64), (200, 120, 40)).save(pictures / "0.png")
    (pictures / "0.txt").write_text("a cat, sitting", encoding="utf-8")
    return [
        *(
            "--pretrained_model_name_or_path",
            model,
            "--instance_data_dir",
            pictures,
            "--instance_prompt",
            "a cat",
        ),
        *(
            "--resolution",
            "64",
            "--network_module",
            "networks.lora",
            "--network_dim",
            "4",
            "--network_train_unet_only",
        ),
        *("--cache_latents", "--seed", "0", "--output_dir", folder / "run"),
        *("--output_name", "cat", *flags),
    ]


def step(folder: Path, model: Path) -> Counter[str]:
    """Files that run from the end of the first optimizer step to the end of the second."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    files, steps = Files(), Counter[str]()
    files.active = False

    def after_step(*_: Any) -> None:
        steps["done"] += 1
        files.active = steps["done"] == 1

    hook = register_optimizer_step_post_hook(after_step)
    try:
        with traced(files.note):
            run_script("train_network_ABM.py", *training(folder, model, "--max_train_steps", 3))
    finally:
        hook.remove()
    return files.count()


def trained(folder: Path, model: Path) -> Path:
    """A LoRA file of the tiny model, trained for one step if it is not there yet."""
    file = folder / "run" / "cat.safetensors"
    if not file.exists():
        run_script("train_network_ABM.py", *training(folder, model, "--max_train_steps", 1))
    return file


def live(folder: Path, model: Path) -> Counter[str]:
    """Files that run from a LoRA file to its layers on a U-Net, through kohya's three calls."""
    import importlib

    from diffusers import UNet2DConditionModel

    file, unet = trained(folder, model), UNet2DConditionModel.from_pretrained(model / "unet")
    lora: Any = importlib.import_module("networks.lora")
    files = Files()
    with traced(files.note):
        network, state = lora.create_network_from_weights(1.0, str(file), None, [], unet)
        network.apply_to([], unet, False, True)
        network.load_weights(str(file))
    assert state and network.layers()
    return files.count()


def export(folder: Path, model: Path) -> Counter[str]:
    """Files that run from reading a LoRA file to renaming the finished file of kohya's format."""
    file, target, files = trained(folder, model), folder / "kohya.safetensors", Files()
    files.active, tensors = False, str(ROOT / "lowrank" / "tensors.py")
    exporting = ["until the file is written"]

    def note(frame: FrameType) -> None:
        files.active = bool(exporting) and (files.active or frame.f_code.co_filename == tensors)
        files.note(frame)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        # the finished file is renamed in a folder beside the target, where it is then verified
        if exporting and event == "os.rename" and Path(str(arguments[1])).name == target.name:
            exporting.clear()

    sys.addaudithook(audit)  # it stays until the process ends
    with traced(note):
        run_script("tools/export_lora.py", file, target, "--to", "kohya")
    return files.count()


def flag(folder: Path, model: Path) -> Counter[str]:
    """Files that hold the value of the flag that passes through most files, and the declaring file."""
    holders: dict[str, set[tuple[str, str]]] = {name: set() for name in FLAGS}

    def note(frame: FrameType) -> None:
        local = list(frame.f_locals.values())
        for name, value in FLAGS.items():
            if any(_holds(variable, name, value) for variable in local):
                holders[name].add((frame.f_code.co_filename, frame.f_code.co_name))

    network = ("--network_args", f"rank_dropout={FLAGS['rank_dropout']}")
    given = [word for name, value in FLAGS.items() if name != "rank_dropout" for word in (f"--{name}", value)]
    with traced(note):
        run_script("train_network_ABM.py", *training(folder, model, "--max_train_steps", 2, *given, *network))
    for name, places in holders.items():
        places |= {(str(file), "declaration") for file in _declarations(name)}
    worst = max(holders.values(), key=lambda places: len({file for file, _ in places}))
    return Counter(str(Path(file).relative_to(ROOT)) for file, _ in worst)


def _holds(variable: object, name: str, value: float) -> bool:
    """Whether a variable is the value, its text, or a record or table that has it under the flag's name."""
    if isinstance(variable, (int, float, str)):
        return str(variable) == str(value)
    if isinstance(variable, dict):
        return str(variable.get(name)) == str(value)
    return dataclasses.is_dataclass(variable) and str(getattr(variable, name, None)) == str(value)


def _declarations(name: str) -> list[Path]:
    """Files of the product with a dataclass field of this name that is declared as an option."""
    pattern = re.compile(rf"^    {name}: .*= (option|path|field)\(", re.MULTILINE)
    return [
        file for file in (ROOT / "lowrank").rglob("*.py") if pattern.search(file.read_text(encoding="utf-8"))
    ]


QUESTIONS = {"step": step, "live": live, "export": export, "flag": flag}


def measure(names: list[str]) -> dict[str, Counter[str]]:
    """Functions by file for each question, each asked in a folder of its own."""
    from tools import make_tiny_sd

    with tempfile.TemporaryDirectory() as parent:
        model = Path(make_tiny_sd.make(Path(parent) / "model", "sd15"))
        counts = {}
        for name in names:
            folder = Path(parent) / name
            folder.mkdir()
            counts[name] = QUESTIONS[name](folder, model)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "question", nargs="*", choices=[*QUESTIONS, []], help="questions to ask (default: all)"
    )
    parser.add_argument("--show", action="store_true", help="print the files of each question")
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # the scripts' own lines
        counts = measure(arguments.question or list(QUESTIONS))
    for name, files in counts.items():
        present, target = LIMITS[name]
        limits = f"(limit {present:2}, target {target:2})"
        print(f"{name:8} {len(files):3} files {limits}  {sum(files.values()):4} functions")
        for file, functions in sorted(files.items()) if arguments.show else ():
            print(f"    {functions:4}  {file}")
    return int(any(len(files) > LIMITS[name].present for name, files in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
