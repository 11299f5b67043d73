"""One option, declared once on a dataclass field: default, help, limits, metadata key.

The command line, `--config_file`, `--dataset_config` and `--lycoris_config` read a value through the same
`FlagSpec`, so a limit or a message exists once. This package imports no torch.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from lowrank.errors import Refused, nearest, shortened

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
LARGEST = 2**63  # whole numbers are below it
SEEDS = 2**63 - 2**32  # largest seed: torch's limit, with room for one per image
TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}


@dataclasses.dataclass(frozen=True)
class Flag:
    """What a field declares about its flag besides name, type and default.

    `low` and `high` are inclusive, `above` and `below` exclusive; they hold for each item of a list.
    `convert` makes the value from one text (raising `Refused`), in place of the annotated type. A flag that
    is not `blank` refuses an empty text; a `path` also one that no file system takes. A `secret` is never
    written or logged; a flag that is not `saved` belongs to one call and is left out of configs.

    `metadata` names the option's key in adapter files without its prefix `ss_` (True: the option's own name);
    with `per_folder` the key is written only for a run without `--dataset_config`. A run that resumes must
    agree on the value of a `resume` option. `off_at_zero`: 0 on a command line of training means unset.
    `acts_with` are the conditions under which the option acts (`config.effects`). An `essential` flag is in
    the short help.
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
    path: bool = False
    required: bool = False
    secret: bool = False
    saved: bool = True
    metadata: str | bool = False
    per_folder: bool = False
    resume: bool = False
    off_at_zero: bool = False
    acts_with: tuple[str, ...] = ()
    essential: bool = False


def option(default: object, help: str, **details: Any) -> Any:
    """A dataclass field that is a flag; `details` are the other fields of `Flag`."""
    return dataclasses.field(default=default, metadata={"flag": Flag(help, **details)})


def path(default: object, help: str, **details: Any) -> Any:
    """An option that names a file, a folder or a module; an empty text (an unset variable) is refused."""
    return option(default, help, blank=False, path=True, **details)


def quoted(value: object) -> str:
    """A user's value in quotes for a message, cut where it is long."""
    return shortened(repr(value), 160)


def pairs(name: str, items: Iterable[str]) -> dict[str, str]:
    """The texts `key=value` of the flag `name` as a dict of texts, split at the first `=` as kohya does.

    Raises `Refused` where `=` or the key is missing, and for a key given twice.
    """
    values: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        key = key.strip()
        if not equals or not key:
            example = shortened(key, 40) or "key"
            raise Refused(f"{name} {quoted(item)} is not of the form key=value; write e.g. {example}=1")
        if key in values:
            raise Refused(f"{name} has {key} twice ({values[key]} and {value}); give it once")
        values[key] = value
    return values


def literals(name: str, items: Iterable[str]) -> dict[str, Any]:
    """`key=value` texts of the flag `name`, values as Python literals (`betas=0.9,0.99` is a tuple)."""
    values = {}
    for key, text in pairs(name, items).items():
        try:
            values[key] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise Refused(
                f"{name} {shortened(f'{key}={text}', 160)}: the value is not a Python literal; write True, "
                f"0.1, (0.9,0.99), or a text with its own quotes: \"{key}='{text:.40}'\""
            ) from error
    return values


def resolution(text: str) -> tuple[int, int]:
    """`512` or `768,512` as (width, height)."""
    sides = [_number(int, part) for part in text.split(",")]
    if len(sides) not in (1, 2) or not all(side is not None and side >= 0 for side in sides):
        raise Refused(f"{quoted(text)} is not a number or 'width,height'; give e.g. 512 or 768,512")
    return sides[0], sides[-1]


def steps_or_share(text: str) -> float:
    """`100` as 100 steps; `0.1` and `10%` as the share 0.1."""
    value = _number(float, text.removesuffix("%"))
    if value is None:
        raise Refused(f"{quoted(text)} is not a number of steps, a share below 1, or a percentage")
    value = value / 100 if text.endswith("%") else value
    if value >= 1 and (value != int(value) or text.endswith("%")):
        raise Refused(f"{quoted(text)} is neither whole steps nor a share below 1")
    return int(value) if value >= 1 or value == 0 else value


def comma_floats(text: str) -> tuple[float, ...]:
    """`0.9,1.0` as (0.9, 1.0); −0.0 is 0.0."""
    values = [_number(float, part) for part in text.split(",")]
    if None in values:
        raise Refused(f"{quoted(text)} is not a list of numbers; give finite ones, e.g. 0.9,1.0")
    return tuple(value + 0.0 for value in values if value is not None)


def comma_words(text: str) -> tuple[str, ...]:
    """`attn.to_q,attn.to_k` as its parts."""
    words = tuple(part.strip() for part in text.split(",") if part.strip())
    if not words:
        raise Refused(f"{quoted(text)} names nothing; give e.g. attn.to_q,attn.to_k, or leave the flag out")
    return words


def ending(text: str) -> str:
    """A file's ending, with its dot: `txt` is `.txt`."""
    return text if not text or text.startswith(".") else f".{text}"


def file_name(text: str) -> str:
    """A file name without folder, to which endings and step numbers are added."""
    if not text or any(mark in text for mark in "/\\\0") or text in (".", ".."):
        raise Refused(f"{quoted(text)} is not a plain file name; give the folder with --output_dir")
    if (length := len(os.fsencode(text))) > 200:  # file systems take 255, and step numbers are added
        raise Refused(f"{text[:20]!r}… is {length} bytes long; give a name of 200 or less")
    return text


def scheduler(text: str) -> str:
    """The name of a learning-rate schedule, or `adafactor:RATE`; `adafactor` alone means the run's rate."""
    text = "adafactor:" if text.lower() == "adafactor" else text
    if text.lower() not in SCHEDULERS and not text.startswith("adafactor:"):
        raise Refused(f"{quoted(text)} is not one of {', '.join(SCHEDULERS)}{nearest(text, SCHEDULERS)}")
    return text if text.startswith("adafactor:") else text.lower()


class FlagSpec(NamedTuple):
    """One flag: its field, the type of one value, and whether it takes `many`."""

    name: str
    section: str  # the group's field in the record of options, and its table in a config file
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
        if "\0" in text:
            raise Refused(f"{quoted(text)} contains a NUL character; remove it")
        if self.flag.convert:
            return self.flag.convert(text.strip())
        value = parse_text(self.kind, text)
        if value is None:
            raise Refused(f"{quoted(text.strip())} is not {WORDS[self.kind]}")
        if self.kind is str and not self.flag.blank and not text.strip():
            raise Refused("the text is empty; give a value, or leave the flag out")
        if self.flag.path and max(map(len, os.fsencode(text).split(b"/"))) > 255:
            raise Refused(
                f"{quoted(text)} has a name of over 255 bytes, the limit of file systems; shorten it"
            )
        if (choices := self.flag.choices) and text not in choices:
            raise Refused(f"{quoted(text)} is not one of {', '.join(choices)}{nearest(text, choices)}")
        return value

    def from_toml(self, value: object) -> object:
        """The value of a TOML key by the rules of `from_text`; raises `Refused` where it does not fit."""
        if self.kind is bool:  # GUIs write 0 and 1
            if isinstance(value, int) and value in (0, 1):
                return bool(value)
            raise Refused(f"{quoted(value)} is not true or false")
        if isinstance(value, list) and self.flag.convert:
            value = ",".join(map(str, value))
        if self.many:
            if isinstance(value, dict):
                items = ", ".join(json.dumps(f"{key}={item}") for key, item in value.items())
                raise Refused(f"it is a table; write a list of texts instead: {self.name} = [{items}]")
            return tuple(self._item(item) for item in (value if isinstance(value, list) else [value]))
        return self._item(value)

    def _item(self, value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise Refused(f"{quoted(value)} is not {WORDS.get(self.kind, 'a text')}")
        if self.kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # interfaces write 1.0
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

    def check_range(self, label: str, value: object, where: str = "") -> None:
        """Raise `Refused` when a number of `value` is outside the limits.

        `label` is the flag as written and goes before the number in the message, `where` goes after it.
        """
        flag, unit = self.flag, f" {self.flag.unit}" if self.flag.unit else ""
        for item in value if isinstance(value, tuple) else (value,):
            if not isinstance(item, (int, float)) or isinstance(item, bool):
                continue
            given = f"{label} {_short(item)}{where}"
            if isinstance(item, int) and flag.high is None and flag.below is None and abs(item) >= LARGEST:
                raise Refused(f"{given} is not below {LARGEST}, the limit of whole numbers; give less")
            if flag.low is not None and not item >= flag.low:
                low = _short(flag.low)
                raise Refused(f"{given} is below {low}{unit}; give {low} or more")
            if flag.above is not None and not item > flag.above:
                raise Refused(f"{given} is not above {_short(flag.above)}{unit}; give more")
            if flag.high is not None and not item <= flag.high:
                high = _short(flag.high)
                raise Refused(f"{given} is above {high}{unit}; give {high} or less")
            if flag.below is not None and not item < flag.below:
                raise Refused(f"{given} is not below {_short(flag.below)}{unit}; give less")

    def read(self, label: str, value: object, where: str = "") -> Any:
        """The checked value of a key in a TOML or JSON file, named by `label` and `where` in messages."""
        try:
            checked = self.from_toml(value)
        except Refused as error:
            raise Refused(f"{label}{where}: {error}") from error
        self.check_range(label, checked, where)
        return checked


def _short(number: float) -> str:
    return shortened(str(number), 500) if isinstance(number, int) else f"{number:g}"


def check_fields(record: Any, where: str = "", mark: str = "--") -> None:
    """Raise `Refused` for a field of a record of options outside its choices or limits.

    `mark` goes before the option's name in the message, and `where` after its value.
    """
    for name, spec in fields_of(type(record)).items():
        value = getattr(record, name)
        if isinstance(value, str) and spec.flag.choices and value not in spec.flag.choices:
            known = spec.flag.choices
            raise Refused(
                f"{mark}{name} {value!r}{where} is unknown{nearest(value, known)}; choose one of "
                f"{', '.join(known)}"
            )
        spec.check_range(f"{mark}{name}", value, where)


def shown(value: object) -> str:
    """A value as a user would type it; nothing for one that is unset or off."""
    if value is None or value is False:
        return ""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@functools.cache  # reading the annotations takes most of the time of a command line
def _hints(group: type) -> dict[str, Any]:
    return typing.get_type_hints(group)


def fields_of(
    group: type, section: str = "", defaults: Mapping[str, object] | None = None
) -> dict[str, FlagSpec]:
    """The flags of one dataclass by name, in order; fields without a flag are left out."""
    hints, values = _hints(group), defaults or {}
    specs: dict[str, FlagSpec] = {}
    for field in dataclasses.fields(group):
        name, flag = field.name, field.metadata.get("flag")
        if flag is not None:
            kind, many = _value_type(hints[name])
            default = values.get(name, field.default)
            specs[name] = FlagSpec(name, section, group, kind, many and not flag.convert, default, flag)
    return specs


def parse_text(kind: type, text: str) -> Any:
    """A bool, a number or a text from one word of a command line; None if the word is not a `kind`."""
    if kind is bool:
        return TRUTH.get(text.strip().lower())
    return text if kind is str else _number(kind, text)


def _number(kind: type, text: str) -> Any:
    """A whole number of at most 4300 digits or a finite number; None if the text is none."""
    try:
        value = kind(text)
    except ValueError:
        return None
    return value if kind is int or math.isfinite(value) else None


def _value_type(hint: Any) -> tuple[type, bool]:
    """(type of one value, whether it is a list) of `int`, `float | None`, `tuple[str, ...]` …"""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False
