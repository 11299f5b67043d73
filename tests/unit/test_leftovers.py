"""What killed processes leave in a folder, and that removing and replacing folders survives a kill."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank import files
from lowrank.data.cache import Cache
from lowrank.errors import Refused
from lowrank.files import atomic, remove, remove_leftovers, writable_folder
from lowrank.train.checkpoints import STATE, WEIGHTS, checkpoints, find_checkpoint, prune


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def temporary(folder: Path, process: int, machine: str | None = None) -> Path:
    path = folder / f".cat.safetensors.{machine or files._machine()}-{process}-00ff.part"
    path.touch()
    return path


def test_leftovers_of_dead_processes_are_removed(tmp_path, dead):
    gone = [temporary(tmp_path, dead), temporary(tmp_path, os.getpid())]
    stay = [temporary(tmp_path, os.getppid()), temporary(tmp_path, dead, "0000"), tmp_path / ".cat.part"]
    stay[-1].mkdir()  # a folder is removed by the run that has the lock only
    (tmp_path / "cat.part").touch()
    remove_leftovers(tmp_path)
    assert not any(path.exists() for path in gone) and all(path.exists() for path in stay)
    remove_leftovers(tmp_path / "missing")


def test_leftover_folders_are_removed_or_get_their_name_back(tmp_path):
    for name in (".a-state.part", ".checkpoint-1.gone", ".b-state.old", "b-state", ".c-state.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    remove_leftovers(tmp_path, locked=True)
    assert {path.name for path in tmp_path.iterdir()} == {"b-state", "c-state"}
    assert (tmp_path / "c-state" / "file").read_text() == ".c-state.old"  # killed between two renames


def test_cache_removes_leftovers(tmp_path, dead):
    gone = temporary(tmp_path, dead)
    Cache(tmp_path)
    assert not gone.exists()


def test_probe_of_a_killed_process_is_removed(tmp_path, dead, monkeypatch):
    """A run tries to write in its folder before anything else; a kill can leave that file."""
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
    monkeypatch.setattr("os.getpid", lambda: dead)
    writable_folder(tmp_path)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 1
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", ["fail at inline_container.cc:672", "basic_ios::clear: iostream error"])
def test_full_disk_in_torch_save_is_refused(tmp_path, words):
    with pytest.raises(Refused, match=r"could not write .*optimizer"), atomic(tmp_path / "optimizer.bin"):
        raise RuntimeError(words)
    assert list(tmp_path.iterdir()) == []


def test_temporary_names_are_never_too_long(tmp_path):
    name = "ä" * 110 + "-step00000001.safetensors"  # 245 bytes
    with atomic(tmp_path / name) as part:
        part.write_text("x")
        assert files._TEMPORARY.fullmatch(part.name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_kill_while_a_folder_is_removed(tmp_path, monkeypatch):
    """The half that is left does not have the folder's name, and the next run removes it."""

    def killed(path, *_, **__):
        (Path(path) / "a").unlink()
        raise KeyboardInterrupt

    (tmp_path / "checkpoint-1").mkdir()
    for name in "ab":
        (tmp_path / "checkpoint-1" / name).touch()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", lambda path, *_, **__: os.path.exists(path) and killed(path))
        remove(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1").exists()
    remove_leftovers(tmp_path, locked=True)
    assert not list(tmp_path.iterdir())


def checkpoint(folder: Path, step: int, time: int, broken: bool = False) -> Path:
    place = folder / f"checkpoint-{step}"
    place.mkdir()
    names = [WEIGHTS, "optimizer.bin"]
    for name in names[broken:]:
        (place / name).touch()
    state = {
        "current_step": step,
        "current_epoch": 0,
        "position": 0,
        "run": {},
        "files": dict.fromkeys(names),
    }
    (place / STATE).write_text(json.dumps(state))
    os.utime(place, (time, time))
    return place


def test_prune_goes_by_step_and_takes_broken_checkpoints_first(tmp_path):
    """A clock that is set back, or a removal that renews a folder's time, changes nothing."""
    for step, time in ((1, 900), (2, 100), (3, 300), (10, 200)):
        checkpoint(tmp_path, step, time)
    broken = checkpoint(tmp_path, 4, 999, broken=True)
    (tmp_path / "checkpoint-²").mkdir()
    (tmp_path / f"checkpoint-{'9' * 40}").mkdir()
    newest = tmp_path / "checkpoint-10"
    assert [path.name[11:] for path in checkpoints(tmp_path)] == ["1", "2", "3", "4", "10"]
    prune(checkpoints(tmp_path), 4, newest)
    assert not broken.exists() and len(checkpoints(tmp_path)) == 4
    prune(checkpoints(tmp_path), 2, newest)
    assert [path.name[11:] for path in checkpoints(tmp_path)] == ["3", "10"]
    prune(checkpoints(tmp_path), None, newest)
    assert len(checkpoints(tmp_path)) == 2


def test_resume_latest_skips_damaged_checkpoints(tmp_path, caplog):
    import hashlib

    empty = hashlib.sha256().hexdigest()
    for step in (1, 2):
        place = checkpoint(tmp_path, step, 1)
        state = json.loads((place / STATE).read_text())
        (place / STATE).write_text(json.dumps(state | {"files": dict.fromkeys(state["files"], empty)}))
    (tmp_path / "checkpoint-2" / WEIGHTS).write_text("x")
    assert find_checkpoint("latest", tmp_path).step == 1
    assert "checkpoint-2 is damaged" in caplog.text and "takes the one before" in caplog.text
    (tmp_path / "checkpoint-1" / WEIGHTS).unlink()
    with pytest.raises(Refused, match="checkpoint-1 is damaged"):
        find_checkpoint("latest", tmp_path)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", ""])
def test_checkpoint_names_no_files_outside(name, tmp_path):
    place = checkpoint(tmp_path, 1, 1)
    state = json.loads((place / STATE).read_text())
    (place / STATE).write_text(json.dumps(state | {"files": state["files"] | {name: "0"}}))
    with pytest.raises(Refused, match="not a whole checkpoint"):
        find_checkpoint("latest", tmp_path)
