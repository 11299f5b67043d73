"""The two commands of README.md, the environment they share, and what they find in a fresh clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
from recorder import bash, call, tree, value
from repository import ROOT

__all__ = ["tree"]  # a fixture

SCRIPTS = [
    ROOT / ".ci" / "run",
    *(file for folder in (".", "flux_dir", "test", "tools") for file in sorted((ROOT / folder).glob("*.sh"))),
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_readme_commands_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first_two = re.findall(r"^bash (\S+\.sh)", readme, flags=re.MULTILINE)[:2]
    assert first_two == ["run_demo.sh", "run_tests.sh"]
    named = set(re.findall(r"bash ((?:\w+/)*\w+\.sh)", readme))
    assert not [script for script in named if not (ROOT / script).is_file()]


def test_executables_are_executable():
    # A library that is only sourced is not one of them.
    sourced = {"common.sh", "find_python.sh"}
    assert [file.name for file in SCRIPTS if not os.access(file, os.X_OK) and file.name not in sourced] == []


def test_setup_installs_torch_first(tree, tmp_path):
    done, calls = bash(tree, "tools/setup_env.sh", "dev", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made, torch, rest = [c["arguments"] for c in calls]
    assert made == ["-m", "venv", ".venv"]
    pinned = re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[0]
    assert torch[:3] == ["-m", "pip", "install"] and torch[-1] == pinned and "constraints.txt" in torch
    assert rest[-2:] == ["-r", "requirements-dev.txt"] and "constraints.txt" in rest
    assert not [word for word in torch + rest if "index" in word]

    assert bash(tree, "tools/setup_env.sh", "dev", cwd=tmp_path)[1] == []
    assert bash(tree, "tools/setup_env.sh", cwd=tmp_path)[1] == [], "'dev' holds what 'run' needs"
    with (tree / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert len(bash(tree, "tools/setup_env.sh", cwd=tmp_path)[1]) == 2


def test_failed_installation_is_retried(tree):
    done, _ = bash(tree, "tools/setup_env.sh", STUB_PIP_FAILS="1")
    assert done.returncode == 1 and "the installation failed" in done.stderr
    assert list((tree / ".venv").glob("installed*")) == []
    done, calls = bash(tree, "tools/setup_env.sh")
    assert done.returncode == 0 and len(calls) == 2
    with (tree / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    bash(tree, "tools/setup_env.sh", STUB_PIP_FAILS="1")
    assert list((tree / ".venv").glob("installed*")) == [], (
        "the old stamp would pass for the new requirements"
    )


def test_failed_venv_is_removed(tree):
    done, _ = bash(tree, "tools/setup_env.sh", STUB_VENV_FAILS="1")
    assert done.returncode == 1 and "python3-venv" in done.stderr
    assert not (tree / ".venv").exists()


def test_broken_environment_is_named(tree):
    (tree / ".venv").mkdir()
    done, calls = bash(tree, "tools/setup_env.sh")
    assert done.returncode == 1 and "delete the folder .venv" in done.stderr and calls == []


def test_old_python_is_refused(tree):
    tools = tree / "few"
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(shutil.which(name))
    old = tools / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2 && exit 0\nexit 1\n')
    old.chmod(0o755)
    done, _ = bash(tree, "tools/setup_env.sh", PYTHON="", PATH=str(tools))
    assert done.returncode == 1
    assert "no Python 3.10 or newer found (python3 is Python 3.9.2)" in done.stderr


def test_test_command_and_ci_run_whole_suite(tree):
    bash(tree, "tools/setup_env.sh", "dev")
    for script, given in (("run_tests.sh", ("tests/contract/test_tree.py", "-x")), (".ci/run", ())):
        arguments, environment = call(tree, script, *given)
        assert arguments == ["-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", *given]
        assert environment["OMP_NUM_THREADS"] == "1"
    arguments, _ = call(tree, "run_tests.sh", "--fast", "-x")
    assert arguments[-3:] == ["-m", "not slow", "-x"]
    assert call(tree, "run_tests.sh", OMP_NUM_THREADS="2")[1]["OMP_NUM_THREADS"] == "2"


def test_exit_code_of_test_command(tree):
    bash(tree, "tools/setup_env.sh", "dev")
    (tree / ".venv" / "bin" / "python").write_text(
        f'#!/bin/sh\n[ "$1" = -m ] && echo "1 failed, 2 passed" && exit 7\nexec {sys.executable} "$@"\n'
    )
    done, _ = bash(tree, ".ci/run")
    assert done.returncode == 7 and done.stdout.endswith("1 failed, 2 passed\n")


TRAINERS = {"sd15": "train_network_ABM.py", "sdxl": "sdxl_train_network_ABM.py"}


@pytest.mark.parametrize("family", ["flux", "sd15", "sdxl"])
def test_demo_runs_the_documented_commands(tree, family):
    out = f"demo_output/{family}"
    for finished in ("style", "content"):  # an earlier run's results
        (tree / out / finished).mkdir(parents=True)
        (tree / out / finished / "old").touch()
    (tree / out / "mine.txt").touch()
    done, calls = bash(tree, "run_demo.sh", *(() if family == "flux" else ("--family", family)))
    assert done.returncode == 0, done.stderr
    ours = [c for c in calls if c["arguments"][1] not in ("venv", "pip")]
    scripts = [next(a for a in c["arguments"] if a.endswith(".py")).removeprefix("./") for c in ours]
    trained = 2 * [TRAINERS[family]] if family in TRAINERS else 3 * ["flux_train_qrlora.py"]
    residual = ["save_flux_residual.py"] if family == "flux" else []
    drawn = [*(3 * ["inference_merge.py"]), "tools/score_pictures.py", "visualize_similarity.py"]
    assert scripts == [*trained, *residual, *drawn]
    for c in ours:
        if "tools/score_pictures.py" not in c["arguments"]:
            assert value(c["arguments"], "--output_dir").startswith(f"{out}/")
            assert c["environment"]["CUDA_VISIBLE_DEVICES"] == ""
        assert c["environment"]["OMP_NUM_THREADS"] == "1"
    models = {value(c["arguments"], "--pretrained_model_name_or_path") for c in ours[:2]}
    assert models == {f"assets/demo/{family}"} and f"assets/demo/{family}" in ours[-3]["arguments"]
    assert f"replacing {out}/style of an earlier run" in done.stdout
    assert not (tree / out / "style" / "old").exists()
    assert (tree / out / "mine.txt").exists()
    assert f"{out}/images/" in done.stdout and f"{out}/similarity/" in done.stdout


@pytest.mark.parametrize("given", [["--family", "sd3"], ["flux"], ["--family"], ["--family", "flux", "0"]])
def test_demo_usage_message(tree, given):
    done, calls = bash(tree, "run_demo.sh", *given)
    assert done.returncode == 2 and "usage" in done.stderr and not calls


def test_failed_demo_step_is_named(tree):
    bash(tree, "tools/setup_env.sh")
    stub = tree / ".venv" / "bin" / "python"
    stub.write_text(stub.read_text() + "    if any('inference_merge' in a for a in arguments): sys.exit(3)\n")
    done, _ = bash(tree, "run_demo.sh")
    assert done.returncode == 3 and "step 5 of 8 failed" in done.stderr


@pytest.mark.parametrize("place", ["sty/cat/sty_cat.png", "cnt/dog/cnt_dog.png"])
def test_shipped_picture(place):
    from PIL import Image

    file = ROOT / "assets" / place
    with Image.open(file) as picture:
        assert picture.size == (64, 64) and picture.mode == "RGB"
    assert file.stat().st_size < 20_000
    assert [p.name for p in file.parent.iterdir()] == [file.name], "a training folder holds pictures only"
    assert place in (ROOT / "assets" / "README.md").read_text()
