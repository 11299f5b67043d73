"""What the numbers of a run support as a next step; nothing where they support nothing."""

from __future__ import annotations

import math

from lowrank.report.run_folder import Run, smooth

RISE = 1.02  # of the held-out loss over its minimum that counts: it is an average of few pictures
HIGHER = 1.5  # of the smoothed training loss over its minimum


def advice(run: Run) -> list[str]:
    """A sentence for each finding."""
    return [text for text in (_held_out(run), _training(run), _nothing_learned(run)) if text]


def _held_out(run: Run) -> str:
    """The held-out loss rises: the checkpoint near its minimum is the better one."""
    steps, values = run.validation.get("step", []), run.validation.get("value", [])
    if len(values) < 3:
        return ""
    at = min(range(len(values)), key=lambda i: math.inf if math.isnan(values[i]) else values[i])
    if at == len(values) - 1 or values[-1] < RISE * values[at]:
        return ""
    best = steps[at]
    near = min(run.adapters, key=lambda entry: abs(entry[0] - best), default=None)
    use = f"; {near[1].name} is the nearest file" if near is not None else ""
    return (
        f"The held-out loss was lowest after step {best:.0f} ({values[at]:.5g}) and ended at "
        f"{values[-1]:.5g}: later steps learn the training pictures by heart{use}."
    )


def _training(run: Run) -> str:
    values = run.losses.get("loss", [])
    if len(values) < 200:
        return ""
    curve = smooth(values, len(values) // 10)[len(values) // 10 :]
    if curve[-1] < HIGHER * min(curve):
        return ""
    return (
        f"The training loss rose to {curve[-1] / min(curve):.1f} times its minimum: the learning rate is "
        "probably too high; try a third of it."
    )


def _nothing_learned(run: Run) -> str:
    if not run.layers or any(layer.norm > 0 for layer in run.layers):
        return ""
    return "No layer of the adapter changed: check --learning_rate, and that the run was not stopped at once."
