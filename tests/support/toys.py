"""Small hosts and methods that only exist to put the laws to the test."""

from __future__ import annotations

import importlib
from functools import partial

import torch
from torch import Tensor, nn

from lowrank.adapters import experts, gate, penalty
from lowrank.adapters.method import Chain, Experts, Factor, Gate, Magnitude, Method, Penalty
from lowrank.adapters.network import AdapterNetwork
from lowrank.adapters.targets import find
from networks import delta_r, dora

RANK = 4


class Linears(nn.Module):
    """Two linear layers with a nonlinearity; input (B, T, 24)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    @staticmethod
    def example(batch: int = 3) -> Tensor:
        return torch.randn(batch, 5, 24)


class Convolutions(nn.Module):
    """A strided 3×3 and a 1×1 convolution; input (B, 6, 9, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 20, 3, stride=2, padding=1)
        self.second = nn.Conv2d(20, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    @staticmethod
    def example(batch: int = 3) -> Tensor:
        return torch.randn(batch, 6, 9, 7)


HOSTS = {"linear": Linears, "conv": Convolutions}


def base(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A frozen host with weights that do not depend on what ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return HOSTS[kind]().to(dtype).requires_grad_(False)


def _plain(
    weights, ranks, scales, core: bool = False, copies: bool = False, diagonal: bool = False, ups: int = 0
):
    values = {}
    for index, (name, weight) in enumerate(weights.items()):
        generator = torch.Generator().manual_seed(index)
        outs, ins = weight.shape
        shape = (ups, outs, ranks[name]) if ups else (outs, ranks[name])
        roles = {"down": torch.randn(ranks[name], ins, generator=generator), "up": torch.zeros(shape)}
        if core:
            roles |= {"core": torch.eye(ranks[name])}
        if diagonal:
            roles |= {"core": torch.rand(ranks[name], generator=generator)}
            roles["core_0"] = roles["core"].clone()
        if copies:
            roles["up"] = torch.randn(shape, generator=generator)
            roles |= {"q": roles["up"].clone(), "base_r": roles["down"].clone()}
        values[name] = roles
    return values, {}


def probes() -> dict[str, Method]:
    """Methods that fill the slots no shipped method fills yet, alone and together."""
    lora = Factor(_plain, trained=("down", "up"))
    prefix = Gate(lambda t, rank: gate.open_ranks(t, rank, 1))
    pull = Penalty(
        "pull",
        lambda network: penalty.quadratic(
            list(network.parameters()),
            [torch.zeros_like(p) for p in network.parameters()],
            [1.0] * len(list(network.parameters())),
        ),
    )
    return {
        "core": Method(
            "core",
            Factor(
                partial(_plain, core=True), trained=("down", "up", "core"), chains=(Chain(("up", "core")),)
            ),
        ),
        "diagonal+copy+gate": Method(
            "diagonal+copy+gate",
            Factor(
                partial(_plain, copies=True, diagonal=True),
                trained=("down", "up", "core"),
                chains=(Chain(("up", "core")),),
                copy=Chain(("q", "core_0"), ("base_r",)),
                diagonal=("core", "core_0"),
            ),
            prefix,
        ),
        "gate": Method("gate", lora, gate=prefix),
        "gate+copy": Method(
            "gate+copy",
            Factor(partial(_plain, copies=True), ("down", "up"), copy=Chain(("q",), ("base_r",))),
            prefix,
        ),
        "experts": Method(
            "experts",
            Factor(partial(_plain, ups=3), ("down", "up")),
            experts=Experts(3, experts.softmax_router),
        ),
        "experts on x": Method(
            "experts on x",
            Factor(partial(_plain, ups=2), ("down", "up")),
            experts=Experts(2, experts.softmax_router, on="x"),
        ),
        "delta_r | dora": delta_r.method(delta_r.Options()) | dora.LENGTHS,
        "magnitude+copy": Method(
            "magnitude+copy",
            Factor(partial(_plain, copies=True), ("down", "up"), copy=Chain(("q",), ("base_r",))),
            magnitude=Magnitude(detach=False),
        ),
        "penalty+rates": Method("penalty+rates", lora, penalty=(pull,), rates={"up": 4.0}),
    }


SHIPPED = (
    *("lora", "dora", "lalora", "delta_r", "delta_r_triu", "qrlora"),
    *("null_lora", "universal_lora", "network_null_lalora_plus", "tlora", "effilora"),
    *("pissa", "lora_fa", "vera"),
)
PLAIN = tuple(  # start without a cache of bases
    method for method in SHIPPED if method not in ("delta_r", "delta_r_triu", "qrlora", "pissa")
)
MERGED = tuple(method for method in SHIPPED if method not in ("effilora", "tlora"))  # have one ΔW
METHODS = (*SHIPPED, *probes())


def network(
    method: str, model: nn.Module, cache: str | None = None, rank: int = RANK, alpha: float = 3.0
) -> AdapterNetwork:
    """The method on every layer of the model, at its start values, attached."""
    if method in SHIPPED:
        module = importlib.import_module(f"networks.{method}")
        given = {"basis_path": "auto:random"} if method.startswith(("universal", "network_null")) else {}
        arguments = {"target": ".", **given} | ({} if method in PLAIN else {"basis_cache": str(cache)})
        net = module.create_network(1.0, rank, alpha, None, [], model, **arguments)
    else:
        net = AdapterNetwork(probes()[method], find("unet", model, target="."), lambda _: (rank, alpha))
        net.start()
    net.apply_to([], model, False, True)
    net.prepare_grad_etc([], model)
    return net


def shake(net: AdapterNetwork, scale: float = 0.3, seed: int = 0) -> AdapterNetwork:
    """Move every trained tensor away from its start, as training would."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise).to(parameter) * scale)
    return net
