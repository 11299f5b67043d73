"""Any adapters together: sums of thin pairs, networks that run beside them, strengths by layer."""

from __future__ import annotations

import pytest
import torch
from flux_adapters import digest, flux, forward, saved  # noqa: F401 (fixtures)

from lowrank.combine.ensemble import Ensemble, Part, share_of, shares
from lowrank.errors import Refused


def drawn(model, parts, weights):
    attached = Ensemble(parts).attach(model)
    attached.set(weights)
    out = forward(model)
    attached.restore()
    return out


def test_a_sum_and_a_live_network_are_added(flux, saved):
    lora, dora = saved("lora", 1), saved("dora", 2)
    base, hashed = forward(flux), digest(flux)
    ensemble = Ensemble([Part(lora), Part(dora)])
    assert "runs as dora" in ensemble.describe() and not ensemble.adapts_text
    attached = ensemble.attach(flux)
    assert torch.equal(forward(flux), base)
    attached.set((0.5, 0.7))
    together = {path: layer for path, layer in _effective(flux).items()}
    attached.restore()
    assert digest(flux) == hashed and torch.equal(forward(flux), base)
    apart = [_effective_of(flux, Part(path), weight) for path, weight in ((lora, 0.5), (dora, 0.7))]
    for path, dW in together.items():
        torch.testing.assert_close(dW, apart[0][path] + apart[1][path], rtol=1e-4, atol=1e-5)
    assert (drawn(flux, [Part(dora)], (1.0,)) - base).norm() / base.norm() > 1e-2


def _effective(model) -> dict[str, torch.Tensor]:
    """The change of each adapted layer as a matrix, read off its answer to unit vectors."""
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "forward" in layer.__dict__:
            with torch.no_grad():
                eye = torch.eye(layer.in_features)
                found[path] = (layer(eye) - torch.nn.functional.linear(eye, layer.weight, layer.bias)).T
    return found


def _effective_of(model, part, weight):
    attached = Ensemble([part]).attach(model)
    attached.set((weight,))
    found = _effective(model)
    attached.restore()
    return found


@pytest.mark.parametrize("name", ["lora", "delta_r", "qrlora", "dora"])
def test_layers_have_strengths_of_their_own(name, flux, saved):
    path = saved(name, 1)
    plain = _effective_of(flux, Part(path), 0.8)
    rules = shares(r"single_ -> 0.5; to_k -> 0")
    shared = _effective_of(flux, Part(path, rules), 0.8)
    assert any(".to_k" in path and "single" not in path for path in plain)
    for path, dW in plain.items():
        want = 0.5 if path.startswith("single_") else 0.0 if "to_k" in path else 1.0
        torch.testing.assert_close(shared[path], want * dW, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused(flux, saved, tmp_path):
    with pytest.raises(Refused, match="'up' is not of the form PATTERN"):
        shares("up")
    with pytest.raises(Refused, match=r"'\( -> 1' is not of the form"):
        shares("( -> 1")
    assert share_of(shares(None), "any") == 1.0
    one, two = saved("dora", 1), saved("dora", 2)
    with pytest.raises(Refused, match="both set the lengths of the base's rows"):
        Ensemble([Part(one), Part(two)]).attach(flux)
    with pytest.raises(Refused, match=r"no layer of .* has 'nowhere' in its name"):
        Ensemble([Part(one, shares("nowhere -> 1"))])
    with pytest.raises(Refused, match=r"was made by dora, whose change is no pair"):
        Ensemble([Part(one)]).save(tmp_path / "merged.safetensors", (1.0,), {})
    assert "forward" not in flux.transformer_blocks[0].attn.to_q.__dict__
