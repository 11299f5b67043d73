"""The shape of the tree: who imports whom, what is pure, what may change, how long a file is."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT

# What the parts below all others may import besides themselves; every other part may import all of them.
FOUNDATION = {
    "_moved": set(),
    "errors": set(),
    "files": {"errors"},
    "tensors": {"errors", "files"},
    "naming": {"errors"},
    "peft_config": {"errors", "files"},
    "peft_folder": {"errors", "tensors", "peft_config"},
    "unused_keys": {"errors"},
    "adapter_file": {"errors", "tensors", "naming", "peft_config", "peft_folder", "unused_keys"},
}
# What each part of `lowrank` may import besides itself and the foundation: imports point one way.
MAY_IMPORT = {
    "weights": set(),  # old import paths only
    "config": set(),
    "data": {"config"},
    "objective": {"config"},
    "plan": set(),
    "adapters": {"config"},
    "models": {"config"},  # the declarations of a family's options
    "laplace": {"adapters"},
    "bases": {"adapters", "laplace"},
    "formats": {"adapters", "bases"},
    "combine": {"adapters", "bases", "formats"},
    "train": {"config", "data", "objective", "adapters", "models", "plan"},
    "cli": {
        *("config", "data", "objective", "adapters", "models"),
        *("laplace", "bases", "formats", "combine", "train"),
    },
}
OLD_PATHS = ("lowrank.weights", "lowrank.adapters.kohya", "lowrank.adapters.plain")
NETWORKS_MAY_IMPORT = {*FOUNDATION, "adapters", "bases", "laplace"}
PURE = [f"adapters/{name}.py" for name in ("factor", "gate", "experts", "magnitude", "penalty", "rates")]
PURE += ["bases/krylov.py"]
LONG, TOO_LONG = 300, 400


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that a file of `package` imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def project_imports(file: Path) -> Iterator[tuple[int, str]]:
    package = ".".join(file.relative_to(ROOT).parent.parts)
    return (
        (line, module)
        for line, module in imports(parsed(file), package)
        if module.split(".")[0] in ("lowrank", "networks")
    )


def part_of(module: str) -> str:
    """`lowrank.bases.krylov.thin_qr` -> `bases`; `lowrank.__version__` -> an empty string."""
    part = [*module.split("."), ""][1]
    return part if part in FOUNDATION.keys() | MAY_IMPORT.keys() else ""


def test_import_table_is_complete():
    parts = {
        file.relative_to(ROOT / "lowrank").parts[0].removesuffix(".py") for file in python_files("lowrank")
    }
    unknown = parts - {"__init__"} - set(FOUNDATION) - set(MAY_IMPORT)
    assert not unknown, f"{unknown} of lowrank/ is missing in the tables above"


@pytest.mark.parametrize("file", python_files("lowrank"), ids=name)
def test_import_direction(file):
    part = part_of("lowrank." + file.relative_to(ROOT / "lowrank").parts[0].removesuffix(".py"))
    allowed = {part, ""} | (
        FOUNDATION[part] if part in FOUNDATION else {*FOUNDATION, *MAY_IMPORT.get(part, ())}
    )
    wrong = [
        f"{name(file)}:{line} imports {module}"
        for line, module in project_imports(file)
        if module.split(".")[0] == "networks" or part_of(module) not in allowed
    ]
    assert not wrong, f"{wrong}; lowrank.{part} may import {sorted(allowed)}"


def test_no_import_of_old_paths():
    """They exist for other people's code, which would not see the warning if ours used them too."""
    files = python_files("lowrank", "networks", "comfyui", "tools", "benchmarks", "tests")
    wrong = [
        f"{name(file)}:{line} imports {module}"
        for file in [*files, *ROOT.glob("*.py")]
        for line, module in project_imports(file)
        if f"{module}.".startswith(tuple(f"{old}." for old in OLD_PATHS))
    ]
    assert not wrong, f"{wrong}; import from the new path"


@pytest.mark.parametrize("file", python_files("lowrank"), ids=name)
def test_no_import_of_networks_by_name(file):
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            first = node.args[0] if node.args else None
            named = isinstance(first, ast.Constant) and str(first.value).startswith("networks")
            assert not named, f"{name(file)}:{node.lineno}: a network is found from --network_module"


@pytest.mark.parametrize("file", python_files("networks"), ids=name)
def test_imports_of_networks(file):
    """The same file must load beside a kohya checkout; a network may be composed of its neighbours."""
    for line, module in imports(parsed(file), "networks"):
        root = module.split(".")[0]
        known = (
            root in sys.stdlib_module_names
            or root in ("torch", "networks")
            or (root == "lowrank" and part_of(module) in NETWORKS_MAY_IMPORT)
        )
        assert known, f"{name(file)}:{line} imports {module}"
        assert module.split(".")[:2] != ["networks", "lora"], (
            f"{name(file)}:{line} imports networks.lora, which is kohya's in a kohya checkout; take what it "
            "shares from lowrank.adapters.method"
        )


# Every function that imports a module by a name, and what the name is from: the last alone may use a file.
IMPORTERS = {
    "lowrank/_moved.py": "old paths",
    "lowrank/cli/run.py": "the scripts",
    "lowrank/train/optim.py": "--optimizer_type and --lr_scheduler_type",
    "lowrank/train/network_module.py": "--network_module, in find_module",
    "lowrank/adapters/network_module.py": "network_named: networks.<identifier> with a façade of ours",
}
FIND_MODULE = {"lowrank/train/run.py", "lowrank/cli/resolve.py"}  # names from the command line and its files


def test_modules_are_imported_by_name_in_few_places():
    """A file of a stranger must not choose what is imported: readers call `network_named`."""
    importers, finders = [], set()
    for file in python_files("lowrank", "networks", "comfyui"):
        for node in (node for node in ast.walk(parsed(file)) if isinstance(node, ast.Call)):
            called = ast.unparse(node.func)
            assert called not in ("exec", "eval", "__import__", "compile"), f"{name(file)}:{node.lineno}"
            importers += [name(file)] if called.endswith("import_module") else []
            finders |= {name(file)} if called.endswith("find_module") else set()
    # cli/run.py has two: a command line, and its program
    assert sorted(importers) == sorted([*IMPORTERS, "lowrank/cli/run.py"]) and finders == FIND_MODULE


def test_json_is_read_with_bounds():
    """Files of strangers are read by `files.parse_json`, which bounds depth and numbers."""
    for file in python_files("lowrank", "networks", "comfyui"):
        for node in (node for node in ast.walk(parsed(file)) if isinstance(node, ast.Call)):
            called, words = ast.unparse(node.func), [ast.unparse(word) for word in node.args]
            copied = words and words[0].startswith("json.dumps(")  # a value as it would be read back
            raw = called in ("json.loads", "json.load") and not copied
            assert not raw or name(file) == "lowrank/files.py", (
                f"{name(file)}:{node.lineno}: use files.parse_json or files.read_json"
            )


def test_networks_has_no_init():
    """With one, Python would not merge the folder with a kohya checkout's `networks` on the same path."""
    assert not (ROOT / "networks" / "__init__.py").exists()


@pytest.mark.parametrize("file", [f for f in python_files("lowrank") if f.name == "__init__.py"], ids=name)
def test_init_files_hold_docstring_only(file):
    tree = parsed(file)
    assert ast.get_docstring(tree), f"{name(file)} says nothing about its package"
    rest = [
        node for node in tree.body[1:] if not (isinstance(node, ast.Assign) and file.parent.name == "lowrank")
    ]
    assert not rest, f"{name(file)}:{rest[0].lineno}: code belongs into a file of its own"


@pytest.mark.parametrize("file", sorted(ROOT.glob("*.py")), ids=name)
def test_root_script_is_short(file):
    text, tree = file.read_text(encoding="utf-8"), parsed(file)
    assert len(text.splitlines()) <= 10, f"{name(file)} is a program; move it to lowrank/cli"
    assert file.name in (ast.get_docstring(tree) or ""), (
        f"the docstring of {name(file)} shows no real command"
    )
    outside = [module for _, module in imports(tree, "") if not module.startswith("lowrank.cli")]
    assert not set(outside) - {"__future__.annotations"}, f"{name(file)} imports {outside}"


def is_module_class(node: ast.AST) -> bool:
    """`class X(nn.Module)` and `class X(Module)`."""
    return isinstance(node, ast.ClassDef) and any(
        ast.unparse(parent).split(".")[-1] == "Module" for parent in node.bases
    )


@pytest.mark.parametrize(
    "file", [ROOT / "lowrank" / p for p in PURE] + python_files("lowrank/objective"), ids=name
)
def test_mathematics_files_import_no_project_code(file):
    """No state and no project import: each is tested against its formula without ever meeting a model."""
    for node in ast.walk(parsed(file)):
        assert not is_module_class(node), f"{name(file)}:{node.lineno}: an nn.Module holds state"
    for line, module in project_imports(file):
        objective = file.parent.name == "objective"
        own = objective and module.startswith("lowrank.objective")
        options = objective and module.startswith("lowrank.config.objective")
        assert own or options or part_of(module) == "errors", f"{name(file)}:{line} imports {module}"


@pytest.mark.parametrize("file", python_files("lowrank", "networks"), ids=name)
def test_file_length_limit(file):
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= TOO_LONG, (
        f"{name(file)} has {lines} lines, more than {TOO_LONG}: it holds more than one idea"
    )


@pytest.mark.parametrize("file", python_files("lowrank", "networks", "tools", "comfyui"), ids=name)
def test_function_length_limit(file):
    functions = (node for node in ast.walk(parsed(file)) if isinstance(node, ast.FunctionDef))
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    long = {function: lines for function, lines in long.items() if lines > 60}
    assert not long, f"{name(file)}: functions over 60 lines, which hold more than one idea: {long}"


RIDDLES = {"told", "one", "found", "own", "held", "said"}  # names that do not tell what a value is


def bound_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a file assigns or defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, node.name


@pytest.mark.parametrize("file", python_files("lowrank", "networks", "tools", "comfyui"), ids=name)
def test_names_tell_what_a_value_is(file):
    riddles = [(line, bound) for line, bound in bound_names(parsed(file)) if bound.strip("_") in RIDDLES]
    assert not riddles, f"{name(file)}: line and name of identifiers that hide what they are: {riddles}"


def test_number_of_long_files():
    files = python_files("lowrank", "networks")
    long = [name(f) for f in files if len(f.read_text(encoding="utf-8").splitlines()) > LONG]
    assert len(long) <= len(files) // 5, f"more than a fifth of the core passes {LONG} lines: {long}"


CHANGES = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "clear", "remove"}


def is_table(node: ast.Assign | ast.AnnAssign) -> bool:
    """A constant: `NAMES = {...}` with something in it, or `__all__`. All else that can change is state."""
    target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
    label = ast.unparse(target)
    return label == "__all__" or (
        label.isupper() and isinstance(node.value, ast.Dict) and bool(node.value.keys)
    )


def mutable(value: ast.expr | None) -> bool:
    """A list, dict or set display or comprehension, or a call that makes one."""
    if isinstance(value, ast.Call):
        makers = ("list", "dict", "set", "bytearray", "defaultdict", "OrderedDict", "Counter", "deque")
        return ast.unparse(value.func).split(".")[-1] in makers
    return isinstance(value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp))


def writes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of every constant of this file, or of a `module.NAME`, that is changed or rebound."""
    bound = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    bound += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    own = {ast.unparse(target) for target in bound}
    for node in ast.walk(tree):
        target = None
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            target = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            target = node.func.value if node.func.attr in CHANGES else None
        elif isinstance(node, ast.Global):
            yield from ((node.lineno, label) for label in node.names)
        foreign = isinstance(target, ast.Attribute) and target.attr.isupper()
        if foreign or (isinstance(target, ast.Name) and target.id in own):
            yield node.lineno, ast.unparse(target)


@pytest.mark.parametrize("file", python_files("lowrank", "networks"), ids=name)
def test_no_mutable_module_state(file):
    """Two networks in one process must never meet: no registry, no cache, only constants that none writes."""
    tree = parsed(file)
    bodies = [tree.body, *(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
    for node in (node for body in bodies for node in body if isinstance(node, (ast.Assign, ast.AnnAssign))):
        state = mutable(node.value) and not is_table(node)
        assert not state, f"{name(file)}:{node.lineno}: {ast.unparse(node)[:60]} can be changed"
    changed = list(writes(tree))
    assert not changed, f"{name(file)}: line and name of constants that are written: {changed}"


# Roles that every program's files have; the others belong to one method, and to the table of names.
COMMON_ROLES = {"up", "down", "alpha", "magnitude"}
OWN_NAMES = ("naming/keys.py", "cli/lycoris_config.py")  # the table; LyCORIS' own names of algorithms
READERS = (
    "naming/keys.py",
    "adapter_file.py",
    "adapters/layer.py",
)  # layer.py: torch's state dict of one layer


def literals_of_methods() -> list[str]:
    """Where core files spell the name of a method or of a role that is one method's."""
    from lowrank.adapters.network_module import network_named

    methods = {file.stem for file in python_files("networks")}
    roles = {role for name_ in methods for role in network_named(name_).made({}).file_roles()}
    words = methods | roles - COMMON_ROLES
    return [
        f"{name(file)}:{node.lineno} {node.value}"
        for file in python_files("lowrank", "comfyui")
        if not name(file).endswith(OWN_NAMES)
        and not name(file).startswith(("lowrank/models", "lowrank/naming"))
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Constant) and node.value in words
    ]


def test_no_role_or_method_names_in_core_files():
    """A method declares the tensors of its files once; core files use that, or the one table of names."""
    spelled = literals_of_methods()
    assert len(spelled) < 20, "\n".join(spelled)


def splits_keys(tree: ast.Module) -> Iterator[int]:
    """Lines of loops over the items of a dictionary that take the key apart, as a reader of tensors does."""
    parts = ("partition", "rpartition", "split", "rsplit", "removesuffix")
    for node in ast.walk(tree):
        comprehension = isinstance(node, (ast.ListComp, ast.DictComp, ast.GeneratorExp))
        for loop in node.generators if comprehension else [node]:
            over = loop.iter if isinstance(loop, (ast.For, ast.comprehension)) else None
            if not (isinstance(over, ast.Call) and ast.unparse(over.func).endswith(".items")):
                continue
            first = loop.target.elts[0] if isinstance(loop.target, ast.Tuple) else loop.target
            taken = {f"{ast.unparse(first)}.{part}" for part in parts}
            calls = (one for one in ast.walk(node) if isinstance(one, ast.Call))
            yield from {call.lineno for call in calls if ast.unparse(call.func) in taken}


def test_one_reader_of_adapter_files():
    """`adapter_file` alone turns keys into modules and roles."""
    files = [file for file in python_files("lowrank", "comfyui") if not name(file).endswith(READERS)]
    wrong = [
        f"{name(file)}:{node.lineno} calls role_of"
        for file in files
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Attribute) and node.attr == "role_of"
    ]
    folders = ("lowrank/adapters", "lowrank/formats", "lowrank/combine", "comfyui")
    wrong += [
        f"{name(file)}:{line} takes keys apart"
        for file in files
        if name(file).startswith(folders)
        for line in splits_keys(parsed(file))
    ]
    assert not wrong, wrong
    assert list(splits_keys(ast.parse("for k, v in state.items():\n    k.rpartition('.')"))) == [2]


def test_tree_rules_detect_violations():
    """The readers above see what they should, and nothing else."""
    source = "def f():\n    from ..adapters import layer\nfrom . import names\nimport networks.lora"
    seen = {module for _, module in imports(ast.parse(source), "lowrank.formats")}
    assert seen == {"lowrank.adapters.layer", "lowrank.formats.names", "networks.lora"}
    assert part_of("lowrank.bases.krylov") == "bases"
    assert part_of("lowrank.__version__") == part_of("lowrank") == ""
    for text in ("[]", "{}", "dict(a=1)", "{x for x in y}", "collections.deque()"):
        assert mutable(ast.parse(text, mode="eval").body)
    for text in ("()", "MappingProxyType({})", "3"):
        assert not mutable(ast.parse(text, mode="eval").body)
    assert is_table(ast.parse("NAMES: Mapping = {1: 2}").body[0])
    for text in ("CACHE = {}", "seen = {1: 2}", "KNOWN = [1]"):
        assert not is_table(ast.parse(text).body[0])
    written = [
        "T = {1: 2}",
        "T[0] = 1",
        "del a.T[0]",
        "T.update(x)",
        "def f():",
        "    global T",
        "    R[0] = T[0]",
    ]
    assert [line for line, _ in writes(ast.parse("\n".join(written)))] == [2, 3, 4, 6]
    assert is_module_class(ast.parse("class A(nn.Module): pass").body[0])
