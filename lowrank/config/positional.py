"""Words of a command line that stand without a flag, as values of flags: `A B` as --source A --target B."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence

from lowrank.config.command_line import CommandLine, Parsed
from lowrank.config.flag import FlagSpec

_TRUTH = ("true", "false", "yes", "no", "0", "1")


def parse_words(command: CommandLine, argv: Sequence[str] | None, names: Sequence[str]) -> Parsed:
    """The options of `argv` (None: `sys.argv[1:]`), whose words without a flag are values of `names`."""
    words = sys.argv[1:] if argv is None else argv
    return command.parse(name_positional(words, command.specs.values(), names))


def name_positional(argv: Sequence[str], specs: Iterable[FlagSpec], names: Sequence[str]) -> list[str]:
    """`argv` with the flags `names` in front of the words that belong to no flag, in order.

    A flag of several values takes all words that are left. Words beyond the last flag stay as they are.
    """
    by_name = {name: spec for spec in specs for name in spec.names}
    words, loose, waiting = [], [], None
    for word in argv:
        if word.startswith("--"):
            waiting = None if "=" in word else by_name.get(word)
            words.append(word)
        elif waiting is not None and (waiting.kind is not bool or word.lower() in _TRUTH):
            waiting = waiting if waiting.many else None
            words.append(word)
        else:
            waiting = None
            loose.append(word)
    return [*_named(loose, by_name, names), *words]


def _named(loose: list[str], by_name: Mapping[str, FlagSpec], names: Sequence[str]) -> list[str]:
    named: list[str] = []
    for name in names:
        count = len(loose) if by_name[f"--{name}"].many else 1
        taken, loose = loose[:count], loose[count:]
        if taken:
            named += [f"--{name}", *taken]
    return [*loose, *named]
