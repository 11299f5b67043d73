"""`--dataset_config`: TOML or JSON with `[general]`, `[[datasets]]`, `[[datasets.subsets]]`, read strictly.

Key names, levels and the order of lookup (subset, dataset, general, command line, built-in) are those of
kohya sd-scripts.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowrank.config.flag import quoted
from lowrank.data.dataset import DATASET_FIELDS, SUBSET_FIELDS, Dataset, Subset, make_subset, split_values
from lowrank.errors import Refused, nearest
from lowrank.files import CONFIG, parse_json, parse_toml, read_text

log = logging.getLogger(__name__)

_KEYS = DATASET_FIELDS | SUBSET_FIELDS
_ONLY_IN_SUBSETS = ("image_dir", "is_reg", "metadata_file", "conditioning_data_dir")
_NOT_WITH_METADATA = ("is_reg", "class_tokens", "caption_extension")  # a metadata file has the captions
_WITHOUT_EFFECT = {  # keys of sd-scripts that change nothing here
    "network_multiplier": "it has no effect in sd-scripts either",
    "cache_info": "scanning reads only the heads of files and needs no cache",
}
_UNSUPPORTED = {  # keys of sd-scripts that would change the training
    "face_crop_aug_range": "crop the images beforehand, or set random_crop",
}


def from_config(
    path: str | os.PathLike, defaults: Mapping[str, Any] | None = None, *, allow_unknown: bool = False
) -> tuple[Dataset, ...]:
    """The datasets of a file; `defaults` are the command line's values, named as in `Dataset` and `Subset`.

    Raises `Refused` with file, table and key for a file that cannot be parsed, an unknown key (a warning with
    `allow_unknown`), a value of another type, a missing `image_dir`, and a folder that does not exist.
    Relative folders start at the current folder. `image_dir` is a plain folder: the number in a name like
    `10_cat` is not read.
    """
    path = Path(path)
    reader = _Reader(path, allow_unknown)
    tree = _parsed(path)
    reader.check_table("", tree, ("general", "datasets"))
    general = reader.values("general", tree.get("general", {}), tuple(_KEYS))
    given = dict(defaults or {}) | general
    tables = reader.tables("datasets", tree.get("datasets"))
    return tuple(reader.dataset(f"datasets[{i}]", table, given) for i, table in enumerate(tables))


def _parsed(path: Path) -> dict[str, Any]:
    text, where = read_text(path, "dataset_config", CONFIG), f"dataset_config {path}"
    tree = parse_json(text, where) if path.suffix.lower() == ".json" else parse_toml(text, where)
    if not isinstance(tree, dict):
        raise Refused(
            f"dataset_config {path} is a {type(tree).__name__} at the top; write an object with 'datasets'"
        )
    return tree


class _Reader:
    """Checks the tables of one file; errors name the table and the key."""

    def __init__(self, path: Path, allow_unknown: bool) -> None:
        self._path, self._allow_unknown = path, allow_unknown

    def _refused(self, table: str, problem: str) -> Refused:
        return Refused(f"{self._path}, {table or 'top level'}: {problem}")

    def check_table(self, where: str, table: object, known: tuple[str, ...]) -> dict[str, Any]:
        """The table without keys that have no effect. Raises `Refused` for the first unknown key."""
        if not isinstance(table, dict):
            raise self._refused(where, f"is {_shown(table)}, not a table")
        kept = {}
        for key, value in table.items():
            if key in known:
                kept[key] = value
            elif key == "custom_attributes":
                kept |= self._attributes(where, value)
            elif key in _WITHOUT_EFFECT:
                log.warning("%s, %s: %s is ignored: %s", self._path, where, key, _WITHOUT_EFFECT[key])
            elif key in _UNSUPPORTED:
                raise self._refused(where, f"key {key!r} of sd-scripts is not supported; {_UNSUPPORTED[key]}")
            elif self._allow_unknown:
                log.warning(
                    "%s, %s: unknown key %r is ignored%s", self._path, where, key, nearest(key, known)
                )
            else:
                elsewhere = key in _ONLY_IN_SUBSETS or key in _KEYS
                way_out = (
                    " at this level; move it" if elsewhere else f"{nearest(key, known)}; correct or remove it"
                )
                raise self._refused(where, f"unknown key {quoted(key)}{way_out}")
        return kept

    def _attributes(self, where: str, value: object) -> dict[str, Any]:
        """The part of `custom_attributes` that sd-scripts uses: differential output preservation."""
        if not isinstance(value, dict):
            raise self._refused(where, f"custom_attributes is {_shown(value)}, not a table")
        if unused := [key for key in value if key != "diff_output_preservation"]:
            log.warning(
                "%s, %s: custom_attributes %s has no effect; only diff_output_preservation is used",
                self._path,
                where,
                ", ".join(unused),
            )
        return {key: value[key] for key in value if key not in unused}

    def tables(self, where: str, value: object) -> list[object]:
        """A non-empty list of tables."""
        if not isinstance(value, list) or not value:
            raise self._refused(
                where, f"is {_shown(value)}; it must be one or more [[{where.split('.')[-1]}]] tables"
            )
        return value

    def values(self, where: str, table: object, known: tuple[str, ...]) -> dict[str, Any]:
        """The checked values of a table above the subsets, which has no keys of a single folder."""
        known = tuple(key for key in known if key not in _ONLY_IN_SUBSETS)
        kept = self.check_table(where, table, known)
        return {key: self._value(where, key, value) for key, value in kept.items() if key != "subsets"}

    def _value(self, where: str, key: str, value: object) -> Any:
        return _KEYS[key].read(f"{self._path}, {where}: {key}", value)

    def dataset(self, where: str, table: object, given: Mapping[str, Any]) -> Dataset:
        """One `[[datasets]]` table with its subsets; missing values come from `given`."""
        if not isinstance(table, dict):
            raise self._refused(where, f"is {_shown(table)}, not a table")
        given = dict(given) | self.values(where, table, (*_KEYS, "subsets"))
        tables = self.tables(f"{where}.subsets", table.get("subsets"))
        subsets = tuple(self._subset(f"{where}.subsets[{i}]", item, given) for i, item in enumerate(tables))
        if len({subset.metadata_file is None for subset in subsets}) > 1:
            raise self._refused(
                where, "has subsets with and without metadata_file; give each kind a [[datasets]] of its own"
            )
        with self._named(where):
            return Dataset(subsets, **split_values(given)[0])

    def _subset(self, where: str, table: object, given: Mapping[str, Any]) -> Subset:
        kept = self.check_table(where, table, tuple(SUBSET_FIELDS))
        values = {key: self._value(where, key, value) for key, value in kept.items()}
        listed = values.get("metadata_file")
        if listed and (excluded := [key for key in _NOT_WITH_METADATA if key in values]):
            raise self._refused(
                where, f"{excluded[0]} has no meaning beside metadata_file {listed}; remove one"
            )
        if not listed and "image_dir" not in values:
            raise self._refused(where, "image_dir is missing; give the folder of this subset's images")
        folder = Path(values.get("image_dir", Path(listed or "").parent))
        if not os.path.isdir(folder):
            raise self._refused(
                where,
                f"image_dir {folder} is not a folder (seen from {Path.cwd()}); correct the path",
            )
        inherited = split_values(given)[1]
        if values.get("is_reg"):
            inherited.pop("conditioning_data_dir", None)  # that of the command line is for training images
        with self._named(where):
            return make_subset(folder, inherited | values)

    @contextlib.contextmanager
    def _named(self, where: str) -> Iterator[None]:
        """Put file and table before the message of a `Refused`."""
        try:
            yield
        except Refused as error:
            raise self._refused(where, str(error)) from error


def _shown(value: object) -> str:
    kinds = {type(None): "missing", dict: "a table", list: f"the list {quoted(value)}"}
    return kinds.get(type(value), f"{quoted(value)} ({type(value).__name__})")
