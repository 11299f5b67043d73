"""What a run shows while it trains: a bar, or lines where the output is no terminal; each message once."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from accelerate import Accelerator

from lowrank.train import log as train_log
from lowrank.train.log import RunLog
from lowrank.train.setup import _Once


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(folder, stream: io.StringIO, monkeypatch, rates: dict[str, float], steps: int = 5) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    log = RunLog(Accelerator(cpu=True), folder, ("mse",), total=steps, window=5)
    log.begin(0)
    for step in range(1, steps + 1):
        log.step(step, 1, {"loss": 0.5, "mse": 0.5}, rates, images=1, extra={})
    log.close()
    return stream.getvalue()


@pytest.mark.parametrize(("interval", "count"), [(1000.0, 2), (0.0, 5)])
def test_progress_in_lines_without_terminal(interval, count, tmp_path, monkeypatch):
    """The first and the last step, and one line in each interval between them."""
    monkeypatch.setattr(train_log, "INTERVAL", interval)
    text = shown(tmp_path, io.StringIO(), monkeypatch, {"unet": 1e-4})
    lines = text.splitlines()
    assert len(lines) == count and "\r" not in text
    assert lines[-1].startswith("steps: 100%") and "5/5" in lines[-1] and "loss=0.5000" in lines[-1]


def test_progress_is_a_bar_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # a narrow bar is cut
    text = shown(tmp_path, Terminal(), monkeypatch, {"unet": 1e-4})
    assert "\r" in text and "lr=0.0001" in text


def test_bar_and_loss_csv_show_base_rate_beside_loraplus(tmp_path, monkeypatch):
    text = shown(tmp_path, io.StringIO(), monkeypatch, {"unet plus": 1.6e-3, "unet": 1e-4})
    assert "lr=0.0001" in text and "0.0016" not in text
    assert (tmp_path / "loss.csv").read_text().splitlines()[1].split(",")[2] == "0.0001"


def test_messages_of_libraries_are_logged_once():
    """The filter itself: levels and handlers of the whole process are what other tests left."""
    once = _Once()

    def passes(name: str, message: str) -> bool:
        return once.filter(logging.LogRecord(name, logging.WARNING, "file.py", 1, message, None, None))

    assert [passes("a_library.models", "a notice") for _ in range(3)] == [True, False, False]
    assert passes("a_library.models", "another notice") and passes("another_library", "a notice")
    assert all(passes("lowrank.train", "a step") for _ in range(3))
