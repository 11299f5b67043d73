"""Universal LoRA: directions are given, only how they are joined is trained (after arXiv 2512.05117).

    y = W x + s·L·C·R x        L (O×K) and R (K×I) frozen and orthonormal, C (K×K, or a diagonal) from zero

The paper takes L and R from a collection of adapters (tools/extract_universal_basis.py). Without one, the
first gradients of the training data give them: basis_path=auto:grad, the default. auto:actgrad takes inputs
and gradients apart, auto:weight the base's strongest directions, and auto:random is the control.

The paper adds a mean adapter, which would move the start off the base; here the mean is a direction like
others. A stress test of the paper found a few directions to be a strong restraint: expect less forgetting,
not more learning.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank.adapters.method import Chain, Factor, Method, Start, Warmup, structural
from lowrank.adapters.network_module import bind
from lowrank.bases.basis_file import BasisFile, Pair, for_layers, random_basis, read_basis, weight_basis
from lowrank.bases.gradients import basis_stage
from lowrank.errors import Refused, nearest

AUTO = ("auto:grad", "auto:actgrad", "auto:weight", "auto:random")
NONE = "none"  # whole matrices, for methods that can do without a basis
EMBEDDED = "embedded"  # in the file that is loaded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    basis_path: str | None = structural(None, words=(*AUTO, NONE, EMBEDDED))
    """basis file, or auto:grad (unset), auto:actgrad, auto:weight, auto:random; none where a method can"""
    basis_required: bool = False
    """refuse a missing basis_path instead of taking auto:grad"""
    basis_samples: int = 256
    """training samples that auto:grad and auto:actgrad look at"""
    universal_core: str = structural("full")
    """full trains all K×K entries of the core, diagonal its diagonal"""

    def __post_init__(self) -> None:
        given, cores = self.basis_path or "", ("full", "diagonal")
        if not given and self.basis_required:
            raise Refused(
                f"basis_required=True and no basis_path; name a basis file, or one of {', '.join(AUTO)}"
            )
        if given.startswith("auto:") and given not in AUTO:
            raise Refused(f"basis_path {given!r} is not one of {', '.join(AUTO)}{nearest(given, AUTO)}")
        if self.universal_core not in cores:
            raise Refused(
                f"universal_core {self.universal_core!r} is not one of "
                f"{', '.join(cores)}{nearest(self.universal_core, cores)}"
            )
        if self.basis_samples < 1:
            raise Refused(f"basis_samples={self.basis_samples} gives no gradient; give 1 or more")


class Directions:
    """L and R of every layer, from where `basis_path` says."""

    def __init__(self, options: Options) -> None:
        self.source, self.samples = options.basis_path or AUTO[0], options.basis_samples
        self.file: BasisFile | None = None if self.source in (*AUTO, EMBEDDED) else read_basis(self.source)

    @property
    def options(self) -> dict[str, str]:
        """What the adapter's own file says of them."""
        return {"basis_path": EMBEDDED if self.learned or self.file else self.source}

    @property
    def learned(self) -> bool:
        """Whether they come from the training data, so that only files can bring them back."""
        return self.source in AUTO[:2]

    def fit(self, weights: Mapping[str, Tensor], widths: Mapping[str, int]) -> dict[str, int]:
        """No more directions than the basis has; layers that it lacks get 0 and are left out."""
        if self.file is None:
            return dict(widths)
        matched = for_layers(self.file, {name: (W.shape[0], W.shape[1]) for name, W in weights.items()})
        if matched.missing:
            logger.warning(
                "%s has no basis for %d of %d layers, which are left out, for example %s",
                *(self.source, len(matched.missing), len(weights), matched.missing[0]),
            )
        have = {name: pair.left.shape[1] for name, pair in matched.pairs.items()}
        fewer = [name for name in have if have[name] < widths[name]]
        if fewer:
            logger.warning(
                "%s has fewer directions than --network_dim asks for in %d layers, for example %d in %s",
                *(self.source, len(fewer), have[fewer[0]], fewer[0]),
            )
        return {name: min(width, have.get(name, 0)) for name, width in widths.items()}

    def pairs(
        self, weights: Mapping[str, Tensor], widths: Mapping[str, int]
    ) -> tuple[Mapping[str, Pair], dict[str, str]]:
        """(L (O, K), R (K, I)) by layer, and facts; placeholders where the data have yet to give them."""
        if self.source == EMBEDDED:
            raise Refused("the file leaves out its basis (save_basis=none); name it with basis_path=FILE")
        if self.file is None:
            made = weight_basis if self.source == "auto:weight" else random_basis
            return made(weights, widths), {"basis": self.source}
        found = for_layers(self.file, {name: (W.shape[0], W.shape[1]) for name, W in weights.items()}).pairs
        cut = {name: Pair(found[name].left[:, :K], found[name].right[:K]) for name, K in widths.items()}
        return cut, {"basis": "file", "universal_basis_hash": self.file.facts["hash"]}

    def stages(self, cores: tuple[str, ...], chains: int) -> tuple[Warmup, ...]:
        """The stage that finds them, of a method whose ΔW is zero while the roles `cores` are."""
        if not self.learned:
            return ()
        found = basis_stage(
            self.source.removeprefix("auto:"), self.samples, _assign, lambda layer: layer.rank // chains
        )

        def run(network: Any, samples: Any) -> None:
            if any(layer.roles()[core].any() for layer in network.layers() for core in cores):
                logger.info("the adapter is trained already; its basis stays")
            else:
                found.run(network, samples)

        return (Warmup(found.name, run),)


def _assign(layer: Any, left: Tensor, right: Tensor) -> None:
    layer.basis_up.copy_(left.reshape(layer.basis_up.shape))
    layer.basis_down.copy_(right.reshape(layer.basis_down.shape))


def start(weights, ranks, scales, directions: Directions, diagonal: bool) -> Start:
    """L, R and a core of zeros."""
    pairs, facts = directions.pairs(weights, ranks)
    values = {}
    for name, (L, R) in pairs.items():
        core = torch.zeros(ranks[name]) if diagonal else torch.zeros(ranks[name], ranks[name])
        values[name] = {"basis_up": L, "core": core, "basis_down": R}
    return values, facts


def method(options: Options) -> Method:
    if options.basis_path == NONE:
        raise Refused(
            f"basis_path={NONE} leaves universal_lora without directions; use network_null_lalora for that"
        )
    directions, diagonal = Directions(options), options.universal_core == "diagonal"
    factor = Factor(
        partial(start, directions=directions, diagonal=diagonal),
        trained=("core",),
        chains=(Chain(("basis_up", "core"), ("basis_down",)),),
        diagonal=("core",) if diagonal else (),
        plus=("core",),
        fit=directions.fit,
        unique="are found in the training data" if directions.learned else "",
    )
    return Method(
        "universal_lora", factor, warmup=directions.stages(("core",), 1), options=directions.options
    )


create_network, create_network_from_weights = bind(method, Options)
