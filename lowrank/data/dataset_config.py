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
from lowrank.errors import Refused, joined, nearest, reasons_of
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
    `allow_unknown`), a value of another type, a missing `image_dir`, and a folder that does not exist; all of
    them together.
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
    datasets = [reader.dataset(f"datasets[{i}]", table, given) for i, table in enumerate(tables)]
    if reader.problems:
        raise joined(f"{path} has several problems", reader.problems)
    return tuple(dataset for dataset in datasets if dataset is not None)


def _parsed(path: Path) -> dict[str, Any]:
    text, where = read_text(path, "dataset_config", CONFIG), f"dataset_config {path}"
    tree = parse_json(text, where) if path.suffix.lower() == ".json" else parse_toml(text, where)
    if not isinstance(tree, dict):
        raise Refused(
            f"dataset_config {path} is a {type(tree).__name__} at the top; write an object with 'datasets'"
        )
    return tree


class _Reader:
    """Checks the tables of one file. `problems` name the table and the key; what has one is left out."""

    def __init__(self, path: Path, allow_unknown: bool) -> None:
        self._path, self._allow_unknown = path, allow_unknown
        self.problems: list[str] = []
        self._values_read = True  # whether every value was; without one, records are not made and checked

    def _problem(self, table: str, problem: str) -> None:
        self.problems.append(f"{self._path}, {table or 'top level'}: {problem}")

    def check_table(self, where: str, table: object, known: tuple[str, ...]) -> dict[str, Any]:
        """The table without keys that have no effect or are unknown."""
        if not isinstance(table, dict):
            self._problem(where, f"is {_shown(table)}, not a table")
            return {}
        kept = {}
        for key, value in table.items():
            if key in known:
                kept[key] = value
            elif key == "custom_attributes":
                kept |= self._attributes(where, value)
            elif key in _WITHOUT_EFFECT:
                log.warning("%s, %s: %s is ignored: %s", self._path, where, key, _WITHOUT_EFFECT[key])
            elif key in _UNSUPPORTED:
                self._problem(where, f"key {key!r} of sd-scripts is not supported; {_UNSUPPORTED[key]}")
            elif self._allow_unknown:
                log.warning(
                    "%s, %s: unknown key %r is ignored%s", self._path, where, key, nearest(key, known)
                )
            else:
                elsewhere = key in _ONLY_IN_SUBSETS or key in _KEYS
                way_out = (
                    " at this level; move it" if elsewhere else f"{nearest(key, known)}; correct or remove it"
                )
                self._problem(where, f"unknown key {quoted(key)}{way_out}")
        return kept

    def _attributes(self, where: str, value: object) -> dict[str, Any]:
        """The part of `custom_attributes` that sd-scripts uses: differential output preservation."""
        if not isinstance(value, dict):
            self._problem(where, f"custom_attributes is {_shown(value)}, not a table")
            return {}
        if unused := [key for key in value if key != "diff_output_preservation"]:
            log.warning(
                "%s, %s: custom_attributes %s has no effect; only diff_output_preservation is used",
                self._path,
                where,
                ", ".join(unused),
            )
        return {key: value[key] for key in value if key not in unused}

    def tables(self, where: str, value: object) -> list[object]:
        """A list of tables, which must not be empty."""
        if not isinstance(value, list) or not value:
            self._problem(
                where, f"is {_shown(value)}; it must be one or more [[{where.split('.')[-1]}]] tables"
            )
            return []
        return value

    def values(self, where: str, table: object, known: tuple[str, ...]) -> dict[str, Any]:
        """The checked values of a table above the subsets, which has no keys of a single folder."""
        known = tuple(key for key in known if key not in _ONLY_IN_SUBSETS)
        kept = self.check_table(where, table, known)
        return self._read(where, {key: value for key, value in kept.items() if key != "subsets"})

    def _read(self, where: str, table: Mapping[str, object]) -> dict[str, Any]:
        """The values of a table that can be read."""
        values: dict[str, Any] = {}
        for key, value in table.items():
            try:
                values[key] = _KEYS[key].read(f"{self._path}, {where}: {key}", value)
            except Refused as error:
                self.problems += reasons_of(error)
                self._values_read = False
        return values

    def dataset(self, where: str, table: object, given: Mapping[str, Any]) -> Dataset | None:
        """One `[[datasets]]` table with its subsets; missing values come from `given`."""
        if not isinstance(table, dict):
            self._problem(where, f"is {_shown(table)}, not a table")
            return None
        given = dict(given) | self.values(where, table, (*_KEYS, "subsets"))
        tables = self.tables(f"{where}.subsets", table.get("subsets"))
        made = [self._subset(f"{where}.subsets[{i}]", item, given) for i, item in enumerate(tables)]
        subsets = tuple(subset for subset in made if subset is not None)
        if len({subset.metadata_file is None for subset in subsets}) > 1:
            self._problem(
                where, "has subsets with and without metadata_file; give each kind a [[datasets]] of its own"
            )
        if self._values_read:
            with self._named(where):
                return Dataset(subsets, **split_values(given)[0])
        return None

    def _subset(self, where: str, table: object, given: Mapping[str, Any]) -> Subset | None:
        kept = self.check_table(where, table, tuple(SUBSET_FIELDS))
        values = self._read(where, kept)
        listed = values.get("metadata_file")
        if listed and (excluded := [key for key in _NOT_WITH_METADATA if key in values]):
            self._problem(where, f"{excluded[0]} has no meaning beside metadata_file {listed}; remove one")
        if not listed and "image_dir" not in kept:
            self._problem(where, "image_dir is missing; give the folder of this subset's images")
            return None
        folder = Path(values.get("image_dir", Path(listed or "").parent))
        if not os.path.isdir(folder):
            self._problem(
                where, f"image_dir {folder} is not a folder (seen from {Path.cwd()}); correct the path"
            )
        if not self._values_read:
            return None
        inherited = split_values(given)[1]
        if values.get("is_reg"):
            inherited.pop("conditioning_data_dir", None)  # that of the command line is for training images
        with self._named(where):
            return make_subset(folder, inherited | values)
        return None

    @contextlib.contextmanager
    def _named(self, where: str) -> Iterator[None]:
        """Add the reasons of a `Refused` to the problems, with file and table before them."""
        try:
            yield
        except Refused as error:
            for reason in reasons_of(error):
                self._problem(where, reason)


def _shown(value: object) -> str:
    kinds = {type(None): "missing", dict: "a table", list: f"the list {quoted(value)}"}
    return kinds.get(type(value), f"{quoted(value)} ({type(value).__name__})")
