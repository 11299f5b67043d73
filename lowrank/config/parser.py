"""argparse of flags: a section of the help for each group, one line for each error."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from lowrank.config.flag import FlagSpec, shown
from lowrank.errors import Refused

_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}


class GivenValue(NamedTuple):
    """A value that was given: `label` is the flag as written."""

    spec: FlagSpec
    label: str
    value: Any


class Parser(argparse.ArgumentParser):
    """argparse of specs; its errors come without the usage text, which for a trainer hides the one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")

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
