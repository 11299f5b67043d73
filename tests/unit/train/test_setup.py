"""Lines at the start of a run that name what accelerate's configuration decides."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lowrank.train import setup


def options(precision: str | None):
    return SimpleNamespace(train=SimpleNamespace(mixed_precision=precision))


@pytest.mark.parametrize(
    ("given", "variable", "configured", "used", "line"),
    [
        ("bf16", "fp16", "fp16", "bf16", None),
        (None, None, None, "no", None),
        (None, "bf16", None, "bf16", "computes in mixed precision bf16, as accelerate launch asks"),
        (None, "no", "bf16", "no", "computes in fp32, as accelerate launch asks"),
        (None, None, "no", "no", None),
        (
            None,
            None,
            "fp16",
            "no",
            "has fp16, which only `accelerate launch` reads; give --mixed_precision fp16",
        ),
    ],
)
def test_source_of_the_precision_is_one_line(given, variable, configured, used, line, monkeypatch, tmp_path):
    file = tmp_path / "default_config.yaml"
    if configured:
        file.write_text(f"compute_environment: LOCAL_MACHINE\nmixed_precision: '{configured}'\n")
    monkeypatch.setattr(setup, "default_config_file", str(file))
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if variable:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", variable)
    notes = setup._precision_notes(options(given), used)
    assert len(notes) == (line is not None) and all(line in note for note in notes)
