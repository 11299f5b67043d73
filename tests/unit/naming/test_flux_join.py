"""FLUX in two dialects: q, k and v apart in diffusers, joined in Black Forest Labs' model and with kohya."""

from __future__ import annotations

import importlib

import pytest
import torch
from files import FLUX
from torch import nn
from toys import METHODS, probes, shake

from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.targets import dense_weight, find
from lowrank.combine.mixture import read_mixture
from lowrank.errors import Refused
from lowrank.naming import flux as flux_names
from lowrank.naming.flux_join import join_layers

GROUPS = {
    "double": (
        *("img_attn.qkv", "txt_attn.qkv", "img_attn.proj", "txt_attn.proj"),
        *("img_mlp.0", "img_mlp.2", "txt_mlp.0", "txt_mlp.2"),
    ),
    "single": ("linear1", "linear2", "modulation.lin"),
}


class Flux(nn.Module):
    """The layers of Black Forest Labs' model, with the weights of diffusers' one; `Flux` is kohya's name."""

    def __init__(self, other: nn.Module, blocks: int) -> None:
        super().__init__()
        for kind, modules in GROUPS.items():
            for number in range(blocks):
                for module in modules:
                    path = f"{kind}_blocks.{number}.{module}"
                    parts = [other.get_submodule(ours) for ours, _ in flux_names.modules(path)]
                    self._put(path, torch.cat([dense_weight(part) for part in parts]))

    def _put(self, path: str, weight: torch.Tensor) -> None:
        parent: nn.Module = self
        *above, last = path.split(".")
        for name in above:
            if name not in parent._modules:
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.data.copy_(weight)
        parent.add_module(last, layer)


@pytest.fixture
def pair():
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        ours = FluxTransformer2DModel(**FLUX).requires_grad_(False).eval()
        return ours, Flux(ours, FLUX["num_layers"]).requires_grad_(False)


def changes(network: AdapterNetwork, at: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """ΔW by BFL's module, whichever dialect the network is on; zero rows where a part has no adapter."""
    by_path = {network.targets[layer.name].path: layer.delta_weight(at) for layer in network.layers()}
    if any(path.startswith("double_blocks") for path in by_path):
        return by_path
    found: dict[str, torch.Tensor] = {}
    for path, dW in by_path.items():
        piece = flux_names.joined_rows(path)
        assert piece is not None and dW is not None
        rows = dW.shape[0] // (piece.stop - piece.start)
        whole = found.setdefault(piece.module, torch.zeros(rows * piece.total, dW.shape[1]))
        whole[piece.start * rows : piece.stop * rows] = dW
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert any(dW.abs().max() > 1e-3 for dW in a.values())
    for path, dW in a.items():
        # where a part had no adapter, DoRA's g = m/‖W‖ is 1 but for rounding
        torch.testing.assert_close(b.get(path, torch.zeros_like(dW)), dW, rtol=1e-5, atol=1e-6)


def bound(name: str, cache):
    more = {} if name in ("lora", "dora") else {"basis_cache": str(cache)}
    return importlib.import_module(f"networks.{name}"), more


@pytest.mark.parametrize("name", ["lora", "dora", "delta_r", "delta_r_triu", "qrlora"])
@pytest.mark.parametrize("way", ["apart", "joined"])
def test_files_of_one_dialect_are_read_in_the_other_and_back(name, way, pair, cache, tmp_path):
    here, there = pair if way == "apart" else pair[::-1]
    network, more = bound(name, cache)
    made = network.create_network(1.0, 4, 2.0, None, [], here, target="blocks", exclude="norm|mod", **more)
    made.apply_to([], here, False, True)
    shake(made).save_weights(str(tmp_path / "a.safetensors"), None, {})
    if (name, way) == ("delta_r_triu", "apart"):
        with pytest.raises(Refused, match="delta_r would have another shape; export the file as"):
            network.create_network_from_weights(1.0, str(tmp_path / "a.safetensors"), None, [], there, **more)
        return
    moved, _ = network.create_network_from_weights(
        1.0, str(tmp_path / "a.safetensors"), None, [], there, **more
    )
    moved.apply_to([], there, False, True)
    assert moved.load_weights(str(tmp_path / "a.safetensors")) == ([], [])
    same(changes(made), changes(moved))
    ranks = {layer.rank for layer in moved.layers()}
    assert ranks == ({4, 12, 16} if way == "apart" else {4})
    moved.save_weights(str(tmp_path / "b.safetensors"), None, {})
    again, told = network.create_network_from_weights(
        1.0, str(tmp_path / "b.safetensors"), None, [], here, **more
    )
    again.apply_to([], here, False, True)
    assert again.load_state_dict(told, True) == ([], [])  # as kohya's flux_minimal_inference
    same(changes(made), changes(again))
    if way == "joined":  # parts of one layer with one D are that layer again
        assert {layer.rank for layer in again.layers()} == {4}


@pytest.mark.parametrize("name", [name for name in METHODS if name in probes()])
def test_every_slot_is_parted_exactly_or_joined_or_refused(name, pair, tmp_path):
    ours, theirs = pair
    method = probes()[name]

    def on(root: nn.Module, pattern: str, rank: int) -> AdapterNetwork:
        made = AdapterNetwork(method, find("unet", root, target=pattern), lambda _: (rank, 3.0))
        made.start()
        made.apply_to([], root, False, True)
        return made

    at = torch.tensor([300.0]) if method.gate else None
    whole = shake(on(theirs, r"img_attn\.qkv", 4))
    whole.save_weights(str(tmp_path / "joined.safetensors"), None, {})
    parted = on(ours, r"^transformer.*attn\.to_[qkv]$", 4)
    assert parted.load_weights(str(tmp_path / "joined.safetensors")) == ([], [])
    for layer in whole.layers():
        parts = [
            one
            for one in parted.layers()
            if flux_names.joined_rows(parted.targets[one.name].path).module.replace(".", "_") in layer.name
        ]
        for role, value in layer.tensors().items():
            ups = [part.tensors()[role] for part in parts]
            if role in ("up", "q", "magnitude"):
                assert torch.equal(torch.cat(ups, dim=1 if value.dim() == 3 else 0), value)
            else:
                assert all(torch.equal(one, value) for one in ups)
    if not method.experts:
        same(changes(whole, at), changes(parted, at))
    again = on(theirs, r"img_attn\.qkv", 4)
    parted.save_weights(str(tmp_path / "parted.safetensors"), None, {})
    again.load_weights(str(tmp_path / "parted.safetensors"))
    for one, other in zip(whole.layers(), again.layers(), strict=True):
        for role, value in one.tensors().items():
            torch.testing.assert_close(other.tensors()[role], value)
    shake(parted, seed=1).save_weights(str(tmp_path / "moved.safetensors"), None, {})
    wider = on(theirs, r"img_attn\.qkv", 12)
    if method.gate or method.experts:
        with pytest.raises(Refused, match=r"joins them, so (other ranks|experts) would"):
            wider.load_weights(str(tmp_path / "moved.safetensors"))
    else:
        wider.load_weights(str(tmp_path / "moved.safetensors"))
        same(changes(parted), changes(wider))


def test_strengths_that_differ_are_folded():
    one = {"up": torch.randn(4, 2), "down": torch.randn(2, 6), "alpha": torch.tensor(1.0)}
    two = {"up": torch.randn(4, 3), "down": torch.randn(3, 6), "alpha": torch.tensor(6.0)}
    joined = join_layers([one, None, two], [4, 4, 4])
    scale = float(joined["alpha"]) / 5
    want = torch.cat([0.5 * one["up"] @ one["down"], torch.zeros(4, 6), 2.0 * two["up"] @ two["down"]])
    torch.testing.assert_close(scale * joined["up"] @ joined["down"], want)


def test_a_mixture_takes_files_of_kohyas_flux(pair, tmp_path):
    ours, theirs = pair
    network, _ = bound("lora", None)
    made = network.create_network(1.0, 4, 2.0, None, [], theirs, target="blocks")
    made.apply_to([], theirs, False, True)
    shake(made).save_weights(str(tmp_path / "a.safetensors"), None, {})
    attached = read_mixture([tmp_path / "a.safetensors"]).attach(ours)
    attached.set((0.5,))
    for path, dW in changes(attached.networks[0]).items():
        torch.testing.assert_close(dW, 0.5 * changes(made)[path])
