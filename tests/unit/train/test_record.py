"""Several runs in one folder: each keeps its config.toml, versions.txt and loss.csv."""

from __future__ import annotations

import os
from pathlib import Path

from lowrank.train.checkpoints import Names
from lowrank.train.record import begin_record


def begin(folder: Path, name: str | None, text: str, resumed: bool = False) -> None:
    """A run that writes one line of losses."""
    given = f'output_name = "{name}"' if name else ""
    begin_record(Names(folder, name), f"# {text}\n[saving]\n{given}\n", "train.py", resumed)
    with open(folder / "loss.csv", "a") as file:
        file.write(f"{text}\n")
    os.utime(folder / "config.toml", (0, 0))  # equal start times: the clock was set back


def losses(folder: Path) -> dict[str, str]:
    return {str(path.parent.relative_to(folder)): path.read_text() for path in folder.rglob("loss.csv")}


def test_each_run_keeps_its_record(tmp_path):
    begin(tmp_path, "cat", "1")
    begin(tmp_path, "dog", "2")
    begin(tmp_path, "dog", "3")
    begin(tmp_path, None, "4")
    begin(tmp_path, "cat", "5")
    kept = losses(tmp_path)
    assert kept.pop(".") == "5\n"
    assert sorted(kept.values()) == ["1\n", "2\n", "3\n", "4\n"]
    assert sorted(name.split("/")[1].split("-1970")[0].split("-1969")[0] for name in kept) == [
        "cat", "dog", "dog", "run"
    ]  # fmt: skip
    for place in kept:
        assert {path.name for path in (tmp_path / place).iterdir()} == {
            "config.toml",
            "versions.txt",
            "loss.csv",
        }


def test_resumed_run_continues_its_own_record(tmp_path):
    begin(tmp_path, "cat", "1")
    begin(tmp_path, "cat", "2", resumed=True)
    assert losses(tmp_path) == {".": "1\n2\n"}
    begin(tmp_path, "dog", "3")
    begin(tmp_path, "cat", "4", resumed=True)
    kept = losses(tmp_path)
    assert kept.pop(".") == "1\n2\n4\n" and list(kept.values()) == ["3\n"]


def test_damaged_record_is_kept(tmp_path):
    begin(tmp_path, "cat", "1")
    (tmp_path / "config.toml").write_text("[[[")
    begin(tmp_path, "cat", "2")
    assert sorted(losses(tmp_path).values()) == ["1\n", "2\n"]
