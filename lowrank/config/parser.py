"""argparse of flags: a section of the help for each group, one line for each error, words without a flag."""

from __future__ import annotations

import argparse
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


class Parser(argparse.ArgumentParser):
    """argparse of specs, whose errors are one line without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {shortened(message)}; see {self.prog} --help\n")

    def add(self, specs: Mapping[str, FlagSpec]) -> None:
        """Flags that append a `GivenValue` to the namespace's list `given`; a section for each group."""
        sections: dict[type, Any] = {}
        for spec in specs.values():
            if spec.group not in sections:
                title = (spec.group.__doc__ or "").splitlines()[0].rstrip(".")
                sections[spec.group] = self.add_argument_group(title)
            _add(sections[spec.group], spec)

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


def _add(section: Any, spec: FlagSpec) -> None:
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
        section.add_argument(*spec.names, nargs="?", const=(spec, True), type=read, metavar="BOOL", **common)
        off = [f"--no-{name[2:]}" for name in spec.names]
        section.add_argument(*off, nargs=0, const=(spec, False), action=_Give, help=argparse.SUPPRESS)
    else:
        metavar = "{" + ",".join(flag.choices) + "}" if flag.choices else _METAVARS[spec.kind]
        metavar = "TEXT" if flag.convert else metavar
        nargs = "*" if spec.many else None
        section.add_argument(
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
