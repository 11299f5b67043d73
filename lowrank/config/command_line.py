"""argv and TOML to frozen dataclasses, checked once.

A group of flags is a frozen dataclass whose fields are the flags: `rank: int = option(4, "what it does")`.
The options of a script are one group, or a frozen dataclass whose fields are groups. The value of a flag
comes from argv, else from `--config_file`, else from `CommandLine.defaults`, else from the field's default.

An unknown flag, or a word where a number belongs, ends with one line and exit code 2, as in argparse. Every
other mistake that a user can correct raises `Refused`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NoReturn, TypeVar, cast, get_type_hints

from lowrank.config.config_file import config_path, read_config, unknown_keys
from lowrank.config.flag import FlagSpec, fields_of, option
from lowrank.config.parser import GivenValue, Parser, name_positional
from lowrank.errors import Refused, joined, nearest, reasons_of
from lowrank.files import atomic

T = TypeVar("T")
Options = TypeVar("Options", covariant=True)
_NUMBERS = re.compile(r"-[\d.][\d.,eE+-]*")


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """Configuration file"""

    config_file: str | None = option(
        None,
        "TOML or JSON file whose keys are flags, in any sections, also a file of the interface kohya_ss; the "
        "ending .toml may be left out",
        saved=False,
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
    without a flag are values of the flags `positional`, in order. `example` is a call for the short help.
    Flags in `ignored` are accepted without effect and listed in one note; those in `accepted` get a note with
    the reason. `refused` maps flags of other trainers to what to do instead. `check` receives the parsed
    options, raises `Refused` and yields notes. `follow` receives the values that were given and returns
    defaults that follow from them.
    """

    prog: str
    description: str
    options: type[T]
    positional: tuple[str, ...] = ()
    example: str = ""
    defaults: Mapping[str, object] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    ignored_by: str = "this script"
    accepted: Mapping[str, str] = dataclasses.field(default_factory=dict)
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
            prog=self.prog,
            description=self.description,
            usage=f"%(prog)s{words} [--flag value …]",
            example=self.example,
        )
        parser.add(self.specs)
        parser.add_others((*self.ignored, *self.accepted), self.refused)
        return parser

    def _shown(self, name: str) -> str:
        """The flag `name` as a user writes it; one of `positional` is a word without a flag."""
        word = f"{name.upper()} …" if self.specs[name].many else name.upper()
        return word if name in self.positional else f"--{name}"

    def parse(
        self, argv: Sequence[str] | None = None, machine: Callable[[Parsed[T]], None] | None = None
    ) -> Parsed[T]:
        """The options of `argv` (None: `sys.argv[1:]`). Raises `Refused` or `SystemExit`.

        `machine` checks what the options need on this machine; all problems are raised together.
        """
        argv = list(sys.argv[1:] if argv is None else argv)
        known, parser = self.specs, self.parser()
        words = name_positional(argv, known, self.positional) if self.positional else argv
        # A leading blank keeps argparse from reading "-0.5,1" as a flag.
        words = [f" {word}" if _NUMBERS.fullmatch(word) else word for word in words]
        space, extra = parser.parse_known_args(words, argparse.Namespace(given=[], ignored=[]))
        if extra:
            _stray(parser, extra, known)
        reading = _Reading(ignored=space.ignored)
        given = of_argv = _settled(space.given, reading.notes)
        writing = "output_config" in of_argv and of_argv["output_config"].value
        if "config_file" in of_argv and not writing:
            given = self._config(of_argv, reading) | of_argv
        needed = [name for name, spec in known.items() if spec.flag.required]
        missing = [self._shown(name) for name in needed if name not in given]
        if missing:
            parser.error(f"missing {', '.join(missing)}")
        reading.notes += self._ignored(set(reading.ignored))
        parsed = self._filled(known, given, reading, _command(self.prog, argv, of_argv.values()), machine)
        if writing:
            _write_config(parsed)
        return parsed

    def _filled(
        self,
        known: Mapping[str, FlagSpec],
        given: Mapping[str, GivenValue],
        reading: _Reading,
        command: str,
        machine: Callable[[Parsed[T]], None] | None,
    ) -> Parsed[T]:
        """The record of options, each value inside its limits, and `check`'s notes added to the notes."""
        stated = {name: value.value for name, value in given.items()}
        follows = self.follow(stated) if self.follow else {}
        values = {name: spec.default for name, spec in known.items()} | dict(follows) | stated
        labels = {name: value.label for name, value in given.items()}
        for name, spec in known.items():
            off = self.off_at_zero and spec.flag.off_at_zero and values[name] == 0
            if off or (values[name] == "" and spec.default is None):
                values[name] = None
            before = len(reading.problems)
            with reading.gathered():
                spec.check_range(labels.get(name, f"--{name}"), values[name])
            if len(reading.problems) > before:
                values[name] = spec.default  # so that the other checks run, for one list of all problems
        parsed = None
        with reading.gathered():
            parsed = Parsed(self.prog, command, known, self._record(values), labels)
            with reading.gathered():
                reading.notes += self.check(parsed) if self.check else ()
            with reading.gathered():
                _ = machine(parsed) if machine else None
        if reading.problems or parsed is None:
            raise joined(f"{reading.source or self.prog} has several problems", reading.problems)
        return dataclasses.replace(parsed, notes=tuple(reading.notes))

    def _ignored(self, names: set[str]) -> Iterator[str]:
        """A line for each ignored flag with a reason, and one for the others."""
        if plain := sorted(name for name in names if not self.accepted.get(name)):
            yield f"ignored for {self.ignored_by}: {', '.join(plain)}"
        for name in sorted(names - set(plain)):
            yield f"--{name} has no effect: {self.accepted[name]}"

    def _record(self, values: Mapping[str, object]) -> T:
        filled = {
            section: group(**{name: values[name] for name in fields_of(group)})
            for section, group in self.groups.items()
        }
        return cast(T, filled[""]) if "" in filled else self.options(**filled)

    def _config(self, given: Mapping[str, GivenValue], reading: _Reading) -> dict[str, GivenValue]:
        """The values of --config_file; its problems and its keys without effect are added to `reading`."""
        specs = [spec for spec in self.specs.values() if spec.group is not ConfigFile]
        known = {name[2:]: spec for spec in specs for name in spec.names}
        path = config_path(given["config_file"].value)
        config = read_config(path, known, (*self.ignored, *self.accepted), self.refused, self.ignored_by)
        reading.source = str(path)
        reading.ignored += config.ignored
        allowed = given.get("allow_unknown_config_keys")
        if config.unknown and allowed and allowed.value:
            reading.notes.append(f"unknown keys of {path} without effect: {', '.join(config.unknown)}")
        else:
            config.problems += unknown_keys(config, known)
        if config.interface:
            keys = ", ".join(sorted(config.interface))
            reading.notes.append(f"keys of kohya_ss' interface without effect in {path}: {keys}")
        reading.problems += [f"{path}: {problem}" for problem in config.problems]
        settled: dict[str, GivenValue] = {}
        with reading.gathered():
            settled = _settled(config.values, reading.notes)
        space = argparse.Namespace(given=[], ignored=reading.ignored)
        _, extra = self.parser().parse_known_args(config.words, space)
        reading.problems += [f"{path}: {word!r} in additional_parameters is unknown" for word in extra]
        return settled | _settled(space.given, reading.notes)


@dataclasses.dataclass
class _Reading:
    """What is found while a command line is read."""

    ignored: list[str]
    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    source: str = ""  # the --config_file

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Add the reasons of a `Refused` to the problems instead of raising it."""
        try:
            yield
        except Refused as error:
            self.problems += reasons_of(error)


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


def _write_config(parsed: Parsed[Any]) -> NoReturn:
    if "config_file" not in parsed.given:
        raise Refused("--output_config needs the file to write; give --config_file PATH")
    path = config_path(parsed.value("config_file"))
    if os.path.exists(path):
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
