"""What methods are for, on toys: which one is better, by ratios with room, at equal steps and rates.

These are directions and not exact mathematics. Toys are small enough for all of it to be learned in seconds.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import Linears, base

from networks import effilora, lora, universal_lora
from tools import extract_universal_basis

# ---------- EffiLoRA on four concepts

D, M, BLOCKS, CONCEPTS = 48, 24, 4, 4


class Blocks(nn.Module):
    """Residual blocks on (B, 48), adapted where they read: all of one stream, as a transformer's."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.ModuleList(nn.Linear(D, M) for _ in range(BLOCKS))
        self.write = nn.ModuleList(nn.Linear(M, D, bias=False) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for read, write in zip(self.read, self.write, strict=True):
            x = x + write(F.silu(read(x)))
        return x


def mixture(seed: int, size: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs of four concepts, and what a model gives that was changed for each: at rank 2 in every block,
    along the concept's own two directions of the stream."""
    own = torch.Generator().manual_seed(seed)
    means, answers = 1.5 * torch.randn(CONCEPTS, D, generator=own), []
    concept = torch.randint(CONCEPTS, (size,), generator=draw)
    x = means[concept] + torch.randn(size, D, generator=draw)
    for _ in range(CONCEPTS):
        changed, down = blocks(seed), torch.randn(2, D, generator=own) / D**0.5
        for layer in changed.read:
            layer.weight += torch.randn(M, 2, generator=own) / 2**0.5 @ down
        answers.append(changed(x))
    return x, torch.stack(answers)[concept, torch.arange(size)]


def blocks(seed: int) -> Blocks:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Blocks().requires_grad_(False)


def learned(
    module, seed: int, rank: int, steps: int = 300, lr: float = 1e-2, decay: bool = True, **arguments
) -> tuple[float, int]:
    """(held-out loss, trained parameters) after some steps."""
    model = blocks(seed)
    torch.manual_seed(seed)
    network = module.create_network(1.0, rank, float(rank), None, [], model, target="read", **arguments)
    network.apply_to([], model, False, True)
    optimizer = torch.optim.AdamW(network.prepare_optimizer_params(lr, lr)[0], lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps if decay else 10**9)
    xs, ys = mixture(seed, steps * 64, torch.Generator().manual_seed(100 + seed))
    for x, y in zip(xs.split(64), ys.split(64), strict=True):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        schedule.step()
    x, y = mixture(seed, 1024, torch.Generator().manual_seed(999))
    with torch.no_grad():
        return float((model(x) - y).square().mean()), sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("seed", [0, 1])
def test_three_experts_against_loras(seed):
    small, _ = learned(lora, seed, 4)
    large, most = learned(lora, seed, 12)
    routed, count = learned(effilora, seed, 4, num_experts=3)
    assert large < routed < 0.95 * small and count < 0.5 * most


# ---------- a basis of a collection


def task(model: nn.Module, seed: int) -> nn.Module:
    """The toy changed within 3 × 3 directions of each layer that all tasks share."""
    changed = base("linear")
    own, shared = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1)
    for layer in (changed.first, changed.second):
        O, I = layer.weight.shape
        up, down = torch.randn(O, 3, generator=shared), torch.randn(3, I, generator=shared)
        layer.weight += 0.3 * up @ torch.randn(3, 3, generator=own) @ down / I**0.5
    return changed


def fit(module, wanted: nn.Module, rank: int, steps: int, lr: float, **arguments):
    """(network, its last loss on new inputs) trained to answer as `wanted` does."""
    torch.manual_seed(0)
    model = base("linear")
    network = module.create_network(1.0, rank, float(rank), None, [], model, target=".", **arguments)
    network.apply_to([], model, False, True)
    groups, _ = network.prepare_optimizer_params(lr, lr)
    optimizer = torch.optim.AdamW(groups, lr, weight_decay=0)
    losses = []
    for _ in range(steps):
        x = Linears.example(16)
        loss = (model(x) - wanted(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return network, losses


@pytest.mark.parametrize("new", [100, 101])
def test_universal_basis_beats_random_basis(new, tmp_path):
    for seed in range(10, 15):
        network, _ = fit(lora, task(base("linear"), seed), 4, 100, 1e-2)
        network.save_weights(str(tmp_path / f"{seed}.safetensors"), None, {})
    basis = tmp_path / "basis.safetensors"
    extract_universal_basis.main(
        ["--lora_dir", str(tmp_path), "--output", str(basis), "--rank", "8", "--tau", "1"]
    )
    ended = {}
    for path in (str(basis), "auto:random"):
        network, losses = fit(universal_lora, task(base("linear"), new), 8, 150, 1e-2, basis_path=path)
        ended[path] = sum(losses[-10:]), sum(p.numel() for p in network.parameters())
    (found, count), (chance, other) = ended.values()
    assert found < 0.9 * chance and count == other


# ---------- LoRA+


@pytest.mark.parametrize("seed", [0, 1])
def test_loraplus_speed_at_small_learning_rate(seed):
    """At a fixed rate; with a tuned one nothing is promised."""
    rate = {"lr": 5e-4, "decay": False}
    slow, long = (learned(lora, seed, 4, steps, **rate)[0] for steps in (100, 300))
    fast, _ = learned(lora, seed, 4, 100, **rate, loraplus_lr_ratio=16.0)
    assert fast < 1.03 * long and fast < 0.75 * slow
