"""argv and TOML to frozen dataclasses, checked once.

A group of flags is a frozen dataclass whose fields are the flags: `rank: int = option(4, "what it does")`.
A `CommandLine` is one script's command line: its groups, its own defaults, and what becomes of the flags that
other trainers have and it has not. Values come from the fields' defaults, then the surface's, then
`--config_file`, then the command line.

What argparse itself would complain about (an unknown flag, a word where a number belongs) ends with one line
and exit code 2, like argparse; everything else that a user can put right is `Refused`.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lowrank.config.flag import FlagSpec, GivenValue, Parser, off, option, pairs, specs
from lowrank.errors import Refused, nearest
from lowrank.files import atomic, parse_toml

__all__ = ["CommandLine", "ConfigFile", "Parsed", "option", "pairs", "parse"]

_NUMBERS = re.compile(r"-[\d.][\d.,eE+-]*")


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """Configuration file"""

    config_file: str | None = option(
        None, "TOML file whose keys are flags; sections are for the eye, '.toml' may be left out", saved=False
    )
    output_config: bool = option(False, "write the given flags to --config_file and exit", saved=False)
    allow_unknown_config_keys: bool = option(
        False, "warn about unknown keys of --config_file, as GUIs write them", saved=False
    )


@dataclasses.dataclass(frozen=True)
class Parsed:
    """All options of one call, an attribute per group: `parsed.network.network_dim`, `parsed.flux_model`.

    `given` maps the name of each flag that was not left to its default to how the user wrote it (`--rank`,
    `rank in run.toml`); `notes` are warnings for the caller to log; `command` is the shell line without
    secrets.
    """

    prog: str
    command: str
    specs: Mapping[str, FlagSpec]
    groups: Mapping[str, Any]
    given: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("groups", ()):
            return self.groups[name]
        raise AttributeError(f"no group of options {name!r}")

    def flag(self, name: str) -> str:
        """The flag as the user wrote it, for messages."""
        assert name in self.specs, name
        return self.given.get(name, f"--{name}")

    def value(self, name: str) -> Any:
        """The value of one flag by name, whatever its group."""
        return getattr(self.groups[_attribute(self.specs[name].group)], name)

    def values(self) -> dict[str, Any]:
        """Every option by name, without secrets and without what concerns only one call."""
        kept = [name for name, spec in self.specs.items() if spec.flag.saved and not spec.flag.secret]
        return {name: self.value(name) for name in kept}

    def toml(self, *, given_only: bool = False) -> str:
        """These options as a file for `--config_file`; None is left out, since it is the default then."""
        what = "the flags given" if given_only else "every option of one run"
        call = "".join(letter if letter.isprintable() else " " for letter in self.command)
        lines = [f"# {self.prog}: {what}, to be read back with --config_file", f"# {call}"]
        section = None
        for name, value in self.values().items():
            if value is None or value == () or (given_only and name not in self.given):
                continue
            spec = self.specs[name]
            if spec.group is not section:
                section = spec.group
                lines += ["", f"[{_attribute(section)}]"]
            lines.append(f"{name} = {spec.to_toml(value)}")
        return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """The command line of one script.

    `defaults` differ from those of the fields; `ignored` names flags that are accepted without effect and
    listed in one note; `refused` maps others to the way out. `check` sees the parsed options, raises
    `Refused` and returns notes.
    """

    prog: str
    description: str
    groups: tuple[type, ...]
    defaults: Mapping[str, object] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    ignored_by: str = "this script"
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    off_at_zero: tuple[str, ...] = ()
    check: Callable[[Parsed], Iterable[str]] | None = None

    @property
    def specs(self) -> dict[str, FlagSpec]:
        return specs(self.groups, self.defaults)

    def parser(self) -> argparse.ArgumentParser:
        """argparse's parser; its namespace gets the lists `said` and `ignored`."""
        parser = Parser(prog=self.prog, description=self.description, usage="%(prog)s [--flag value …]")
        parser.add(self.specs)
        parser.add_others(self.ignored, self.refused)
        return parser

    def parse(self, argv: Sequence[str] | None = None) -> Parsed:
        """The options of `argv` (None: `sys.argv[1:]`). Raises `Refused` or SystemExit, see the module."""
        argv = list(sys.argv[1:] if argv is None else argv)
        known, parser, notes = self.specs, self.parser(), []
        # A leading blank keeps argparse from taking "-0.5,1" for a flag.
        words = [f" {word}" if _NUMBERS.fullmatch(word) else word for word in argv]
        space, extra = parser.parse_known_args(words, argparse.Namespace(said=[], ignored=[]))
        if extra:
            _stray(parser, extra, known)
        said = spoken = _settled(space.said, notes)
        writing = "output_config" in spoken and spoken["output_config"].value
        if "config_file" in spoken and not writing:
            said = self._config(spoken, space.ignored, notes) | spoken
        missing = [f"--{name}" for name, spec in known.items() if spec.flag.required and name not in said]
        if missing:
            parser.error(f"missing {', '.join(missing)}")
        if space.ignored:
            notes.append(f"ignored for {self.ignored_by}: {', '.join(sorted(set(space.ignored)))}")
        parsed = _grouped(self, known, said, notes, _command(self.prog, argv, spoken.values()))
        if writing:
            _write_config(parsed)
        return parsed

    def _config(
        self, spoken: Mapping[str, GivenValue], ignored: list[str], notes: list[str]
    ) -> dict[str, GivenValue]:
        """What --config_file says; its keys without effect are added to `ignored`."""
        path = _config_path(spoken["config_file"].value)
        specs = [spec for spec in self.specs.values() if spec.group is not ConfigFile]
        known = {name[2:]: spec for spec in specs for name in spec.names}
        said, unknown = [], []
        for key, value in _keys(path, {name for name, spec in known.items() if spec.many}):
            label = f"{key} in {path}"
            if key in self.refused and off(value):  # GUIs write every setting, also those that are off
                ignored.append(key)
                continue
            if key in self.refused:
                raise Refused(f"{label} is not supported: {self.refused[key]}")
            if key in known:
                try:
                    said.append(GivenValue(known[key], label, known[key].from_toml(value)))
                except Refused as error:
                    raise Refused(f"{label}: {error}") from error
            else:
                (ignored if key in self.ignored else unknown).append(key)
        allowed = spoken.get("allow_unknown_config_keys")
        if unknown and not (allowed and allowed.value):
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise Refused(
                f"unknown key {unknown[0]!r}{nearest(unknown[0], known)}{more} in {path}; correct it, or "
                "give --allow_unknown_config_keys for a file written by a GUI"
            )
        if unknown:
            notes.append(f"unknown keys of {path} without effect: {', '.join(unknown)}")
        return _settled(said, notes)


def parse(
    argv: Sequence[str] | None, groups: Sequence[type], *, prog: str, description: str = "", **rest: Any
) -> Parsed:
    """`CommandLine(prog, description, groups, **rest).parse(argv)`."""
    return CommandLine(prog, description, tuple(groups), **rest).parse(argv)


def _settled(said: Iterable[GivenValue], notes: list[str]) -> dict[str, GivenValue]:
    """The last of what was said under one name, by flag; two names of one flag must agree."""
    settled: dict[str, GivenValue] = {}
    for one in said:
        before = settled.get(one.spec.name)
        if before and before.value != one.value:
            if before.label != one.label:
                raise Refused(
                    f"{before.label} ({_brief(before.value)}) and {one.label} ({_brief(one.value)}) name one "
                    "setting and differ; give one of them"
                )
            if one.spec.many:
                notes.append(f"{one.label} is given twice and only the last counts: {_brief(one.value)}")
        settled[one.spec.name] = one
    return settled


def _grouped(
    surface: CommandLine,
    known: Mapping[str, FlagSpec],
    said: Mapping[str, GivenValue],
    notes: list[str],
    command: str,
) -> Parsed:
    values = {name: said[name].value if name in said else spec.default for name, spec in known.items()}
    given = {name: one.label for name, one in said.items()}
    values |= {name: None for name in surface.off_at_zero if values[name] == 0}
    for name, spec in known.items():
        spec.check_range(given.get(name, f"--{name}"), values[name])
    groups = {}
    for group in surface.groups:
        fields = {field.name: values[field.name] for field in dataclasses.fields(group)}
        groups[_attribute(group)] = group(**fields)
    parsed = Parsed(surface.prog, command, known, groups, given, tuple(notes))
    if surface.check:
        return dataclasses.replace(parsed, notes=(*notes, *surface.check(parsed)))
    return parsed


def _stray(parser: argparse.ArgumentParser, extra: list[str], known: Mapping[str, FlagSpec]) -> NoReturn:
    word = next((word for word in extra if word.startswith("-")), extra[0])
    if not word.startswith("-"):
        parser.error(f"unexpected {word.strip()!r} belongs to no flag; put a value with blanks in quotes")
    name = word.split("=")[0]
    parser.error(f"unknown flag {name}{nearest(name, [n for spec in known.values() for n in spec.names])}")


def _config_path(text: str) -> Path:
    return Path(text if text.endswith(".toml") else f"{text}.toml")


def _keys(path: Path, lists: Collection[str]) -> list[tuple[str, object]]:
    """Keys and values of a TOML file; tables of the first level are flattened, but those named as `lists`."""
    try:
        found = parse_toml(path.read_text(encoding="utf-8"), f"--config_file {path}")
    except FileNotFoundError as error:
        raise Refused(
            f"--config_file {path} does not exist (seen from {Path.cwd()}); correct the path"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(
            f"--config_file {path} cannot be read: {error}; correct the path or the file"
        ) from error
    flat: list[tuple[str, object]] = []
    for key, value in found.items():
        section = isinstance(value, dict) and key not in lists
        flat += value.items() if section else [(key, value)]
    return flat


def _write_config(parsed: Parsed) -> NoReturn:
    if "config_file" not in parsed.given:
        raise Refused("--output_config needs the file to write; give --config_file PATH")
    path = _config_path(parsed.value("config_file"))
    if path.exists():
        raise Refused(f"--output_config does not write over {path}; give another --config_file")
    with atomic(path) as part:
        part.write_text(parsed.toml(given_only=True), encoding="utf-8")
    print(f"wrote {path}")
    raise SystemExit(0)


def _command(prog: str, argv: Iterable[str], said: Iterable[GivenValue]) -> str:
    hidden = {str(one.value) for one in said if one.spec.flag.secret and one.value}
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        words.append("***" if word in hidden else f"{name}=***" if equals and value in hidden else word)
    return shlex.join([prog, *words])


def _attribute(group: type) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", group.__name__).lower()


def _brief(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
