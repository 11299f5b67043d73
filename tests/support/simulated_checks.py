"""What a process with the simulated device runs; each function starts the device itself."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest
import simulated_device
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from processes import run_script
from simulated_device import NAME
from torch import nn


def rules() -> None:
    """The device refuses what CUDA refuses, casts as CUDA's autocast, and records traffic."""
    simulated_device.start()
    x, weight = torch.randn(4, 8, device=NAME, requires_grad=True), torch.randn(3, 8)
    with pytest.raises(RuntimeError, match=r"same device, but found sim:0 and cpu of shape \(8, 3\)"):
        F.linear(x, weight)
    with pytest.raises(RuntimeError, match="expected a generator of sim"):
        torch.randn(3, device=NAME, generator=torch.Generator())
    with pytest.raises(RuntimeError, match="numpy"):
        x.detach().numpy()
    assert (x * torch.tensor(2.0)).device == x[torch.tensor([0, 1])].device == x.device  # as on CUDA

    with simulated_device.watched() as traffic:
        F.linear(x, weight.to(NAME)).sum().item()
        x.detach().cpu()
        torch.ones(2).to(NAME, non_blocking=True)
    assert [(t.to, t.shape, t.bytes) for t in traffic.transfers] == [
        ("device", (3, 8), 96),
        ("host", (4, 8), 128),
        ("device", (2,), 8),
    ]
    assert traffic.waits == ["copy to the device", "aten::_local_scalar_dense", "copy to the host"]

    linear, expected = nn.Linear(8, 3), F.linear(x.detach().cpu().bfloat16(), weight.bfloat16())
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.zero_()
    linear.to(NAME)
    with torch.autocast(NAME, torch.bfloat16):
        y = linear(x)
        assert F.softmax(y, -1).dtype == F.layer_norm(y, (3,)).dtype == y.sum().dtype == torch.float32
    y.sum().backward()
    assert torch.equal(y.cpu(), expected) and y.dtype == torch.bfloat16
    assert (
        linear.weight.grad.dtype == torch.float32 and linear.weight.grad.device == x.grad.device == x.device
    )

    optimizer, file = torch.optim.AdamW(linear.parameters()), io.BytesIO()
    optimizer.step()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)["state"]
    assert state[0]["exp_avg"].device == x.device


def networks(folder: str) -> None:
    """Every network trains two steps on the device in bf16, and a factor left on the CPU is refused."""
    simulated_device.start()
    import toys

    for method in toys.SHIPPED:
        for kind in toys.HOSTS:
            model = toys.base(kind).to(NAME)
            net = toys.network(method, model, folder).to(NAME)
            optimizer = torch.optim.AdamW(net.parameters())
            x = toys.HOSTS[kind].example().to(NAME)
            for _ in range(2):
                at = torch.tensor([10.0, 500.0, 990.0], device=NAME)
                with net.denoise_at(at), torch.autocast(NAME, torch.bfloat16):
                    loss = model(x).float().square().mean()
                (loss + sum(net.penalties().values())).backward()
                optimizer.step()
                optimizer.zero_grad()
            file = Path(folder) / f"{method}-{kind}.safetensors"
            net.save_weights(str(file), None, {})
            net.load_weights(str(file))

    layer = net.layers()[0]
    role, value = next(iter(layer.roles().items()))
    setattr(layer, role, nn.Parameter(value.detach().cpu()))
    with pytest.raises(RuntimeError, match="same device, but found sim:0 and cpu"):
        model(x)


def trainer(*runs: list[str]) -> None:
    """Runs of the trainers' scripts one after the other on the device; each is a script and its flags."""
    simulated_device.start()
    for run in runs:
        _run(*run)


def _run(script: str, *words: str) -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    try:
        run_script(script, *words)
    except SystemExit as end:
        assert not end.code, f"{script} ended with {end.code}"


def reads_of_steps(*runs: list[str]) -> None:
    """The host reads values of the device once in each step after the first, at its end."""
    simulated_device.start()
    from lowrank.train.log import RunLog

    counts: list[int] = []
    log_step = RunLog.step

    def counted(*given):
        counts.append(sum(wait != "copy to the device" for wait in traffic.waits))
        log_step(*given)

    RunLog.step = counted
    for run in runs:
        counts.clear()
        with simulated_device.watched() as traffic:
            _run(*run)
        reads = [after - before for before, after in itertools.pairwise(counts)]
        assert reads == [1, 1], f"{run[0]}: {reads}, {traffic.waits}"


def swapped_base() -> None:
    """A swapped base has the results of one that stays there; its copies have the order of use."""
    simulated_device.start()
    from diffusers import FluxTransformer2DModel

    from lowrank.models import blocks, frozen

    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}
    sizes = {"in_channels": 16, "joint_attention_dim": 32, "pooled_projection_dim": 32, "num_layers": 3}
    given = {
        "encoder_hidden_states": torch.randn(1, 3, 32).to(NAME),
        "pooled_projections": torch.randn(1, 32).to(NAME),
        "timestep": torch.tensor([0.5]).to(NAME),
        "img_ids": torch.zeros(4, 3).to(NAME),
        "txt_ids": torch.zeros(3, 3).to(NAME),
    }
    start = torch.randn(1, 4, 16)

    def step(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        x = start.to(NAME).requires_grad_(True)
        with torch.autocast(NAME, torch.bfloat16):
            y = model(hidden_states=x, **given, return_dict=False)[0]
        y.float().square().sum().backward()
        assert x.grad is not None
        return y.detach(), x.grad

    for kind in (None, "fp8", "fp8_scaled", "int8", "nf4"):
        results = []
        for count in (0, 2):
            torch.manual_seed(0)
            model = FluxTransformer2DModel(**heads, **sizes, num_single_layers=4).to(torch.bfloat16)
            model.requires_grad_(False)
            blocks.freeze_base(model)
            model.to(NAME)
            place = blocks.store_base(model, kind, count, NAME)
            results.append([step(model) for _ in range(3)][-1])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), kind

        layers = list(frozen.frozen_layers(blocks.swapped(model, 2)))
        before, uses = vars(place.counts).copy(), []
        place.fetch = _noted(place.fetch, uses)
        with simulated_device.watched() as traffic:
            step(model)
            step(model)
        counts = {name: value - before[name] for name, value in vars(place.counts).items()}
        copied = [t.bytes for t in traffic.transfers if t.to == "device" and t.shape != start.shape]
        assert counts["copies"] == len(copied) and counts["bytes"] == sum(copied)
        # once in each forward, and in each backward but for layers of the timestep, which has no gradient
        assert 2 * len(layers) < counts["fetches"] == len(uses) <= 4 * len(layers)
        assert counts["late"] == 0 and len(copied) <= len(uses)  # each was copied ahead of its use
        ahead = iter(layers[number].format.bytes for number in (*uses, *uses))
        assert all(size in ahead for size in copied), kind  # in the order of use


def _noted(fetch, numbers: list[int]):
    def noted(number: int):
        numbers.append(number)
        return fetch(number)

    return noted
