"""Peaks of a run's phases: as planned without values, and as counted while the run trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from lowrank.models.memory import offload_of
from lowrank.plan.live import LiveMemory, Phase
from lowrank.train import dry_run, plan_memory, preview, run


def planned(main: Callable[[list[str]], int], arguments: Sequence[str], monkeypatch) -> dict[str, Phase]:
    """The phases of a run on this CPU, with autocast of the CPU."""
    phases: list[Phase] = []

    def keep(*given: Any) -> int:
        phases.extend(given[-1])
        return 0

    plan = plan_memory.plan_memory
    with monkeypatch.context() as patched:
        patched.setattr(dry_run, "show", keep)
        patched.setattr(plan_memory, "plan_memory", lambda *given: plan(*given, gpu=False))
        assert main([*arguments, "--dry_run"]) == 0
    return {phase.name: phase for phase in phases}


def measured(
    main: Callable[[list[str]], int], arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Phase]:
    """The phases of a run that trains on this CPU; what a GPU would not hold is not counted."""
    live = LiveMemory(inputs=True)
    host: list[Any] = []  # the VAE, while it is on the CPU

    def during(module: Any, name: str, phase: str) -> None:
        function = getattr(module, name)

        def recorded(*given, **more):
            with live.phase(phase):
                return function(*given, **more)

        monkeypatch.setattr(module, name, recorded)

    def load(job, models, roles, load=run.load_components):
        load(job, models, roles)
        for part in (*models.text_encoders, models.vae, models.denoiser):
            if part is not None:
                live.count([*part.parameters(), *part.buffers()])

    def keep_vae(models, encoded, draws, keep_vae=run.keep_vae):
        keep_vae(models, encoded, draws)
        if encoded and models.vae is not None:
            host.append(models.vae)
            live.leave(models.vae.parameters())

    def adapt(job, models, encoders, adapt=run.adapt):
        with live.phase("loading"):
            network = adapt(job, models, encoders)
        if (offload := offload_of(models.denoiser)) is not None:
            offload.copied = lambda host: live.leave([host])
        return network

    def draw(*given, draw=preview.draw_picture):
        for vae in host:
            live.enter(vae.parameters(), "VAE")
        with live.phase("sampling preview"):
            image = draw(*given)
        for vae in host:
            live.leave(vae.parameters())
        return image

    with monkeypatch.context() as patched:
        monkeypatch = patched
        during(run, "text_conditions", "text encoding")
        during(run, "train", "training step")
        patched.setattr(run, "load_components", load)
        patched.setattr(run, "keep_vae", keep_vae)
        patched.setattr(run, "adapt", adapt)
        patched.setattr(preview, "draw_picture", draw)
        with live:
            assert main(list(arguments)) == 0
    return {phase.name: phase for phase in live.phases}
