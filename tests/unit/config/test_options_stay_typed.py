"""Options behind the parser are attributes of typed records: no lookup by a flag's name as a text."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

from lowrank.config.flux import FluxTrainOptions
from lowrank.config.sd import SdTrainOptions, SdxlTrainOptions

ROOT = next(folder for folder in Path(__file__).parents if (folder / "lowrank").is_dir())
BEHIND = [
    file
    for file in sorted((ROOT / "lowrank").rglob("*.py"))
    if file.relative_to(ROOT / "lowrank").parts[0] not in ("cli", "config")
]


def lookups(tree: ast.Module) -> list[int]:
    """Lines of `….value("name")` and of `getattr(options, …)`."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first = node.args[0] if node.args else None
        by_text = isinstance(first, ast.Constant) and isinstance(first.value, str)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "value" and by_text:
            found.append(node.lineno)
        is_getattr = isinstance(node.func, ast.Name) and node.func.id == "getattr"
        if is_getattr and isinstance(first, ast.Name) and first.id in ("options", "parsed"):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("file", BEHIND, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_option_is_looked_up_by_name(file):
    assert not lookups(ast.parse(file.read_text(encoding="utf-8")))


def test_lookup_by_name_is_recognised():
    assert lookups(ast.parse('job.value("seed")\ngetattr(options, name)\ngroup.value(measure)')) == [1, 2]


@pytest.mark.parametrize("options", [FluxTrainOptions, SdTrainOptions, SdxlTrainOptions])
def test_no_group_of_options_is_any(options):
    for field in dataclasses.fields(options):
        assert "Any" not in str(field.type)
