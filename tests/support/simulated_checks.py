"""What a process with the simulated device runs; each function starts the device itself."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import simulated_device
import torch
import torch.nn.functional as F
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
    layer.down = nn.Parameter(layer.down.detach().cpu())
    with pytest.raises(RuntimeError, match="same device, but found sim:0 and cpu"):
        model(x)


def trainer(*runs: list[str]) -> None:
    """Runs of the trainers' scripts one after the other on the device; each is a script and its flags."""
    simulated_device.start()
    from accelerate.state import AcceleratorState, GradientState

    for script, *words in runs:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        try:
            run_script(script, *words)
        except SystemExit as end:
            assert not end.code, f"{script} ended with {end.code}"
