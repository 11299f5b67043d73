"""Kills, signals and full disks at file operations: nothing is lost or left. tools/soak.py has more."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from kills import (
    FAMILIES,
    STEPS,
    Fault,
    World,
    check_folder,
    differences,
    is_over,
    leftovers,
    make_pictures,
    strike,
)
from processes import call, finished
from safetensors.torch import load_file, save_file

from lowrank.data.cache import Cache
from lowrank.errors import Refused
from lowrank.files import atomic, atomic_folder, remove, remove_leftovers
from lowrank.train.checkpoints import checkpoints

# ------------------------------------------------------------------ writers alone


def write_in_every_way(folder: Path, fault: Fault | None) -> None:
    """Two files, a folder that is replaced, one that is removed, a cache entry."""
    if fault:
        fault.install()
    for number in (1, 2):
        with atomic(folder / "a.safetensors") as part:
            save_file({"x": torch.full((4,), float(number))}, part)
        with atomic_folder(folder / "a-state") as part:
            for name in ("one", "two"):
                (part / name).write_text(str(number))
    with atomic_folder(folder / "b-state") as part:
        (part / "one").write_text("1")
    remove(folder / "b-state")
    Cache(folder / "cache").put("k", {"x": torch.ones(2)})


def check_writers(folder: Path) -> None:
    if (folder / "a.safetensors").exists():
        assert load_file(folder / "a.safetensors")["x"][0] in (1, 2)
    state = folder / "a-state"
    if state.exists():
        assert (state / "one").read_text() == (state / "two").read_text() != ""
    if (folder / "b-state").exists():
        assert (folder / "b-state" / "one").read_text() == "1"
    assert Cache(folder / "cache").missing(["k"]) in ([], ["k"])


def write_or_refuse(folder: Path, fault: Fault) -> None:
    try:
        write_in_every_way(folder, fault)
    except (Refused, OSError) as error:  # a script prints both as one sentence
        assert str(folder) in str(error) and "\n" not in str(error)
        os._exit(3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "full", "readonly"])
def test_writers_struck_at_every_operation(kind, tmp_path):
    seen_state = False
    for at in range(1, 200):
        folder = tmp_path / str(at)
        (folder / "cache").mkdir(parents=True)
        code = finished(call(write_or_refuse, (folder, Fault(kind, at, str(folder))), tmp_path / "log"))
        remove_leftovers(folder, locked=True)
        check_writers(folder)
        assert not leftovers(folder), at
        assert (folder / "a-state").exists() or not seen_state, f"{at}: a whole folder was lost"
        seen_state |= (folder / "a-state").exists()
        if code == 0:
            break
        assert code == (-signal.SIGKILL if kind == "kill" else 3), (tmp_path / "log").read_text()
    assert code == 0 and at > 25  # that many operations were struck


# ------------------------------------------------------------------ real runs


@pytest.fixture(scope="module")
def worlds(tiny_sd, tiny_sdxl, tiny_flux, tmp_path_factory):
    work = tmp_path_factory.mktemp("faults")
    pictures = make_pictures(work / "pictures")
    models = dict(zip(FAMILIES, (tiny_sd, tiny_sdxl, tiny_flux), strict=True))
    return {
        family: World(family, model, pictures, work / f"cache-{family}") for family, model in models.items()
    }


STRIKES = {  # kind and operation; the last operations of a run are about number 150
    "sd15": [("kill", 37), ("full", 30), ("readonly", 25)],
    "sdxl": [("term", 60), ("kill", 20)],
    "flux": [("int", 45), ("limit", 20_000), ("kill", 33)],
}
CODES = {"kill": -signal.SIGKILL, "full": 1, "readonly": 1, "limit": 1, "term": 130, "int": 130}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_struck_run_resumes_bit_for_bit(family, worlds, tmp_path):
    world, log = worlds[family], tmp_path / "log"
    assert world.run(tmp_path / "whole", log) == 0, log.read_text()
    for kind, at in STRIKES[family]:
        fault = Fault(kind, at, str(tmp_path / "out"), clock=-1e8)
        assert strike(world, tmp_path / "out", log, fault) == CODES[kind], f"{kind} {at}: {log.read_text()}"
    assert world.run(tmp_path / "out", log) == 0, log.read_text()
    check_folder(tmp_path / "out", log)
    assert differences(tmp_path / "whole", tmp_path / "out") == []
    assert leftovers(tmp_path / "out", world.cache) == []
    # the end is reached once: another call refuses and changes nothing
    assert world.run(tmp_path / "out", log) == 1 and is_over(1, log)
    assert differences(tmp_path / "whole", tmp_path / "out") == []


@pytest.mark.slow
def test_files_in_the_folder_save_and_stop(worlds, tmp_path):
    """SAVE writes a checkpoint, STOP also ends the run; a file from before the run counts for neither."""
    world, out, log = worlds["flux"], tmp_path / "out", tmp_path / "log"
    more = ("--checkpointing_steps", "100", "--save_every_n_steps", "100", "--sample_every_n_steps", "100")
    out.mkdir()
    (out / "STOP").touch()
    # operations up to 20 or so are before the first step; then each step adds a row to loss.csv
    assert world.run(out, log, Fault("save", 24, str(out)), more) == 0
    assert "removed" in log.read_text() and "STOP" in log.read_text()
    first, last = checkpoints(out)
    assert first.name in {f"checkpoint-{step}" for step in range(1, STEPS)}
    assert last.name == f"checkpoint-{STEPS}"
    shutil.rmtree(out)
    assert world.run(out, log, Fault("stop", 24, str(out)), more) == 130
    (stopped,) = checkpoints(out)
    assert f"stopped after step {stopped.name[11:]}; continue with --resume" in log.read_text()
    assert not {"SAVE", "STOP"} & {path.name for path in out.iterdir()}
    assert world.run(out, log, None, more) == 0
    assert "resumed from" in log.read_text()


@pytest.mark.slow
def test_two_runs_share_caches_and_one_folder(worlds, tmp_path):
    """Started together: the two with folders of their own end alike, a third in a taken folder is refused."""
    world = World("sd15", worlds["sd15"].model, worlds["sd15"].pictures, tmp_path / "cache")
    outs = [tmp_path / "a", tmp_path / "b", tmp_path / "a"]
    running = [world.start(out, tmp_path / f"log{index}") for index, out in enumerate(outs)]
    codes = [finished(process) for process in running]
    assert sorted(codes[::2]) == [0, 1] and codes[1] == 0
    refused = (tmp_path / f"log{codes.index(1)}").read_text().splitlines()[-1]
    assert "another run is writing to" in refused or "holds checkpoint-" in refused
    assert differences(tmp_path / "a", tmp_path / "b") == []
    assert leftovers(tmp_path / "a", tmp_path / "b", world.cache) == []


def test_strikes_hit_only_operations_of_their_folder(tmp_path):
    """The audit hook counts writes below the folder, and neither reads nor other folders."""
    fault = Fault("kill", 1, str(tmp_path / "run"))
    inside, outside = str(tmp_path / "run" / "x"), str(tmp_path / "other")
    assert fault._is_operation("open", (inside, "w", 0)) and fault._is_operation("os.rename", (inside, "y"))
    assert fault._is_operation("open", (inside, None, os.O_WRONLY | os.O_CREAT))
    for event, arguments in (
        ("open", (inside, "r", 0)),
        ("open", (outside, "w", 0)),
        ("open", (3, "w", 0)),
        ("import", (inside,)),
    ):
        assert not fault._is_operation(event, arguments)
