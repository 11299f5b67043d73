"""The file of --config_file: TOML or JSON whose keys are flags; all its problems are found in one reading."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lowrank.config import gui
from lowrank.config.flag import FlagSpec
from lowrank.config.parser import GivenValue, off
from lowrank.errors import Refused, nearest
from lowrank.files import CONFIG, parse_json, parse_toml, read_text


@dataclasses.dataclass
class Config:
    """What a file holds: values of flags, keys without effect or of an interface, unknown keys, problems."""

    path: Path
    values: list[GivenValue] = dataclasses.field(default_factory=list)
    ignored: list[str] = dataclasses.field(default_factory=list)
    interface: list[str] = dataclasses.field(default_factory=list)
    unknown: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    words: list[str] = dataclasses.field(default_factory=list)  # flags as on a command line


def config_path(text: str) -> Path:
    """The path of a --config_file, whose ending .toml may be left out."""
    return Path(text if text.endswith((".toml", ".json")) else f"{text}.toml")


def read_config(
    path: Path,
    specs: Mapping[str, FlagSpec],
    ignored: Collection[str],
    refused: Mapping[str, str],
    family: str,
) -> Config:
    """Read every key of a file. Raises `Refused` only for a file that cannot be read.

    `specs` are the flags by every name that they have. An empty text is an unset flag, as in kohya_ss' files.
    """
    config = Config(path)
    keys = _read(path, {name for name, spec in specs.items() if spec.many})
    if path.suffix == ".json" and gui.is_interface_json(keys):
        translated = gui.translate(keys, family)
        keys = translated.values
        config.interface += translated.unused
        config.problems += translated.problems
        config.words += translated.words
    for key, value in keys.items():
        if value == "" and (key not in specs or key in refused):
            config.ignored.append(key)
        elif value == "":
            continue
        elif key in refused and off(value):  # interfaces write every setting, also those that are off
            config.ignored.append(key)
        elif key in refused:
            config.problems.append(f"{key} is not supported: {refused[key]}")
        elif key in specs:
            _add(config, specs[key], key, value)
        elif key in ignored:
            config.ignored += [] if off(value) else [key]
        elif gui.is_own_key(key):
            config.interface.append(key)
        else:
            config.unknown.append(key)
    return config


def unknown_keys(config: Config, names: Collection[str]) -> list[str]:
    """The problems of unknown keys."""
    return [
        f"unknown key {key!r}{nearest(key, names)}; correct or remove it, or give --allow_unknown_config_keys"
        for key in config.unknown
    ]


def _add(config: Config, spec: FlagSpec, key: str, value: object) -> None:
    label = f"{key} in {config.path}"
    try:
        read = spec.from_toml(value)
        if not (spec.flag.off_at_zero and read == 0):
            spec.check_range(key, read)
    except Refused as error:
        text = str(error)
        config.problems.append(text if text.startswith(f"{key} ") else f"{key}: {text}")
    else:
        config.values.append(GivenValue(spec, label, read))


def _read(path: Path, lists: Collection[str]) -> dict[str, Any]:
    """Keys and values of a file; tables of the first level are flattened, but those named as `lists`."""
    label = f"--config_file {path}"
    text = read_text(path, "--config_file", CONFIG)
    table = parse_json(text, label) if path.suffix == ".json" else parse_toml(text, label)
    if not isinstance(table, dict):
        raise Refused(f'{label} is not a JSON object; write {{"learning_rate": 1e-4, …}}')
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= value if isinstance(value, dict) and key not in lists else {key: value}
    return flat
