"""Universal LoRA: fix input and output directions, train only the core between them (after arXiv 2512.05117).

    y = W x + s·L·C·R x        L (O×K), R (K×I) frozen, orthonormal; C (K×K or a diagonal) from zero

The paper takes L and R from a collection of adapters: basis_path=FILE, a file made by
tools/extract_universal_basis.py. Without a collection, L and R are computed here:

    auto:grad (default)   top singular vectors of the first gradients of the training data
    auto:actgrad          top eigenvectors of the layer's inputs and of its output gradients, separately
    auto:weight           top singular vectors of W
    auto:random           random directions, a control

Difference from the paper: it adds the collection's mean adapter to W, so that training does not start at the
base model. Here the mean becomes one column of L and one row of R. A few fixed directions restrict strongly:
expect less forgetting, not better learning.
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
NONE = "none"  # no basis: whole matrices are trained, in the methods that allow it
EMBEDDED = "embedded"  # the basis is inside the adapter file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    basis_path: str | None = structural(None, words=(*AUTO, NONE, EMBEDDED))
    """basis file, or auto:grad (default), auto:actgrad, auto:weight, auto:random; none trains whole matrices,
    in network_null_lalora and its variants only"""
    basis_required: bool = False
    """refuse to start without basis_path instead of using auto:grad"""
    basis_samples: int = 256
    """number of training samples that auto:grad and auto:actgrad compute the basis from"""
    universal_core: str = structural("full")
    """full: train all K×K entries of the core; diagonal: train only its K diagonal entries"""

    def __post_init__(self) -> None:
        path, cores = self.basis_path or "", ("full", "diagonal")
        if not path and self.basis_required:
            raise Refused(
                f"basis_required=True needs a basis_path; give a basis file, or one of {', '.join(AUTO)}"
            )
        if path.startswith("auto:") and path not in AUTO:
            raise Refused(f"basis_path {path!r} is not one of {', '.join(AUTO)}{nearest(path, AUTO)}")
        if self.universal_core not in cores:
            raise Refused(
                f"universal_core {self.universal_core!r} is not one of "
                f"{', '.join(cores)}{nearest(self.universal_core, cores)}"
            )
        if self.basis_samples < 1:
            raise Refused(f"basis_samples={self.basis_samples} gives no gradient; give 1 or more")


class Directions:
    """The frozen L and R of every layer, from the source that `basis_path` names."""

    def __init__(self, options: Options) -> None:
        self.source, self.samples = options.basis_path or AUTO[0], options.basis_samples
        self.file: BasisFile | None = None if self.source in (*AUTO, EMBEDDED) else read_basis(self.source)

    @property
    def options(self) -> dict[str, str]:
        """The basis_path to write into the adapter's metadata."""
        return {"basis_path": EMBEDDED if self.learned or self.file else self.source}

    @property
    def learned(self) -> bool:
        """Whether L and R are computed from the training data, so that they must be saved in the file."""
        return self.source in AUTO[:2]

    def allowed_ranks(self, weights: Mapping[str, Tensor], widths: Mapping[str, int]) -> dict[str, int]:
        """Return `widths`, limited to what the basis file has; a layer not in the file gets 0."""
        if self.file is None:
            return dict(widths)
        matched = for_layers(self.file, {name: (W.shape[0], W.shape[1]) for name, W in weights.items()})
        if matched.missing:
            logger.warning(
                "%s has no basis for %d of %d layers, for example %s; these layers are not trained",
                *(self.source, len(matched.missing), len(weights), matched.missing[0]),
            )
        available = {name: pair.left.shape[1] for name, pair in matched.pairs.items()}
        limited = [name for name in available if available[name] < widths[name]]
        if limited:
            logger.warning(
                "%s has fewer directions than --network_dim in %d layers, for example %d in %s; all are used",
                *(self.source, len(limited), available[limited[0]], limited[0]),
            )
        return {name: min(width, available.get(name, 0)) for name, width in widths.items()}

    def pairs(
        self, weights: Mapping[str, Tensor], widths: Mapping[str, int]
    ) -> tuple[Mapping[str, Pair], dict[str, str]]:
        """Return L (O, K) and R (K, I) by layer, and metadata.

        Learned bases (auto:grad, auto:actgrad) are random here; the warm-up stage of `stages` sets them.
        """
        if self.source == EMBEDDED:
            raise Refused("the file was saved without its basis (save_basis=none); give basis_path=FILE")
        if self.file is None:
            make_basis = weight_basis if self.source == "auto:weight" else random_basis
            return make_basis(weights, widths), {"basis": self.source}
        matched = for_layers(self.file, {name: (W.shape[0], W.shape[1]) for name, W in weights.items()}).pairs
        pairs = {name: Pair(matched[name].left[:, :K], matched[name].right[:K]) for name, K in widths.items()}
        return pairs, {"basis": "file", "universal_basis_hash": self.file.facts["hash"]}

    def stages(self, cores: tuple[str, ...], chains: int) -> tuple[Warmup, ...]:
        """Return the warm-up stage that computes L and R, if the training data decide them.

        The stage is skipped if a role in `cores` is not zero. `chains`: number of products; each gets
        rank/chains.
        """
        if not self.learned:
            return ()
        stage = basis_stage(
            self.source.removeprefix("auto:"), self.samples, _assign, lambda layer: layer.rank // chains
        )

        def run(network: Any, samples: Any) -> None:
            if any(layer.roles()[core].any() for layer in network.layers() for core in cores):
                logger.info("the adapter is already trained; its basis is kept")
            else:
                stage.run(network, samples)

        return (Warmup(stage.name, run),)


def _assign(layer: Any, left: Tensor, right: Tensor) -> None:
    layer.basis_up.copy_(left.reshape(layer.basis_up.shape))
    layer.basis_down.copy_(right.reshape(layer.basis_down.shape))


def start(weights, ranks, scales, directions: Directions, diagonal: bool) -> Start:
    """Return L (O, K), R (K, I) and a zero core, (K, K) or (K,), for each layer."""
    pairs, metadata = directions.pairs(weights, ranks)
    values = {}
    for name, (L, R) in pairs.items():
        core = torch.zeros(ranks[name]) if diagonal else torch.zeros(ranks[name], ranks[name])
        values[name] = {"basis_up": L, "core": core, "basis_down": R}
    return values, metadata


def method(options: Options) -> Method:
    if options.basis_path == NONE:
        raise Refused(
            f"basis_path={NONE} is not possible with universal_lora; give a basis, or use network_null_lalora"
        )
    directions, diagonal = Directions(options), options.universal_core == "diagonal"
    factor = Factor(
        partial(start, directions=directions, diagonal=diagonal),
        trained=("core",),
        chains=(Chain(("basis_up", "core"), ("basis_down",)),),
        diagonal=("core",) if diagonal else (),
        loraplus=("core",),
        allowed_ranks=directions.allowed_ranks,
        not_recomputable="are found in the training data" if directions.learned else "",
    )
    return Method(
        "universal_lora", factor, warmup=directions.stages(("core",), 1), options=directions.options
    )


create_network, create_network_from_weights = bind(method, Options)
