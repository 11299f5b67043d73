"""Every method with every addition starts at the base, trains, reloads and is exported, or says why not."""

from __future__ import annotations

import pytest
import torch
from compositions import ADDITIONS, FACTORS, joined
from toys import HOSTS, base

from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.targets import find
from tools import make_compositions


def network(method, model, cache=None) -> AdapterNetwork:
    made = AdapterNetwork(method, find("unet", model, target="."), lambda _: (4, 4.0))
    made.start()
    made.apply_to([], model, False, True)
    made.prepare_grad_etc([], model)
    return made


@pytest.mark.parametrize("addition", ADDITIONS)
@pytest.mark.parametrize("factor", FACTORS)
def test_pair_of_methods(factor, addition, cache, tmp_path):
    method = joined(factor, addition, str(cache))
    if isinstance(method, str):
        assert len(method.split()) > 5
        return
    torch.manual_seed(0)
    model, x = base("linear"), HOSTS["linear"].example(3)
    before, t = model(x), torch.tensor([100.0, 500.0, 900.0])
    made = network(method, model)
    groups, _ = made.prepare_optimizer_params(None, 1e-2)
    optimizer = torch.optim.AdamW(groups)
    with made.denoise_at(t):
        assert torch.equal(model(x), before)
        for _ in range(2):
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean() + sum(made.penalties().values())
            loss.backward()
            optimizer.step()
        after = model(x)
    assert not torch.equal(after, before)
    made.save_weights(str(tmp_path / "a.safetensors"), None, {})
    made.restore()
    other = network(method, model)
    assert not other.load_weights(str(tmp_path / "a.safetensors")).missing_keys
    with other.denoise_at(t):
        assert torch.equal(model(x), after)
    for layer in other.layers():
        dW = layer.delta_weight(torch.tensor([500.0]))
        assert (dW is None) == (method.experts is not None)
        assert dW is None or dW.shape == layer.host.weight.shape


def test_composition_page_is_current():
    assert make_compositions.PAGE.read_text(encoding="utf-8") == make_compositions.page()
