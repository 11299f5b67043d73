"""The nearest adapter to the difference of two checkpoints, computed layer by layer.

Both are read a tensor at a time; in memory are one layer of each, and the factors that were found.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from lowrank.errors import Refused
from lowrank.formats.base_checkpoint import BaseCheckpoint
from lowrank.formats.delta import Delta
from lowrank.formats.read import Adapter
from lowrank.formats.resize import Loss, Losses, RankRule, cut_matrix
from lowrank.naming.places import LayerPath, adapter_family, component_name

_EMBEDDING = re.compile(r"(token|position)_embedding$|^shared$|relative_attention_bias$")


class Extracted(NamedTuple):
    """An adapter, what it loses of the difference, and what of the difference it does not have, by kind."""

    adapter: Adapter
    loss: Loss
    equal: int  # layers without a difference, or with one below the limit
    left_out: Mapping[str, int]  # norm layers, biases and embeddings that differ


def extract_adapter(
    base: BaseCheckpoint,
    tuned: BaseCheckpoint,
    rule: RankRule,
    least: float = 0.0,
    parts: str = "all",
    family: str | None = None,
    watch: Callable[[LayerPath, int, int], None] = lambda *_: None,
) -> Extracted:
    """The adapter that is nearest to W′ − W in every layer, with the ranks of a rule.

    Layers with ‖W′ − W‖ ≤ `least`·‖W‖ are left out. `watch` sees each layer with its number and how many
    there are. Raises `Refused` for two models of different layers or sizes, and where nothing differs.
    """
    places = _common_places(base, tuned, parts)
    layers: dict[LayerPath, Delta] = {}
    losses, equal, left_out = Losses(), 0, Counter()
    for number, place in enumerate(places):
        watch(place, number, len(places))
        shape = base.shape(place)
        if tuned.shape(place) != shape:
            raise Refused(
                f"{place.path} is {shape} in {base.path} and {tuned.shape(place)} in {tuned.path}; give two "
                "checkpoints of one model"
            )
        biases = [model.bias(place) for model in (base, tuned) if model.has_bias(place)]
        left_out["biases"] += len(biases) == 2 and not torch.equal(*biases)
        W = base.original(place)
        change = tuned.original(place) - W
        if not torch.isfinite(change).all():
            raise Refused(f"{place.path} has NaN or infinite values in {base.path} or {tuned.path}")
        if float(change.norm()) <= least * float(W.norm()):
            equal += 1
        elif len(shape) == 1:
            left_out["norm layers"] += 1
        elif _EMBEDDING.search(place.path):
            left_out["embeddings"] += 1
        else:
            layers[place], lost, whole = cut_matrix(change.flatten(1), rule, tuple(shape[2:]))
            losses.add(place.path, lost, whole)
    if not layers:
        raise Refused(
            f"{base.path} and {tuned.path} have no layer that differs by more than {least:g} of its weight; "
            "give a checkpoint that was trained further, or a lower --min_change"
        )
    adapter = Adapter(str(tuned.path), family or _family(base), layers)
    return Extracted(adapter, losses.loss(), equal, +left_out)


def _common_places(base: BaseCheckpoint, tuned: BaseCheckpoint, parts: str) -> list[LayerPath]:
    """The layers to compare: of the components that both checkpoints have, and that were asked for."""

    def chosen(checkpoint: BaseCheckpoint, both: set[str]) -> list[LayerPath]:
        denoiser = {"all": (True, False), "unet": (True,), "text": (False,)}[parts]
        asked = (place for place in checkpoint.places() if (place.part == "unet") in denoiser)
        return [place for place in asked if place.part in both]

    both = {place.part for place in base.places()} & {place.part for place in tuned.places()}
    first, second = chosen(base, both), chosen(tuned, both)
    if not first:
        raise Refused(
            f"{base.path} and {tuned.path} have no component in common; give checkpoints of one model"
        )
    if apart := set(first) ^ set(second):
        place = min(apart)
        where = base.path if place in base else tuned.path
        raise Refused(f"{place.path} is only in {where}; give two checkpoints of one model")
    return first


def _family(base: BaseCheckpoint) -> str:
    """The family of a model by the names of all its layers, written as files have them."""
    names = [
        place.path if place.part == "unet" else f"{component_name(place.part, 'sd15')}.{place.path}"
        for place in base.places()
    ]
    try:
        return adapter_family(names, {})
    except Refused as refused:
        raise Refused(f"{base.path} may be SD 1.x or SDXL; give --base sd15 or --base sdxl") from refused
