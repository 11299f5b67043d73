"""Layers of other programs' adapters that are no pair of factors: what they change in a weight and a bias.

`foreign_kinds` has the kinds and their mathematics; here they are layers of a file, by layer of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.adapter_file import AdapterFile, ForeignKey, checked_tensor
from lowrank.errors import Refused
from lowrank.formats.foreign_kinds import (
    ALPHA,
    BIAS,
    MAGNITUDE,
    NORM,
    NORM_BIAS,
    SUFFIXES,
    Kind,
    Tensors,
    kind_of,
)
from lowrank.naming import keys
from lowrank.naming.flux import Piece
from lowrank.naming.places import LayerPath, places


@dataclass(frozen=True)
class ForeignLayer:
    """A layer of a file that is no pair of factors, as a change of the base's weight and bias.

    `piece` are the rows of a joined layer of FLUX that the layer has; `swapped`: the file has the halves of
    the rows exchanged.
    """

    kind: Kind
    tensors: Tensors
    module: str
    source: str = "the file"
    piece: Piece | None = None
    swapped: bool = False

    def __post_init__(self) -> None:
        tensors, kind = self.tensors, self.kind
        absent = [" or ".join(group) for group in kind.needed if tensors.keys().isdisjoint(group)]
        pairs = [(name, f"{name[:-1]}b") for name in ("lokr_w1_a", "lokr_w2_a")]
        absent += [second for first, second in pairs if first in tensors and second not in tensors]
        if absent:
            raise Refused(
                f"{self._named} and has no {', '.join(absent)}, only {', '.join(sorted(tensors))}; the file "
                "is not whole, use another"
            )
        if unknown := tensors.keys() - kind.names:
            raise Refused(
                f"{self._named} with {', '.join(sorted(unknown))}, which is not read here; merge it with the "
                "program that made it"
            )
        if self.piece is not None and (kind.needs_base or self._by_inputs()):
            raise Refused(
                f"{self._named} on several layers of FLUX in one, and cannot be divided among them; merge it "
                "with the program that made it"
            )

    @property
    def _named(self) -> str:
        return f"{self.module} in {self.source} is {self.kind.name}"

    @property
    def needs_base(self) -> bool:
        """Whether W′ − W depends on W."""
        return self.kind.needs_base or MAGNITUDE in self.tensors

    @property
    def changes_matrix(self) -> bool:
        """Whether it changes the weight of a linear layer or a convolution, not only a bias or a norm."""
        stored = self.tensors.get("diff", self.tensors.get("set_weight"))  # of a norm layer it is a vector
        return self.kind not in (NORM, BIAS, NORM_BIAS) and (stored is None or stored.dim() > 1)

    def _by_inputs(self) -> bool:
        """Whether a DoRA scale has a length for each input, as LyCORIS' wd_on_output=False has."""
        magnitude = self.tensors.get(MAGNITUDE)
        return magnitude is not None and magnitude.dim() > 1 and magnitude.shape[0] == 1 < magnitude.shape[1]

    def change(self, weight: Tensor | None = None) -> Tensor | None:
        """W′ − W in the shape of W, (O, I·K) without one; None where only the bias changes.

        Computed in fp32, or in float64 where a tensor or W is. Raises `Refused` for another size than W's.
        """
        if self.kind.change is None:
            return None
        if weight is None and self.needs_base:
            raise Refused(f"{self._named}, whose ΔW depends on the base; give the base with --model")
        used = [value for value in (*self.tensors.values(), weight) if value is not None]
        wide = torch.float64 if any(value.dtype == torch.float64 for value in used) else torch.float32
        tensors = {name: value.to(wide) for name, value in self.tensors.items()}
        W = None if weight is None else self._in_order(weight.to(wide))
        try:
            change = self._rows(self.kind.change(tensors, W))
            if W is not None:
                change = change.unflatten(1, W.shape[1:]) if W.dim() > 1 else change.reshape(len(W))
                change = change + torch.zeros_like(W)  # raises where the outputs differ
        except (RuntimeError, ValueError) as error:  # torch's words for shapes that do not fit
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.tensors.items())
            beside = "" if weight is None else f" beside a weight of {tuple(weight.shape)}"
            raise Refused(
                f"{self._named} with {shapes}{beside}, which do not fit ({str(error).splitlines()[0]}); the "
                "adapter is for another base"
            ) from error
        if W is not None and MAGNITUDE in tensors:
            change = self._decomposed(W + change, tensors[MAGNITUDE]) - W
        return self._in_order(change)

    def _in_order(self, rows: Tensor) -> Tensor:
        """Rows of diffusers' layer in the order of the file, and back."""
        return torch.cat(rows.chunk(2)[::-1]) if self.swapped else rows

    def _rows(self, change: Tensor) -> Tensor:
        """The layer's rows of a joined layer's ΔW."""
        if self.piece is None:
            return change
        start, stop = (edge * len(change) // self.piece.total for edge in (self.piece.start, self.piece.stop))
        return change[start:stop]

    def _decomposed(self, summed: Tensor, magnitude: Tensor) -> Tensor:
        """m ⊙ (W + ΔW)/‖W + ΔW‖, by rows, or by inputs in LyCORIS' wd_on_output=False."""
        axis = 1 if self._by_inputs() else 0
        others = [i for i in range(summed.dim()) if i != axis]
        length = torch.linalg.vector_norm(summed, dim=others, keepdim=True)
        return self._rows(magnitude).reshape(length.shape) * summed / length.masked_fill(length == 0, 1)

    def bias(self) -> Tensor | None:
        """What is added to the layer's bias (O,), if anything."""
        value = self.tensors.get(self.kind.bias or "")
        return None if value is None else self._in_order(self._rows(value.flatten()))

    def norm(self) -> float | None:
        """‖ΔW‖_F, or the norm of the bias' change where there is no other; None where it depends on W."""
        if self.needs_base:
            return None
        change = self.change()
        value = self.bias() if change is None else change
        assert value is not None  # a layer without weight has a bias
        return float(torch.linalg.vector_norm(value.double()))

    def rank(self) -> int | None:
        """The number of columns of the kind's factors, where it has such a number."""
        for name in ("lokr_w2_b", "lokr_w1_b", "hada_w1_b", "a2.weight"):
            if name in self.tensors:
                return min(self.tensors[name].shape[:2]) if name == "a2.weight" else len(self.tensors[name])
        return None


# ---------- from a file


class Split(NamedTuple):
    """A file's tensors by what they are: pairs of factors, layers of other kinds, and what is not read."""

    pairs: dict[str, Mapping[str, Tensor]]
    foreign: dict[LayerPath, ForeignLayer]
    modules: dict[LayerPath, str]  # of `foreign`, as the file names them
    not_understood: tuple[ForeignKey, ...]


def split(
    contents: AdapterFile, state: Mapping[str, Tensor], problems: dict[str, str] | None = None
) -> Split:
    """The layers of a file; `state` has its tensors by key.

    Raises `Refused` for a layer that is not whole or of two kinds, or puts the reason into `problems`.
    """
    groups: dict[str, dict[str, ForeignKey]] = {}  # by module, as all dialects spell it
    for key in contents.not_understood:
        if (suffix := key.key[len(key.module) + 1 :]) in SUFFIXES:
            groups.setdefault(keys.flat(keys.module_path(key.module)), {})[suffix] = key
    made = Split(dict(contents.layers), {}, {}, ())
    spelled = {keys.flat(module): module for module in made.pairs}
    used: set[str] = set()
    for flat, group in groups.items():
        module = keys.module_path(next(iter(group.values())).module)
        beside = made.pairs.get(spelled.get(flat, ""), {})
        try:
            layers = _layers(module, group, beside, contents.source, state)
        except Refused as refused:
            if problems is None:
                raise
            problems[module] = str(refused)
            layers = {}
        if not layers and module not in (problems or {}):
            continue  # of no kind that is known
        if beside.keys() <= {MAGNITUDE, ALPHA}:  # these two are of this kind, not of a pair
            made.pairs.pop(spelled.get(flat, ""), None)
        made.foreign.update(layers)
        made.modules.update(dict.fromkeys(layers, module))
        used |= {key.key for key in group.values() if layers}
    return made._replace(not_understood=tuple(k for k in contents.not_understood if k.key not in used))


def _layers(
    module: str, group: Mapping[str, ForeignKey], beside: Tensors, source: str, state: Tensors
) -> dict[LayerPath, ForeignLayer]:
    """The layers of one module of a file; none where its tensors are of no known kind."""
    tensors = {name: state[key.key] for name, key in group.items()}
    kind = kind_of(tensors)
    if kind is None:
        return {}
    if beside.keys() <= {MAGNITUDE, ALPHA}:
        tensors |= {name: value for name, value in beside.items() if name in kind.names}
    elif kind.change is not None:
        raise Refused(
            f"{module} in {source} is {kind.name} and has {', '.join(sorted(beside))} too; it is of two "
            "adapters, take one of them out"
        )
    for name, key in group.items():
        if name != "on_input":  # a whole number
            tensors[name] = checked_tensor(tensors[name], key.key, source)
    swapped = "adaLN" in module
    return {
        place: ForeignLayer(kind, tensors, module, source, piece, swapped) for place, piece in places(module)
    }


def refuse_foreign(layers: Iterable[ForeignLayer], source: str) -> None:
    """Raise `Refused` for layers that are no pair of factors, where a program needs pairs."""
    examples: dict[str, str] = {}
    kinds: Counter[str] = Counter()
    for layer in layers:
        kinds[layer.kind.name] += 1
        shown = next(name for name in layer.tensors if name in layer.kind.shown_by)
        examples.setdefault(layer.kind.name, f"{layer.module}.{shown}")
    counts = ", ".join(f"{name} in {count} layers ({examples[name]})" for name, count in kinds.items())
    raise Refused(
        f"{source} has {counts}, whose change is no pair of low-rank factors and would be left out; write "
        "the nearest LoRA with tools/export_lora.py --rank 32, or merge it with --to merged --model BASE"
    )
