"""The files SAVE and STOP, and signals, while a run trains."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from accelerate import Accelerator

from lowrank.train.requests import Asked, Requests, remove_requests


@pytest.fixture
def requests(tmp_path):
    return Requests(tmp_path, Accelerator(cpu=True))


def test_a_file_is_obeyed_once(requests, tmp_path):
    assert requests.after_step() == Asked(save=False, stop=False)
    (tmp_path / "SAVE").touch()
    assert requests.after_step() == Asked(save=True, stop=False)
    assert requests.after_step() == Asked(save=False, stop=False) and not list(tmp_path.iterdir())
    (tmp_path / "STOP").touch()
    assert requests.after_step() == Asked(save=False, stop=True)


def test_files_of_an_earlier_run_are_removed(requests, tmp_path, caplog):
    (tmp_path / "STOP").touch()
    (tmp_path / "SAVE").mkdir()  # a folder is no request, and is left alone
    remove_requests(tmp_path, "before this run began")
    assert "removed" in caplog.text and [path.name for path in tmp_path.iterdir()] == ["SAVE"]
    assert requests.after_step() == Asked(save=False, stop=False)


def test_second_signal_ends_at_once(requests):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), requests.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.after_step() == Asked(save=False, stop=True)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_all_processes_stop_when_one_is_asked(tmp_path):
    """The main process, which has no file, gets the sum over all processes."""

    class Two:
        is_main_process, num_processes, device = True, 2, torch.device("cpu")

        def reduce(self, flags: torch.Tensor, how: str) -> torch.Tensor:
            assert how == "sum" and flags.tolist() == [0, 0]
            return flags + torch.tensor([0.0, 1.0])  # the other process had a signal

    requests = Requests(tmp_path, Two())  # pyright: ignore[reportArgumentType]
    assert requests.after_step() == Asked(save=False, stop=True)
