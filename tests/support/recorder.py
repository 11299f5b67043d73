"""The shell scripts in a folder of their own, with a python that writes down how it is called."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from repository import ROOT

# Answers every `-c` question for real, pretends to make environments and to install, and records the rest.
STUB = """
    #!{python}
    import json, os, shutil, sys
    arguments, log = sys.argv[1:], os.environ["STUB_LOG"]
    if arguments[:1] == ["-V"]:
        print("Python 3.99.0")
    elif arguments[:1] == ["-c"]:
        if "find_spec" in arguments[1]:
            sys.exit(int(os.environ.get("STUB_LACKS_ACCELERATE", "0")))
        if "import torch" not in arguments[1]:
            sys.argv = ["-c", *arguments[2:]]
            exec(arguments[1])
    else:
        with open(log, "a") as file:
            file.write(json.dumps({{"arguments": arguments, "environment": dict(os.environ)}}) + "\\n")
        if arguments[:2] == ["-m", "venv"]:
            os.makedirs(arguments[2] + "/bin")
            if os.environ.get("STUB_VENV_FAILS"):
                sys.exit(1)
            shutil.copy(__file__, arguments[2] + "/bin/python")
        if arguments[:2] == ["-m", "pip"] and os.environ.get("STUB_PIP_FAILS"):
            sys.exit(1)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The scripts of the repository in a folder of their own, with the stub as `stub/python3`."""
    root = tmp_path / "a clone"
    for folder in ("flux_dir", "test", "tools", ".ci"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("*.py", "*.safetensors"))
    for family in ("flux", "sd15", "sdxl"):
        (root / "assets/demo" / family).mkdir(parents=True)
        (root / "assets/demo" / family / "model_index.json").touch()
    for name in (
        "run_tests.sh",
        "run_demo.sh",
        "requirements.txt",
        "requirements-dev.txt",
        "constraints.txt",
    ):
        shutil.copy(ROOT / name, root)
    stub = root / "stub" / "python3"
    stub.parent.mkdir()
    stub.write_text(textwrap.dedent(STUB).lstrip().format(python=sys.executable))
    stub.chmod(0o755)
    return root


def bash(tree: Path, script: str, *arguments: str, cwd: Path | None = None, **environment: str):
    """Run a script of the tree; returns the finished process and the recorded calls of python."""
    log = tree / "calls.jsonl"
    log.unlink(missing_ok=True)
    clean = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR", "LANG")}
    clean |= {"STUB_LOG": str(log), "PYTHON": str(tree / "stub" / "python3")} | environment
    command = ["bash", str(tree / script) if cwd else script, *arguments]
    done = subprocess.run(command, cwd=cwd or tree, env=clean, capture_output=True, text=True, timeout=60)
    calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return done, calls


def call(tree: Path, script: str, *arguments: str, **kwargs) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of the one python call that `script` ends in."""
    done, calls = bash(tree, script, *arguments, **kwargs)
    assert done.returncode == 0, done.stderr
    assert len(calls) == 1
    return calls[0]["arguments"], calls[0]["environment"]


def value(arguments: list[str], flag: str) -> str:
    """The value after the last `flag`, as argparse would read it."""
    return arguments[len(arguments) - 1 - arguments[::-1].index(flag) + 1]
