"""A dataclass field that is a flag: what it says, and how words and TOML values become its value."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from lowrank.errors import Refused, nearest

SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "piecewise_constant",
)
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}
_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}


@dataclasses.dataclass(frozen=True)
class Flag:
    """What a field tells about its flag besides name, type and default.

    `low` and `high` are inclusive, `above` and `below` exclusive; they hold for each item of a list.
    `convert` makes the value from one text (raising `Refused`), in place of the annotated type. A flag that
    is not `blank` refuses an empty text. A `secret` is never written or logged; a flag that is not `saved`
    belongs to one call and is left out of configs.
    """

    help: str
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] | None = None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    convert: Callable[[str], object] | None = None
    blank: bool = True
    required: bool = False
    secret: bool = False
    saved: bool = True


def option(default: object, help: str, **details: Any) -> Any:
    """A dataclass field that is a flag; `details` are the other fields of `Flag`."""
    return dataclasses.field(default=default, metadata={"flag": Flag(help, **details)})


def path(default: object, help: str, **details: Any) -> Any:
    """An option that names a file, a folder or a module: an empty text, as of an unset variable, is none."""
    return option(default, help, blank=False, **details)


def pairs(name: str, items: Iterable[str]) -> dict[str, str]:
    """The texts `key=value` of the flag `name` as a dict of texts, split at the first `=` as kohya does.

    Raises `Refused` where `=` or the key is missing, and for a key given twice.
    """
    found: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        key = key.strip()
        if not equals or not key:
            raise Refused(f"{name} {item!r} is not of the form key=value; write e.g. {key or 'key'}=1")
        if key in found:
            raise Refused(f"{name} has {key} twice ({found[key]} and {value}); give it once")
        found[key] = value
    return found


def literals(name: str, items: Iterable[str]) -> dict[str, Any]:
    """`key=value` texts of the flag `name`, values as Python literals (`betas=0.9,0.99` is a tuple)."""
    found = {}
    for key, text in pairs(name, items).items():
        try:
            found[key] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise Refused(
                f"{name} {key}={text}: the value is not a Python literal; write True, 0.1, (0.9,0.99), "
                f"or a text with its own quotes: \"{key}='{text}'\""
            ) from error
    return found


def resolution(text: str) -> tuple[int, int]:
    """`512` or `768,512` as (width, height)."""
    parts = text.split(",")
    if len(parts) not in (1, 2) or not all(part.strip().isdigit() for part in parts):
        raise Refused(f"{text!r} is not a number or 'width,height'; give e.g. 512 or 768,512")
    return int(parts[0]), int(parts[-1])


def steps_or_share(text: str) -> float:
    """`100` as 100 steps; `0.1` and `10%` as the share 0.1."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError as error:
        raise Refused(f"{text!r} is not a number of steps, a share below 1, or a percentage") from error
    if value >= 1 and (value != int(value) or text.endswith("%")):
        raise Refused(f"{text!r} is neither whole steps nor a share below 1")
    return int(value) if value >= 1 or value == 0 else value


def comma_floats(text: str) -> tuple[float, ...]:
    """`0.9,1.0` as (0.9, 1.0); −0.0 is 0.0."""
    values = [_number(float, part) for part in text.split(",")]
    if None in values:
        raise Refused(f"{text!r} is not a list of numbers; give finite ones, e.g. 0.9,1.0")
    return tuple(value + 0.0 for value in values if value is not None)


def comma_words(text: str) -> tuple[str, ...]:
    """`attn.to_q,attn.to_k` as its parts."""
    words = tuple(part.strip() for part in text.split(",") if part.strip())
    if not words:
        raise Refused(f"{text!r} names nothing; give e.g. attn.to_q,attn.to_k, or leave the flag out")
    return words


def file_name(text: str) -> str:
    """A name for files, to which endings and step numbers are added."""
    if not text or any(mark in text for mark in "/\\\0") or text in (".", ".."):
        raise Refused(f"{text!r} is not a plain file name; say the folder with --output_dir")
    if (length := len(os.fsencode(text))) > 200:  # file systems take 255, and step numbers are added
        raise Refused(f"{text[:20]!r}… is {length} bytes long; give a name of 200 or less")
    return text


def scheduler(text: str) -> str:
    """The name of a learning-rate schedule, or `adafactor:RATE` (alone, as interfaces send it: the run's)."""
    text = "adafactor:" if text.lower() == "adafactor" else text
    if text.lower() not in SCHEDULERS and not text.startswith("adafactor:"):
        raise Refused(f"{text!r} is not one of {', '.join(SCHEDULERS)}{nearest(text, SCHEDULERS)}")
    return text if text.startswith("adafactor:") else text.lower()


class FlagSpec(NamedTuple):
    """One flag: its field, and the field's annotation taken apart into the type of one value and `many`."""

    name: str
    group: type
    kind: type
    many: bool
    default: object
    flag: Flag

    @property
    def names(self) -> tuple[str, ...]:
        return (f"--{self.name}", *self.flag.aliases)

    def from_text(self, text: str) -> object:
        """The value of one word of the command line; raises `Refused` where it does not fit."""
        if self.flag.convert:
            return self.flag.convert(text.strip())
        if self.kind is str:
            return self._chosen(text)
        value = _TRUTH.get(text.strip().lower()) if self.kind is bool else _number(self.kind, text)
        if value is None:
            raise Refused(f"{text.strip()!r} is not {_WORDS[self.kind]}")
        return value

    def _chosen(self, text: str) -> str:
        choices = self.flag.choices
        if not self.flag.blank and not text.strip():
            raise Refused("the text is empty; give a value, or leave the flag out")
        if choices and text not in choices:
            raise Refused(f"{text!r} is not one of {', '.join(choices)}{nearest(text, choices)}")
        return text

    def from_toml(self, value: object) -> object:
        """The value of a TOML key, held to the same rules; a text is read as on the command line."""
        if self.kind is bool:  # GUIs write 0 and 1
            if isinstance(value, int) and value in (0, 1):
                return bool(value)
            raise Refused(f"{value!r} is not true or false")
        if isinstance(value, list) and self.flag.convert:
            value = ",".join(map(str, value))
        if self.many:
            if isinstance(value, dict):
                told = ", ".join(json.dumps(f"{key}={item}") for key, item in value.items())
                raise Refused(f"it is a table; write a list of texts instead: {self.name} = [{told}]")
            return tuple(self._item(item) for item in (value if isinstance(value, list) else [value]))
        return self._item(value)

    def _item(self, value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise Refused(f"{value!r} is not {_WORDS[self.kind]}")
        return self.from_text(str(value))

    def to_toml(self, value: object) -> str:
        """The text that `from_toml` reads back; None has none."""
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, tuple) and self.many:
            return "[" + ", ".join(self.to_toml(item) for item in value) + "]"
        if isinstance(value, (int, float)):
            return repr(value)
        return json.dumps(shown(value), ensure_ascii=False).replace("\x7f", "\\u007f")

    def check_range(self, label: str, value: object) -> None:
        """Raise `Refused` when a number of `value` is outside the limits; `label` is the flag as written."""
        flag, unit = self.flag, f" {self.flag.unit}" if self.flag.unit else ""

        def told(number: float) -> str:
            return str(number) if isinstance(number, int) else f"{number:g}"

        for item in value if isinstance(value, tuple) else (value,):
            if not isinstance(item, (int, float)) or isinstance(item, bool):
                continue
            if flag.low is not None and item < flag.low:
                raise Refused(
                    f"{label} {told(item)} is below {told(flag.low)}{unit}; give {told(flag.low)} or more"
                )
            if flag.above is not None and item <= flag.above:
                raise Refused(f"{label} {told(item)} is not above {told(flag.above)}{unit}; give more")
            if flag.high is not None and item > flag.high:
                raise Refused(
                    f"{label} {told(item)} is above {told(flag.high)}{unit}; give {told(flag.high)} or less"
                )
            if flag.below is not None and item >= flag.below:
                raise Refused(f"{label} {told(item)} is not below {told(flag.below)}{unit}; give less")


def shown(value: object) -> str:
    """A value as a user would type it; nothing for one that is unset or off."""
    if value is None or value is False:
        return ""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def specs(groups: tuple[type, ...], defaults: Mapping[str, object]) -> dict[str, FlagSpec]:
    """The flags of `groups` by name, in order; `defaults` replace the fields'. Two of one name are a bug."""
    found: dict[str, FlagSpec] = {}
    for group in groups:
        for name, kind, many, field in _fields(group):
            flag: Flag = field.metadata["flag"]
            assert name not in found, f"{name} is in {group.__name__} and {found[name].group.__name__}"
            found[name] = FlagSpec(
                name, group, kind, many and not flag.convert, defaults.get(name, field.default), flag
            )
    assert defaults.keys() <= found.keys(), f"defaults of no flag: {defaults.keys() - found.keys()}"
    return found


def _number(kind: type, text: str) -> int | float | None:
    try:
        value = kind(text)
        return value if kind is int or math.isfinite(value) else None
    except ValueError:
        return None


def _fields(group: type) -> list[tuple[str, type, bool, dataclasses.Field]]:
    hints = typing.get_type_hints(group)
    return [(field.name, *_taken_apart(hints[field.name]), field) for field in dataclasses.fields(group)]


def _taken_apart(hint: Any) -> tuple[type, bool]:
    """(type of one value, whether it is a list) of `int`, `float | None`, `tuple[str, ...]` …"""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


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
        """Flags that append a `GivenValue` to the namespace's list `said`; a section for each group."""
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


class _Say(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        spec, bare = self.const
        if self.nargs == 0 or values is self.const:  # --no-flag, or --flag without a word
            values = bare
        label = option_string.replace("--no-", "--", 1) if spec.kind is bool else option_string
        namespace.said.append(GivenValue(spec, label, tuple(values) if spec.many else values))


class _Ignore(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        namespace.ignored.append(option_string[2:])


def off(value: object) -> bool:
    """Whether a value says that a feature is off: false, 0, none or nothing."""
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
    common = {"action": _Say, "help": (flag.help + unit + default).replace("%", "%%")}
    if spec.kind is bool:
        section.add_argument(*spec.names, nargs="?", const=(spec, True), type=read, metavar="BOOL", **common)
        off = [f"--no-{name[2:]}" for name in spec.names]
        section.add_argument(*off, nargs=0, const=(spec, False), action=_Say, help=argparse.SUPPRESS)
    else:
        metavar = "{" + ",".join(flag.choices) + "}" if flag.choices else _METAVARS[spec.kind]
        metavar = "TEXT" if flag.convert else metavar
        nargs = "*" if spec.many else None
        section.add_argument(
            *spec.names, nargs=nargs, const=(spec, None), type=read, metavar=metavar, **common
        )
