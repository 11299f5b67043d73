"""The checks for a GPU run on the CPU with small sizes, and their page is what the results say."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu_check


@pytest.mark.slow  # small models, but a training step on each kind of storage
def test_checks_run_on_the_cpu(monkeypatch, capfd):
    monkeypatch.setattr(gpu_check, "NETWORKS", {"lora": {}, "dora": {}})
    results = gpu_check.measure("cpu", True, ["laws", "swap", "bases", "runs", "planner"])["checks"]
    assert [check["error"] for check in results.values()] == [None] * 5, capfd.readouterr().out
    assert len(results["laws"]["rows"]) == 8 and len(results["swap"]["rows"]) == 6
    for row in results["laws"]["rows"]:
        assert row["equal at the start"] and row["finite gradients"], row
    assert all(row["equal"] for row in results["swap"]["rows"])
    assert [row["within 10 %"] for row in results["planner"]["rows"]] == [True, True]
    assert [row["blocks swapped"] for row in results["runs"]["rows"]] == [0, 0, 0]


def test_page_is_rendered_from_the_results():
    measured = json.loads(gpu_check.RESULTS.read_text()) if gpu_check.RESULTS.is_file() else None
    assert gpu_check.PAGE.read_text() == gpu_check.render(measured)


def test_page_of_results():
    check = {"rows": [{"network": "lora", "equal": True, "ratio": 1.23456}], "error": None, "seconds": 1.0}
    broken = {"rows": [], "error": "RuntimeError: out of memory", "seconds": 1.0}
    page = gpu_check.render({"device": "X", "torch": "2", "checks": {"swap": check, "runs": broken}})
    assert "Measured on X with torch 2." in page and "| lora | yes | 1.23 |" in page
    assert "It ended early: RuntimeError: out of memory." in page and "Not measured" not in page
