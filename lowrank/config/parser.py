"""argparse of flags: a section of the help for each group, one line for each error, words without a flag."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from lowrank.config.flag import TRUTH, FlagSpec, shown
from lowrank.errors import Refused, shortened

_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}


class GivenValue(NamedTuple):
    """A value from argv or a config file; `label` is the flag as the user wrote it."""

    spec: FlagSpec
    label: str
    value: Any


class _Listed(NamedTuple):
    """A flag in the help: its group's title, its declaration, and argparse's action."""

    title: str
    spec: FlagSpec
    action: argparse.Action


class Parser(argparse.ArgumentParser):
    """argparse of specs, whose errors are one line without the usage text.

    `--help` prints the essential flags with the `example`, `--help groups` the names of all flags, `--help
    WORD` a group or the flags with a word in their name, `--help all` every flag. A script without essential
    flags prints every flag.
    """

    def __init__(self, example: str = "", **options: Any) -> None:
        super().__init__(add_help=False, **options)
        self._example, self._listed = example, []  # of (title of the group, spec, action)
        self.add_argument(
            "-h", "--help", nargs="?", action=_Help, metavar="WORD", help="this help, or that of a WORD"
        )

    def help_for(self, word: str | None) -> str:
        """The help of one level; `word` is None, "groups", "all", a part of a group's title or of a flag."""
        essential = [entry for entry in self._listed if entry.spec.flag.essential]
        if word == "all" or (word is None and not essential):
            return self.format_help()
        if word is None:
            return self._short(essential)
        if word == "groups":
            return "".join(
                f"{title} (--help {title.split()[0].lower().rstrip(':')}):\n{_filled(names)}\n"
                for title, names in self._groups().items()
            )
        wanted = word.lstrip("-").lower()
        chosen = [e for e in self._listed if wanted in e.title.lower()]
        chosen = chosen or [e for e in self._listed if any(wanted in name for name in e.spec.names)]
        if not chosen:
            self.error(f"--help {word}: no group and no flag has this word; --help groups lists them")
        return self._sections({title: [e for e in chosen if e.title == title] for title in self._groups()})

    def _groups(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for entry in self._listed:
            groups.setdefault(entry.title, []).append(entry.spec.names[0])
        return groups

    def _short(self, essential: list[_Listed]) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        example = f"Example:\n{self._example}\n\n" if self._example else ""
        flags = self._sections({"The flags that matter most": essential})
        return (
            f"{formatter.format_help()}\n{flags}\n{example}{len(self._listed)} flags in all:\n"
            "  --help groups   the names of all flags, by group\n"
            "  --help WORD     a group (--help pictures), or flags with a word in their name (--help loss)\n"
            "  --help all      every flag with its text and default\n"
        )

    def _sections(self, groups: Mapping[str, list[_Listed]]) -> str:
        formatter = self._get_formatter()
        for title, entries in groups.items():
            if entries:
                formatter.start_section(title)
                formatter.add_arguments([entry.action for entry in entries])
                formatter.end_section()
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {shortened(message)}; see {self.prog} --help\n")

    def add(self, specs: Mapping[str, FlagSpec]) -> None:
        """Flags that append a `GivenValue` to the namespace's list `given`; a section for each group."""
        sections: dict[type, Any] = {}
        for spec in specs.values():
            if spec.group not in sections:
                title = (spec.group.__doc__ or "").splitlines()[0].rstrip(".")
                sections[spec.group] = self.add_argument_group(title)
            section = sections[spec.group]
            self._listed.append(_Listed(section.title, spec, _add(section, spec)))

    def add_others(self, ignored: Iterable[str], refused: Mapping[str, str]) -> None:
        """Flags that only append their name to the namespace's list `ignored`, and flags that are errors."""
        for name in ignored:
            self.add_argument(f"--{name}", nargs="*", action=_Ignore, help=argparse.SUPPRESS)
        for name, way_out in refused.items():
            self.add_argument(f"--{name}", nargs="*", action=_Refuse, const=way_out, help=argparse.SUPPRESS)


class _Give(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        spec, bare = self.const
        if self.nargs == 0 or values is self.const:  # --no-flag, or --flag without a word
            values = bare
        label = option_string.replace("--no-", "--", 1) if spec.kind is bool else option_string
        namespace.given.append(GivenValue(spec, label, tuple(values) if spec.many else values))


class _Help(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        print(parser.help_for(values).rstrip())
        parser.exit()


class _Ignore(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        namespace.ignored.append(option_string[2:])


def off(value: object) -> bool:
    """Whether a value switches a feature off: false, 0, none or nothing."""
    return str(value).strip().lower() in ("false", "0", "0.0", "none", "no", "")


class _Refuse(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if values and all(map(off, values)):
            namespace.ignored.append(option_string.lstrip("-"))
            return
        parser.error(f"{option_string} is not supported: {self.const}")


def _filled(names: Sequence[str]) -> str:
    return textwrap.fill(
        ", ".join(names), 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )


def _add(section: Any, spec: FlagSpec) -> argparse.Action:
    def read(text: str) -> object:
        try:
            return spec.from_text(text)
        except Refused as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    flag = spec.flag
    unit = f" [{flag.unit}]" if flag.unit else ""
    default = f" (default: {shown(spec.default)})" if shown(spec.default) else ""
    common = {"action": _Give, "help": (flag.help + unit + default).replace("%", "%%")}
    if spec.kind is bool:
        made = section.add_argument(
            *spec.names, nargs="?", const=(spec, True), type=read, metavar="BOOL", **common
        )
        off = [f"--no-{name[2:]}" for name in spec.names]
        section.add_argument(*off, nargs=0, const=(spec, False), action=_Give, help=argparse.SUPPRESS)
        return made
    metavar = "{" + ",".join(flag.choices) + "}" if flag.choices else _METAVARS[spec.kind]
    metavar = "TEXT" if flag.convert else metavar
    nargs = "*" if spec.many else None
    return section.add_argument(
        *spec.names, nargs=nargs, const=(spec, None), type=read, metavar=metavar, **common
    )


def name_positional(
    argv: Sequence[str], specs: Mapping[str, FlagSpec], positional: Sequence[str]
) -> list[str]:
    """`argv` with the flags `positional` put before the words that belong to no flag, in order.

    The words before the change are `A B --to peft`, after it `--source A --target B --to peft`. A flag of
    several values takes all words that are left; words beyond the last flag stay as they are.
    """
    by_name = {name: spec for spec in specs.values() for name in spec.names}
    words: list[str] = []
    loose: list[str] = []
    flag: FlagSpec | None = None  # the flag that the next word belongs to
    for word in argv:
        if word.startswith("--"):
            flag = None if "=" in word else by_name.get(word)
            words.append(word)
        elif flag and (flag.kind is not bool or word.lower() in TRUTH):
            flag = flag if flag.many else None
            words.append(word)
        else:
            flag = None
            loose.append(word)
    named: list[str] = []
    for name in positional:
        count = len(loose) if specs[name].many else 1
        named += [f"--{name}", *loose[:count]] if loose else []
        loose = loose[count:]
    return [*loose, *named, *words]
