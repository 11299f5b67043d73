"""Old import paths that the documentation promised: they work for one more release, with a warning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any


def moved(old: str, new: str, renamed: Mapping[str, str] = MappingProxyType({})) -> Callable[[str], Any]:
    """The `__getattr__` of the module `old`, whose names are now in `new`, some of them `renamed`."""

    def attribute(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        today = renamed.get(name, name)
        value = getattr(importlib.import_module(new), today)
        warnings.warn(
            f"{old}.{name} is now {new}.{today}; change the import, the old path ends with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return value

    return attribute
