"""argv and TOML to frozen dataclasses, checked once.

A group of flags is a frozen dataclass whose fields are the flags: `rank: int = option(4, "what it does")`.
The options of a script are one group, or a frozen dataclass whose fields are groups. The value of a flag
comes from argv, else from `--config_file`, else from `CommandLine.defaults`, else from the field's default.

An unknown flag, or a word where a number belongs, ends with one line and exit code 2, as in argparse. Every
other mistake that a user can correct raises `Refused`.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, cast, get_type_hints

from lowrank.config.flag import FlagSpec, fields_of, option
from lowrank.config.parser import GivenValue, Parser, name_positional, off
from lowrank.errors import Refused, nearest
from lowrank.files import atomic, parse_toml

T = TypeVar("T")
Options = TypeVar("Options", covariant=True)
_NUMBERS = re.compile(r"-[\d.][\d.,eE+-]*")


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """Configuration file"""

    config_file: str | None = option(
        None, "TOML file whose keys are flags, in any sections; the ending .toml may be left out", saved=False
    )
    output_config: bool = option(False, "write the given flags to --config_file and exit", saved=False)
    allow_unknown_config_keys: bool = option(
        False, "warn about unknown keys of --config_file instead of stopping, for files of GUIs", saved=False
    )


@dataclasses.dataclass(frozen=True)
class Parsed(Generic[Options]):
    """The options of one call as the record `options`, and how they were given.

    `given` maps the name of each flag that was not left to its default to how the user wrote it (`--rank`,
    `rank in run.toml`); `notes` are warnings for the caller to log; `command` is the shell line without
    secrets.
    """

    prog: str
    command: str
    specs: Mapping[str, FlagSpec]
    options: Options
    given: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def flag(self, name: str) -> str:
        """The flag as the user wrote it, for messages."""
        assert name in self.specs, name
        return self.given.get(name, f"--{name}")

    def value(self, name: str) -> Any:
        """The value of one flag by name, whatever its group."""
        section = self.specs[name].section
        return getattr(getattr(self.options, section) if section else self.options, name)

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
            if spec.section != section:
                section = spec.section
                lines += ["", *([f"[{section}]"] if section else [])]
            lines.append(f"{name} = {spec.to_toml(value)}")
        return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class CommandLine(Generic[T]):
    """The command line of one script.

    `options` is the record that `parse` fills, and `defaults` replace the defaults of its fields. Words
    without a flag are values of the flags `positional`, in order. Flags in `ignored` are accepted without
    effect and listed in one note. `refused` maps flags of other trainers to what to do instead. `check`
    receives the parsed options, raises `Refused` and yields notes. `follow` receives the values that were
    given and returns defaults that follow from them.
    """

    prog: str
    description: str
    options: type[T]
    positional: tuple[str, ...] = ()
    defaults: Mapping[str, object] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    ignored_by: str = "this script"
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    off_at_zero: bool = False
    check: Callable[[Parsed[T]], Iterable[str]] | None = None
    follow: Callable[[Mapping[str, Any]], Mapping[str, object]] | None = None

    @property
    def groups(self) -> dict[str, type]:
        """The groups of flags by their field in the record of options; "" is the record itself."""
        fields = dataclasses.fields(cast(Any, self.options))
        if any("flag" in field.metadata for field in fields):
            return {"": self.options}
        hints = get_type_hints(self.options)
        return {field.name: hints[field.name] for field in fields}

    @property
    def specs(self) -> dict[str, FlagSpec]:
        """Every flag by name. Two flags of one name are a bug, and so is a default of no flag."""
        specs: dict[str, FlagSpec] = {}
        for section, group in self.groups.items():
            added = fields_of(group, section, self.defaults)
            assert not (twice := added.keys() & specs.keys()), (
                f"{twice} of {group.__name__} are declared twice"
            )
            specs |= added
        assert self.defaults.keys() <= specs.keys(), f"no flags: {self.defaults.keys() - specs.keys()}"
        return specs

    def parser(self) -> argparse.ArgumentParser:
        """argparse's parser; its namespace gets the lists `given` and `ignored`."""
        words = "".join(f" {self._shown(name)}" for name in self.positional)
        parser = Parser(
            prog=self.prog, description=self.description, usage=f"%(prog)s{words} [--flag value …]"
        )
        parser.add(self.specs)
        parser.add_others(self.ignored, self.refused)
        return parser

    def _shown(self, name: str) -> str:
        """The flag `name` as a user writes it; one of `positional` is a word without a flag."""
        word = f"{name.upper()} …" if self.specs[name].many else name.upper()
        return word if name in self.positional else f"--{name}"

    def parse(self, argv: Sequence[str] | None = None) -> Parsed[T]:
        """The options of `argv` (None: `sys.argv[1:]`). Raises `Refused` or `SystemExit`."""
        argv = list(sys.argv[1:] if argv is None else argv)
        known, parser, notes = self.specs, self.parser(), []
        words = name_positional(argv, known, self.positional) if self.positional else argv
        # A leading blank keeps argparse from reading "-0.5,1" as a flag.
        words = [f" {word}" if _NUMBERS.fullmatch(word) else word for word in words]
        space, extra = parser.parse_known_args(words, argparse.Namespace(given=[], ignored=[]))
        if extra:
            _stray(parser, extra, known)
        given = of_argv = _settled(space.given, notes)
        writing = "output_config" in of_argv and of_argv["output_config"].value
        if "config_file" in of_argv and not writing:
            given = self._config(of_argv, space.ignored, notes) | of_argv
        needed = [name for name, spec in known.items() if spec.flag.required]
        missing = [self._shown(name) for name in needed if name not in given]
        if missing:
            parser.error(f"missing {', '.join(missing)}")
        if space.ignored:
            notes.append(f"ignored for {self.ignored_by}: {', '.join(sorted(set(space.ignored)))}")
        parsed = self._filled(known, given, notes, _command(self.prog, argv, of_argv.values()))
        if writing:
            _write_config(parsed)
        return parsed

    def _filled(
        self, known: Mapping[str, FlagSpec], given: Mapping[str, GivenValue], notes: list[str], command: str
    ) -> Parsed[T]:
        """The record of options, each value inside its limits, and `check`'s notes added to `notes`."""
        stated = {name: value.value for name, value in given.items()}
        follows = self.follow(stated) if self.follow else {}
        values = {name: spec.default for name, spec in known.items()} | dict(follows) | stated
        labels = {name: value.label for name, value in given.items()}
        for name, spec in known.items():
            if self.off_at_zero and spec.flag.off_at_zero and values[name] == 0:
                values[name] = None
            spec.check_range(labels.get(name, f"--{name}"), values[name])
        filled = {
            section: group(**{name: values[name] for name in fields_of(group)})
            for section, group in self.groups.items()
        }
        options = cast(T, filled[""]) if "" in filled else self.options(**filled)
        parsed = Parsed(self.prog, command, known, options, labels, tuple(notes))
        return dataclasses.replace(parsed, notes=(*notes, *self.check(parsed))) if self.check else parsed

    def _config(
        self, given: Mapping[str, GivenValue], ignored: list[str], notes: list[str]
    ) -> dict[str, GivenValue]:
        """The values of --config_file; its keys without effect are added to `ignored`."""
        path = _config_path(given["config_file"].value)
        specs = [spec for spec in self.specs.values() if spec.group is not ConfigFile]
        known = {name[2:]: spec for spec in specs for name in spec.names}
        values, unknown = [], []
        for key, value in _keys(path, {name for name, spec in known.items() if spec.many}):
            label = f"{key} in {path}"
            if key in self.refused and off(value):  # GUIs write every setting, also those that are off
                ignored.append(key)
            elif key in self.refused:
                raise Refused(f"{label} is not supported: {self.refused[key]}")
            elif key not in known:
                (ignored if key in self.ignored else unknown).append(key)
            else:
                try:
                    values.append(GivenValue(known[key], label, known[key].from_toml(value)))
                except Refused as error:
                    raise Refused(f"{label}: {error}") from error
        allowed = given.get("allow_unknown_config_keys")
        if unknown and not (allowed and allowed.value):
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise Refused(
                f"unknown key {unknown[0]!r}{nearest(unknown[0], known)}{more} in {path}; correct it, or "
                "give --allow_unknown_config_keys for a file written by a GUI"
            )
        if unknown:
            notes.append(f"unknown keys of {path} without effect: {', '.join(unknown)}")
        return _settled(values, notes)


def _settled(values: Iterable[GivenValue], notes: list[str]) -> dict[str, GivenValue]:
    """The last value of each flag; two names of one flag must agree."""
    settled: dict[str, GivenValue] = {}
    for value in values:
        before = settled.get(value.spec.name)
        if before and before.value != value.value:
            if before.label != value.label:
                both = (f"{given.label} ({_brief(given.value)})" for given in (before, value))
                raise Refused(f"{' and '.join(both)} name one setting and differ; give one of them")
            if value.spec.many:
                last = _brief(value.value)
                notes.append(f"{value.label} is given twice and only the last counts: {last}")
        settled[value.spec.name] = value
    return settled


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
        table = parse_toml(path.read_text(encoding="utf-8"), f"--config_file {path}")
    except FileNotFoundError as error:
        raise Refused(
            f"--config_file {path} does not exist (seen from {Path.cwd()}); correct the path"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(
            f"--config_file {path} cannot be read: {error}; correct the path or the file"
        ) from error
    flat: list[tuple[str, object]] = []
    for key, value in table.items():
        section = isinstance(value, dict) and key not in lists
        flat += value.items() if section else [(key, value)]
    return flat


def _write_config(parsed: Parsed[Any]) -> NoReturn:
    if "config_file" not in parsed.given:
        raise Refused("--output_config needs the file to write; give --config_file PATH")
    path = _config_path(parsed.value("config_file"))
    if path.exists():
        raise Refused(f"--output_config does not write over {path}; give another --config_file")
    with atomic(path) as part:
        part.write_text(parsed.toml(given_only=True), encoding="utf-8")
    print(f"wrote {path}")
    raise SystemExit(0)


def _command(prog: str, argv: Iterable[str], given: Iterable[GivenValue]) -> str:
    hidden = {str(value.value) for value in given if value.spec.flag.secret and value.value}
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        words.append("***" if word in hidden else f"{name}=***" if equals and value in hidden else word)
    return shlex.join([prog, *words])


def _brief(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
