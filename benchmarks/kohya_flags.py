"""The flags of kohya sd-scripts' three trainers with their defaults, from the source of a checkout.

    SD_SCRIPTS=/path/to/sd-scripts python benchmarks/kohya_flags.py tests/golden/kohya_flags.json

Nothing of the checkout is run. Only functions that a trainer's `setup_parser` calls are read. The file holds
{trainer: {flag: default}}; a default that is no constant is its source text.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path
from typing import Any

TRAINERS = {"sd": "train_network.py", "sdxl": "sdxl_train_network.py", "flux": "flux_train_network.py"}


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def calls(node: ast.AST) -> list[ast.Call]:
    return [call for call in ast.walk(node) if isinstance(call, ast.Call)]


def constant(node: ast.AST) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def arguments(node: ast.AST) -> dict[str, Any]:
    """{flag: default} of the `add_argument` calls in a function."""
    found = {}
    for call in calls(node):
        names = [constant(word) for word in call.args]
        if getattr(call.func, "attr", "") == "add_argument" and str(names[0]).startswith("--"):
            options = {word.arg: constant(word.value) for word in call.keywords}
            default = options.get("default", False if options.get("action") == "store_true" else None)
            found |= {name[2:]: default for name in names}
    return found


def flags_of(checkout: Path, script: str) -> dict[str, Any]:
    """{flag: default} of a trainer."""
    library = {}
    for file in sorted((checkout / "library").glob("*.py")):
        library |= functions(file)
    found: dict[str, Any] = {}
    for name in dict.fromkeys((TRAINERS["sd"], script)):  # the others begin with the parser of the first
        setup = functions(checkout / name)["setup_parser"]
        for call in calls(setup):
            called = getattr(call.func, "attr", getattr(call.func, "id", ""))
            if called != "add_argument" and called.startswith("add_") and called in library:
                found |= arguments(library[called])
        found |= arguments(setup)
    return dict(sorted(found.items()))


def main() -> None:
    checkout = Path(os.environ["SD_SCRIPTS"])
    made = {name: flags_of(checkout, script) for name, script in TRAINERS.items()}
    Path(sys.argv[1]).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
