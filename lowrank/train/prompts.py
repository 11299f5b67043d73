"""What to draw while training: one validation prompt, or kohya's prompt file (txt, toml, json)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowrank.errors import Refused, nearest
from lowrank.files import parse_toml


@dataclass(frozen=True)
class Prompt:
    """One picture to draw; sizes in pixels, `scale` is CFG's guidance, `guidance` FLUX's distilled one."""

    prompt: str
    negative_prompt: str | None = None
    width: int = 512
    height: int = 512
    sample_steps: int = 20
    scale: float = 1.0
    guidance_scale: float = 3.5
    seed: int | None = None


# kohya's one-letter options of a prompt line
_LETTERS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "sample_steps",
    "l": "scale",
    "g": "guidance_scale",
}
_OTHERS = ("ss", "cn", "ctr", "rcfg", "fs")  # of other models or samplers: refused by name
_KINDS = {
    "width": int,
    "height": int,
    "sample_steps": int,
    "seed": int,
    "scale": float,
    "guidance_scale": float,
    "prompt": str,
    "negative_prompt": str,
}


def _checked(where: str, values: dict[str, Any], default: Prompt) -> Prompt:
    read = {}
    for key, value in values.items():
        if key not in _KINDS:
            raise Refused(
                f"{where} has the unknown key {key!r}{nearest(key, _KINDS)}; known: {', '.join(_KINDS)}"
            )
        try:
            read[key] = _KINDS[key](value)
        except (TypeError, ValueError) as error:
            raise Refused(f"{where}: {key} {value!r} is not a {_KINDS[key].__name__}") from error
    prompt = replace(default, **read)
    if min(prompt.width, prompt.height) < 16 or not 1 <= prompt.sample_steps <= 1000:
        raise Refused(
            f"{where} asks for {prompt.width}×{prompt.height} in {prompt.sample_steps} steps; sides are at "
            "least 16 and steps 1 to 1000"
        )
    return replace(prompt, width=prompt.width // 16 * 16, height=prompt.height // 16 * 16)


def parse_line(line: str, default: Prompt, where: str = "the prompt") -> Prompt:
    """`a cat --n blurry --w 512 --h 768 --d 1 --s 28 --g 3.5`; letters in either case. Raises `Refused`."""
    parts = re.split(r"\s--(?=[A-Za-z])", " " + line)
    values: dict[str, Any] = {"prompt": parts[0].strip()}
    for part in parts[1:]:
        letter, _, value = part.partition(" ")
        name = _LETTERS.get(letter.lower())
        if name is None:
            known = " ".join(f"--{letter}" for letter in _LETTERS)
            why = "is not for FLUX" if letter.lower() in _OTHERS else "is unknown"
            raise Refused(f"{where}: option --{letter} {why}; a prompt line knows {known}")
        values[name] = value.strip()
    return _checked(where, values, default)


def read_prompts(path: str | Path, default: Prompt) -> list[Prompt]:
    """The prompts of a file. `.txt`: a prompt per line, `#` comments. `.toml`: `[prompt]` defaults and
    `[[prompt.subset]]`. `.json`: a list of lines or objects. Raises `Refused` naming file and entry."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"--sample_prompts {path} cannot be read: {error}") from error
    if path.suffix == ".txt":
        lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1)]
        found = [
            parse_line(line, default, f"{path} line {i}")
            for i, line in lines
            if line and not line.startswith("#")
        ]
    elif path.suffix == ".toml":
        table = parse_toml(text, path).get("prompt", {})
        shared = {key: value for key, value in table.items() if key != "subset"}
        found = [
            _checked(f"{path} subset {i}", {**shared, **subset}, default)
            for i, subset in enumerate(table.get("subset", [{}]))
        ]
    elif path.suffix == ".json":
        try:
            entries = json.loads(text)
        except ValueError as error:
            raise Refused(f"{path} is not JSON: {error}") from error
        found = [
            parse_line(entry, default, f"{path} entry {i}")
            if isinstance(entry, str)
            else _checked(f"{path} entry {i}", {k: v for k, v in entry.items() if k != "enum"}, default)
            for i, entry in enumerate(entries)
        ]
    else:
        raise Refused(f"--sample_prompts {path} is neither .txt, .toml nor .json; save it as one of them")
    if not found or not all(prompt.prompt for prompt in found):
        raise Refused(f"--sample_prompts {path} holds an empty prompt or none; write a prompt per line")
    return found
