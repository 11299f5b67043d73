"""Weight decay where an initial copy is subtracted: towards the copy, so that the base is not erased."""

from __future__ import annotations

import contextlib
import importlib
import types

import pytest
import torch
from toys import base

from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.rates import decay_targets
from lowrank.config.flags_training import Optimizer as Options
from lowrank.errors import Refused
from lowrank.train.optim import build_optimizer, decay_towards


def adapted(model: torch.nn.Module, module: str = "qrlora", **given: str) -> AdapterNetwork:
    """A network of rank 4 on every layer of a toy."""
    torch.manual_seed(0)
    network = importlib.import_module(f"networks.{module}").create_network(
        1.0, 4, 4.0, None, [], model, target=".", **given
    )
    network.apply_to([], model, False, True)
    network.prepare_grad_etc([], model)
    return network


class Difference(torch.nn.Module):
    """U·D − U₀·D₀ with what is trained stored as a difference to the start."""

    def __init__(self, layer) -> None:
        super().__init__()
        self.starts = {role: value.detach().clone() for role, value in layer.roles().items()}
        self.changes = torch.nn.ParameterDict({r: torch.zeros_like(v) for r, v in self.starts.items()})


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adam"])
def test_weight_decay_pulls_to_initial_copy(name):
    """Five steps equal, in float64, those of parameters that are stored as the difference to their start."""
    model = base("linear", torch.float64)
    network = adapted(model)
    network.double()
    layer = network.layers()[0]
    apart = Difference(layer)
    x, wanted = torch.randn(8, 5, 24).double(), torch.randn(8, 5, 40).double()
    scale, W = layer.scale, model.first.weight

    def loss_apart() -> torch.Tensor:
        U, D = (apart.starts[role] + apart.changes[role] for role in ("up", "down"))
        dW = scale * (U @ D - apart.starts["up"] @ apart.starts["down"])
        return (torch.nn.functional.linear(x, W + dW, model.first.bias) - wanted).square().mean()

    made = build_optimizer(
        [{"params": list(layer.roles().values())}],
        Options(optimizer_type=name, learning_rate=0.05, optimizer_args=("weight_decay=0.5",)),
    )[2]
    decay_towards(made, decay_targets(network))
    other = getattr(torch.optim, name)(apart.changes.values(), lr=0.05, weight_decay=0.5)
    for _ in range(5):
        ((model.first(x) - wanted).square().mean()).backward()
        loss_apart().backward()
        for each in (made, other):
            each.step()
            each.zero_grad()
    for role, value in layer.roles().items():
        assert not torch.equal(value, apart.starts[role])
        torch.testing.assert_close(value, apart.starts[role] + apart.changes[role], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("module", "given"), [("qrlora", {}), ("tlora", {"use_data_init": "True"})])
def test_weight_decay_alone_keeps_the_base(module, given):
    """Without gradients nothing moves, so that the base's strongest directions stay."""
    model = base("linear")
    network = adapted(model, module, **given)
    made = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1)
    decay_towards(made, decay_targets(network))
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(3):
        made.step()
    U, D = network.layers()[0].factors()
    assert not (U @ D).any()


def test_weight_decay_of_adafactor_with_a_copy_is_refused():
    model = base("linear")
    network = adapted(model)
    for given, refused in (("weight_decay=0.1", True), ("weight_decay=0", False)):
        made = build_optimizer(
            [{"params": list(network.parameters())}],
            Options(
                optimizer_type="Adafactor", learning_rate=0.1, optimizer_args=(given, "relative_step=False")
            ),
        )[2]
        with pytest.raises(Refused, match="decay to the start") if refused else contextlib.nullcontext():
            decay_towards(made, decay_targets(network))


def test_kohyas_trainer_does_not_decay_factors_with_a_copy():
    """Its optimizer decays to 0 only, so that these groups have no decay; others keep the trainer's."""
    for module, expected in (("qrlora", 0.0), ("lora", 0.01)):
        network = adapted(base("linear"), module)
        network.prepare_network(types.SimpleNamespace())
        groups, _ = network.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-4, 1e-4)
        made = torch.optim.AdamW(groups)
        assert {group["weight_decay"] for group in made.param_groups} == {expected}
