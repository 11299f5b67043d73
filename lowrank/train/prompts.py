"""What to draw while training: one validation prompt, or kohya's prompt file (txt, toml, json)."""

from __future__ import annotations

import contextlib
import logging
import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowrank.config.flag import SEEDS
from lowrank.errors import Refused, nearest
from lowrank.files import parse_json, parse_toml, read_text
from lowrank.models.family import Family

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One picture to draw; sizes in pixels, `scale` is CFG's, `guidance_scale` FLUX's distilled one."""

    prompt: str
    negative_prompt: str | None = None
    width: int = 512
    height: int = 512
    sample_steps: int = 20
    scale: float = 1.0
    guidance_scale: float | None = 3.5  # None: the family has none
    seed: int | None = None
    sample_sampler: str | None = None  # None: the run's, or the family's only one


def prompt_of(family: Family) -> Prompt:
    """What a prompt leaves open, as the family's pictures are drawn."""
    drawing = family.drawing
    return Prompt("", sample_steps=drawing.steps, scale=drawing.scale, guidance_scale=drawing.guidance)


# kohya's one-letter options of a prompt line
_LETTERS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "sample_steps",
    "l": "scale",
    "g": "guidance_scale",
    "ss": "sample_sampler",
}
_KINDS = {
    "width": int,
    "height": int,
    "sample_steps": int,
    "seed": int,
    "scale": float,
    "guidance_scale": float,
    "prompt": str,
    "negative_prompt": str,
    "sample_sampler": str,
}
_LIMITS = {
    "width": (16, 16384),
    "height": (16, 16384),
    "sample_steps": (1, 1000),
    "seed": (0, SEEDS),
    "scale": (0, 1e6),
    "guidance_scale": (0, 1e6),
}


def _value(where: str, key: str, value: Any) -> Any:
    """A value of a line (a text), of TOML or of JSON as the kind that `key` has, within its limits.

    As in kohya's scripts, a number is cut to a whole one and to its limits, and other words count as unset
    (None); the log names what was changed.
    """
    kind, number = _KINDS[key], None
    if kind is str:
        return value if isinstance(value, str) else None
    for read in (int, float):
        if number is None and not isinstance(value, bool):
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                number = read(value) if isinstance(value, str) or read is float else operator.index(value)
    if number is None or (isinstance(number, float) and not math.isfinite(number)):
        log.warning("%s: %s %r is not a number and is left out", where, key, value)
        return None
    low, high = _LIMITS[key]
    used = kind(min(max(number, low), high))
    if used != number:
        log.warning("%s: %s %s becomes %s", where, key, value, used)
    return used


def _checked(where: str, values: dict[str, Any], default: Prompt, step: int) -> Prompt:
    for key in values.keys() - _KINDS.keys():
        log.warning("%s: %s is unknown here and is left out%s", where, key, nearest(key, _KINDS))
    read = {key: _value(where, key, value) for key, value in values.items() if key in _KINDS}
    return rounded(replace(default, **{key: value for key, value in read.items() if value is not None}), step)


def rounded(prompt: Prompt, step: int) -> Prompt:
    """The prompt with its sides rounded down to multiples of `step`, at least one."""
    width, height = (max(step, side // step * step) for side in (prompt.width, prompt.height))
    return replace(prompt, width=width, height=height)


def parse_line(line: str, default: Prompt, where: str = "the prompt", step: int = 16) -> Prompt:
    """`a cat --n blurry --w 512 --h 768 --d 1 --s 28 --l 7.5 --ss euler_a`; letters in either case.

    `default` is what a line leaves open; sides are multiples of `step`. Options that are unknown are logged.
    """
    parts = re.split(r"\s--(?=[A-Za-z])", " " + line)
    values: dict[str, Any] = {"prompt": parts[0].strip()}
    for part in parts[1:]:
        letter, _, value = part.partition(" ")
        values[_LETTERS.get(letter.lower(), f"--{letter}")] = value.strip()
    return _checked(where, values, default, step)


def read_prompts(
    path: str | Path, default: Prompt, step: int = 16, flag: str = "--sample_prompts"
) -> list[Prompt]:
    """The prompts of a file. `.txt`: a prompt per line, `#` comments. `.toml`: `[prompt]` defaults and
    `[[prompt.subset]]`. `.json`: a list of lines or objects. Raises `Refused` naming file and entry."""
    path = Path(path)
    text = read_text(path, flag, utf16=True)
    if path.suffix == ".txt":
        lines = [(f"{path} line {i}", line.strip()) for i, line in enumerate(text.splitlines(), 1)]
        entries: list[tuple[str, Any]] = [(where, line) for where, line in lines if line and line[0] != "#"]
    elif path.suffix == ".toml":
        entries = _toml_entries(path, text)
    elif path.suffix == ".json":
        entries = _json_entries(path, text)
    else:
        raise Refused(f"{flag} {path} is neither .txt, .toml nor .json; save it as one of them")
    prompts = [
        parse_line(entry, default, where, step)
        if isinstance(entry, str)
        else _checked(where, entry, default, step)
        for where, entry in entries
    ]
    if not prompts and path.suffix == ".txt":  # some launchers write the file always
        log.warning("%s %s is empty: nothing is drawn", flag, path)
        return []
    if not prompts or not all(prompt.prompt for prompt in prompts):
        raise Refused(f"{flag} {path} holds an empty prompt or none; write a prompt per line")
    return prompts


def parse_lines(lines: Sequence[str], default: Prompt, step: int = 16) -> list[Prompt]:
    """The prompts of --sample_prompt_lines."""
    named = ((f"--sample_prompt_lines {i}", line) for i, line in enumerate(lines, 1) if line.strip())
    return [parse_line(line, default, where, step) for where, line in named]


def _toml_entries(path: Path, text: str) -> list[tuple[str, Any]]:
    table = parse_toml(text, path).get("prompt", {})
    subsets = table.get("subset", [{}]) if isinstance(table, dict) else None
    if not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets):
        raise Refused(f"{path} is not of the form [prompt] with a [[prompt.subset]] table for each prompt")
    shared = {key: value for key, value in table.items() if key != "subset"}
    return [(f"{path} subset {i}", {**shared, **subset}) for i, subset in enumerate(subsets)]


def _json_entries(path: Path, text: str) -> list[tuple[str, Any]]:
    entries = parse_json(text, path)
    if not isinstance(entries, list) or not all(isinstance(entry, (str, dict)) for entry in entries):
        raise Refused(f'{path} is not a list of prompt lines, or of objects like {{"prompt": "a cat"}}')
    for entry in entries:
        if isinstance(entry, dict):
            entry.pop("enum", None)  # kohya's own numbering
    return [(f"{path} entry {i}", entry) for i, entry in enumerate(entries)]
