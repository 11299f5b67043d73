"""int8 and NF4 bases: what measures, starts from or is held by the base's weights reads their values.

That every method adapts such a base and leaves it untouched is in test_laws.py; that none is merged into, in
test_export.py.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lowrank.adapters.method import WarmupBatches
from lowrank.adapters.targets import dense_weight, find
from lowrank.laplace.context_file import Context, write_context
from lowrank.laplace.fisher import Fisher

bnb = pytest.importorskip("bitsandbytes")
N = 64


def pair(bits: int) -> tuple[nn.Sequential, nn.Sequential]:
    """A quantised model of two layers, and an ordinary one with the values that it stands for."""
    torch.manual_seed(0)
    layers, values = [], []
    for _ in range(2):
        plain = nn.Linear(N, N)
        if bits == 4:
            packed = bnb.nn.Linear4bit(N, N, compute_dtype=torch.float32, quant_type="nf4")
        else:
            packed = bnb.nn.Linear8bitLt(N, N, has_fp16_weights=False)
        packed.load_state_dict(plain.state_dict())
        packed = packed.to("cpu")
        with torch.no_grad():
            plain.weight.copy_(dense_weight(packed).float())
        layers, values = [*layers, packed, nn.Tanh()], [*values, plain, nn.Tanh()]
    return tuple(nn.Sequential(*found).requires_grad_(False) for found in (layers, values))


def attached(name: str, model: nn.Module, **arguments: str):
    torch.manual_seed(1)
    module = importlib.import_module(f"networks.{name}")
    made = module.create_network(1.0, 4, 4.0, None, [], model, target=".", **arguments)
    made.apply_to([], model, False, True)
    return made


def curvature(model: nn.Module) -> Context:
    x, y = (torch.randn(12, 5, N, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3))
    fisher = Fisher(find("unet", model, target="."), "kfac_lr", 8, 0, "cpu")
    with fisher.watching():
        fisher.add(12, lambda: (model(x) - y).square().flatten(1).mean(1))
    return fisher.context({})


def learn(model: nn.Module, network, steps: int = 3) -> list[float]:
    """Train; the penalty at each step."""
    x, y = (torch.randn(8, 5, N, generator=torch.Generator().manual_seed(seed)) for seed in (4, 5))
    optimizer, told = torch.optim.AdamW(network.parameters(), 1e-2), []
    for _ in range(steps):
        pulls = list(network.penalties().values())
        torch.stack([(model(x) - y).square().mean(), *pulls]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        told.append(float(sum(pull.detach() for pull in pulls)))
    return told


@pytest.mark.parametrize("bits", [4, 8])
def test_a_curvature_is_that_of_the_values_and_holds_adapters_of_either(bits, tmp_path):
    packed, plain = pair(bits)
    own, other = curvature(packed), curvature(plain)
    for name, layer in own.layers.items():
        for mine, theirs in zip(layer, other.layers[name], strict=True):
            # int8's products round the inputs too, to 1/127 of their largest
            assert (mine.main - theirs.main).norm() <= (1e-4 if bits == 4 else 0.05) * theirs.main.norm()
    for index, context in enumerate((own, other)):
        path = tmp_path / f"{index}.safetensors"
        write_context(path, context)
        network = attached("lalora", packed, lalora_context_path=str(path), lalora_lambda="0.1")
        told = learn(packed, network)
        assert told[0] == 0 and told[1] > 0
        network.restore()


def batches(model: nn.Module) -> WarmupBatches:
    x, y = (torch.randn(4, 5, N, generator=torch.Generator().manual_seed(seed)) for seed in (6, 7))

    def losses() -> torch.Tensor:
        return (model(x) - y).square().flatten(1).mean(1)

    return WarmupBatches(lambda: iter([losses] * 10), lambda t: t, 1, lambda *_: None)


METHODS = {
    "null_lora": {},
    "universal_lora": {"basis_path": "auto:grad", "basis_samples": "4"},
    "universal_lalora": {"basis_path": "auto:weight", "lalora_isotropic": "True", "lalora_lambda": "0.1"},
    "network_null_lalora_plus_Effi_ABM": {
        "enable_effilora": "True",
        "use_dora": "True",
        "basis_path": "auto:weight",
    },
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", METHODS)
def test_a_start_from_the_weights_trains_saves_and_loads(name, bits, tmp_path: Path):
    packed, plain = pair(bits)
    x = torch.randn(3, 5, N)
    before = packed(x)
    network = attached(name, packed, **METHODS[name])
    for stage in network.method.warmup:
        stage.run(network, batches(packed))
    assert torch.equal(packed(x), before)
    frozen = [{role: b.clone() for role, b in layer.named_buffers()} for layer in network.layers()]
    learn(packed, network)
    assert not torch.equal(packed(x), before)
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    after = packed(x)
    network.restore()
    assert torch.equal(packed(x), before)
    again = attached(name, packed, **METHODS[name])
    again.load_weights(str(tmp_path / "a.safetensors"))
    torch.testing.assert_close(packed(x), after, rtol=0, atol=0)
    assert load_file(tmp_path / "a.safetensors")
    again.restore()
    if METHODS[name].get("basis_path") == "auto:grad":  # int8's products round, and so do its gradients
        return
    other = attached(name, plain, **METHODS[name])  # the same frozen directions as of the values
    for stage in other.method.warmup:
        stage.run(other, batches(plain))
    for mine, layer in zip(frozen, other.layers(), strict=True):
        for role, value in layer.named_buffers():
            torch.testing.assert_close(mine[role], value, rtol=1e-4, atol=1e-4)
