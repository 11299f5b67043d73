"""Joining and cutting of FLUX's q, k and v, which are three layers in diffusers' adapter files.

Black Forest Labs' model, and with it kohya's trainers, has one joined layer:

    apart → joined    U = blockdiag(U_q, U_k, U_v), D = [D_q ; D_k ; D_v]: exact, of the sum of the ranks
    joined → apart    the rows of U, the same D: exact, of the same rank

Parts that were cut from one joined layer, with one D, are joined to that layer again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lowrank.naming import flux as flux_names
from lowrank.naming import keys

Roles = dict[str, Tensor]
OUTPUTS = frozenset({"up", keys.QR_BASIS[0], "magnitude"})  # roles whose rows are the layer's outputs


def strength(roles: Mapping[str, Tensor], rank: int) -> float:
    """Return s = alpha/rank of a file's layer, 1 without an alpha; an alpha of 0 gives 0.

    ComfyUI, A1111, diffusers and kohya's merging do the same. kohya's and LyCORIS' networks read an alpha of
    0 as the rank.
    """
    return float(roles["alpha"].reshape(-1)[0]) / rank if "alpha" in roles else 1.0


def cut_rows(roles: Mapping[str, Tensor], rows: slice, outputs: Iterable[str] = OUTPUTS) -> Roles:
    """Return the part of a layer that computes these rows of its output: ΔW[rows]."""
    outputs = set(outputs)
    return {
        role: (value[:, rows] if value.dim() == 3 else value[rows]) if role in outputs else value  # E×O×R
        for role, value in roles.items()
    }


def alike(parts: Sequence[Roles | None], outputs: Iterable[str] = OUTPUTS) -> bool:
    """Return whether all parts have equal tensors besides `outputs`, so that they are rows of one layer."""
    first, *others = (part for part in parts if part is not None)
    common = first.keys() - set(outputs)
    return all(
        part.keys() == first.keys() and all(torch.equal(part[role], first[role]) for role in common)
        for part in others
    )


def join_layers(
    parts: Sequence[Roles | None],
    rows: Sequence[int],
    outputs: Iterable[str] = OUTPUTS,
    cores: Iterable[str] = (),
) -> Roles:
    """Return one layer whose outputs are those of the parts, `rows[i]` of part i; None: no adapter there.

    `outputs` and `cores` are the roles that are O×R and R×R (or R); the others are R×I. If a part has no
    adapter, the caller adds the magnitude.
    """
    given = [part for part in parts if part is not None]
    outputs, cores, first, same = set(outputs), set(cores), given[0], alike(parts, outputs)
    wide = next(role for role in first if role not in outputs | cores | {"alpha"})
    strengths = [strength(part, part[wide].shape[0]) for part in given]
    common = next(filter(None, strengths), 1.0)  # of the joined layer; U has the ratio to it
    joined: Roles = {}
    for role, value in first.items():
        if role == "magnitude":
            if len(given) == len(parts):
                joined[role] = torch.cat([part[role].flatten() for part in given])
        elif role in outputs:
            remaining = iter(strengths)
            blocks = []
            for part, count in zip(parts, rows, strict=True):
                if part is None:
                    blocks.append(value.new_zeros(*value.shape[:-2], count, value.shape[-1] if same else 0))
                else:
                    ratio = next(remaining) / common
                    blocks.append(part[role] if ratio == 1 else part[role] * ratio)
            joined[role] = torch.cat(blocks, -2) if same else torch.block_diag(*blocks)
        elif same:
            joined[role] = value
        elif role == "alpha":
            joined[role] = value.new_tensor(common * sum(part[wide].shape[0] for part in given))
        elif role in cores and value.dim() == 2:
            joined[role] = torch.block_diag(*(part[role] for part in given))
        else:
            joined[role] = torch.cat([part[role] for part in given])
    return joined


def piece_rows(piece: flux_names.Piece, outs: int) -> slice:
    """Return the rows of a part in a joined layer of `outs` outputs."""
    share = outs // piece.total
    return slice(piece.start * share, piece.stop * share)
