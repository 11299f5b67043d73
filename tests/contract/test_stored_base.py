"""Every method on every kind of storage, on the device and streamed: start, training, weights read."""

from __future__ import annotations

import pytest
import torch
from toys import HOSTS, SHIPPED, base, network, shake

from lowrank.models import frozen
from lowrank.models.place import Stream

KINDS = ("bf16", "fp8", "fp8_scaled", "int8", "nf4")


def stored_network(method: str, host: str, kind: str | None, cache, swap: bool = False):
    """A host with frozen layers, and the method's network, made before the weights were stored."""
    model = base(host)
    torch.manual_seed(0)
    for layer in model.children():
        frozen.freeze(layer)
    made, stream = network(method, model, cache), Stream("cpu")
    for layer in frozen.frozen_layers(model):
        frozen.store(layer, kind)
        if swap:
            frozen.stream(layer, stream)
    return model, made


def plain_output(model, x: torch.Tensor) -> torch.Tensor:
    """The output of the host without its adapter."""
    twin = type(model)()
    for own, layer in zip(twin.children(), model.children(), strict=True):
        own.weight.data = layer.weight
        if own.bias is not None:
            own.bias.data = layer.bias.data
    return twin(x).detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", SHIPPED)
def test_every_method_trains_on_every_kind(method, kind, cache):
    for host in HOSTS:
        model, made = stored_network(method, host, kind, cache, swap=True)
        x, t = HOSTS[host].example(), torch.tensor([100.0, 500.0, 900.0])
        with made.denoise_at(t):
            assert torch.equal(model(x), plain_output(model, x))
            optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], 1e-2)
            losses = []
            for _ in range(3):
                loss = (model(x) - 1).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            assert losses[-1] < losses[0]
        made.restore()
        assert torch.equal(model(x), plain_output(model, x))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("method", SHIPPED)
def test_start_values_are_of_the_weights_before_they_are_stored(method, host, cache):
    made = stored_network(method, host, "nf4", cache)[1]
    torch.manual_seed(0)
    plain = network(method, base(host), cache)
    for own, other in zip(made.layers(), plain.layers(), strict=True):
        for role, value in own.tensors().items():
            assert torch.equal(value, other.tensors()[role]), (own.name, role)


@pytest.mark.parametrize("method", SHIPPED)
def test_streamed_gradients_are_those_of_weights_on_the_device(method, cache):
    torch.manual_seed(1)
    x, t, gradients = HOSTS["linear"].example(), torch.tensor([100.0, 500.0, 900.0]), []
    for swap in (False, True):
        model, made = stored_network(method, "linear", None, cache, swap)
        shake(made)
        with made.denoise_at(t):
            for _ in range(2):
                made.zero_grad()
                model(x).square().sum().backward()
        gradients.append([p.grad for p in made.parameters() if p.requires_grad])
    for resident, streamed in zip(*gradients, strict=True):
        assert (resident is None and streamed is None) or torch.equal(resident, streamed)
