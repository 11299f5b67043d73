"""A file's tensors as this model's layers: every spelling of a name, and FLUX's two ways to hold q, k and v.

diffusers has them apart, Black Forest Labs' model (and with it kohya's trainers) joined in one layer:

    apart → joined    U = blockdiag(U_q, U_k, U_v), D = [D_q ; D_k ; D_v]: exact, of the sum of the ranks
    joined → apart    the rows of U, the same D: exact, of the same rank

Parts that come of one joined layer, with one D, are joined to what they were.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lowrank import bfl
from lowrank.adapters import keys
from lowrank.adapters.host import dense_weight, host_shape
from lowrank.adapters.method import Method
from lowrank.adapters.targets import Target
from lowrank.errors import Refused

logger = logging.getLogger(__name__)

Roles = dict[str, Tensor]
OUTPUTS = frozenset({"up", "q", "magnitude"})  # roles whose rows are the layer's outputs


def strength(roles: Mapping[str, Tensor], rank: int) -> float:
    """s = alpha/rank of a file's layer of this rank, 1 without an alpha; an alpha of 0 is a strength of 0.

    ComfyUI, A1111, diffusers and kohya's merging read a file so. kohya's and LyCORIS' networks take a 0 for
    the rank, as one does who asks for a new network.
    """
    return float(roles["alpha"].reshape(-1)[0]) / rank if "alpha" in roles else 1.0


def tell_zeros(source: str, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Warn of layers whose alpha is 0, which programs read in two ways."""
    zeros = [name for name, roles in layers.items() if "alpha" in roles and not roles["alpha"].any()]
    if zeros:
        logger.warning(
            "%s: alpha is 0 in %d of %d layers, for example %s: they add nothing, as in ComfyUI, A1111 and "
            "diffusers; kohya's and LyCORIS' networks take the rank for it, and if that is meant, set it",
            *(source, len(zeros), len(layers), min(zeros)),
        )


def cut(roles: Mapping[str, Tensor], rows: slice, outputs: Iterable[str] = OUTPUTS) -> Roles:
    """The part of a layer that gives these rows of its output: ΔW[rows]."""
    outputs = set(outputs)
    return {
        role: (value[:, rows] if value.dim() == 3 else value[rows]) if role in outputs else value  # E×O×R
        for role, value in roles.items()
    }


def alike(parts: Sequence[Roles | None], outputs: Iterable[str] = OUTPUTS) -> bool:
    """Whether all parts have one D: they are rows of one layer as it was."""
    first, *rest = (part for part in parts if part is not None)
    common = first.keys() - set(outputs)
    return all(
        part.keys() == first.keys() and all(torch.equal(part[role], first[role]) for role in common)
        for part in rest
    )


def join(
    parts: Sequence[Roles | None],
    rows: Sequence[int],
    outputs: Iterable[str] = OUTPUTS,
    cores: Iterable[str] = (),
) -> Roles:
    """One layer whose outputs are the parts', `rows[i]` of part i; None is a part without an adapter.

    `outputs` and `cores` are the roles that are O×R and R×R (or R); the others are R×I. The magnitude is left
    to the caller where a part has none.
    """
    given = [part for part in parts if part is not None]
    outputs, cores, first, same = set(outputs), set(cores), given[0], alike(parts, outputs)
    wide = next(role for role in first if role not in outputs | cores | {"alpha"})
    strengths = [strength(part, part[wide].shape[0]) for part in given]
    common = next(filter(None, strengths), 1.0)  # one alpha for all: what differs from it goes into U
    found: Roles = {}
    for role, value in first.items():
        if role == "magnitude":
            if len(given) == len(parts):
                found[role] = torch.cat([part[role].flatten() for part in given])
        elif role in outputs:
            left = iter(strengths)
            blocks = []
            for part, count in zip(parts, rows, strict=True):
                if part is None:
                    blocks.append(value.new_zeros(*value.shape[:-2], count, value.shape[-1] if same else 0))
                else:
                    share = next(left) / common
                    blocks.append(part[role] if share == 1 else part[role] * share)
            found[role] = torch.cat(blocks, -2) if same else torch.block_diag(*blocks)
        elif same:
            found[role] = value
        elif role == "alpha":
            found[role] = value.new_tensor(common * sum(part[wide].shape[0] for part in given))
        elif role in cores and value.dim() == 2:
            found[role] = torch.block_diag(*(part[role] for part in given))
        else:
            found[role] = torch.cat([part[role] for part in given])
    return found


_FLAT = re.compile(r"(double|single)_blocks_(\d+)_(.+)$")


def split(layers: Mapping[str, Roles]) -> dict[str, Roles]:
    """Layers by module, the blocks of BFL's FLUX under diffusers' paths with their joined layers apart."""
    found: dict[str, Roles] = {}
    for module, roles in layers.items():
        flat, outputs = _FLAT.match(keys.flat(module)), OUTPUTS & roles.keys()
        path = f"{flat[1]}_blocks.{flat[2]}.{_dotted(flat[3])}" if flat else ""
        held = bfl.modules(path) if outputs else []
        for ours, piece in held:
            rows = _rows(piece, max(roles[role].shape[0] for role in outputs))
            found[ours] = roles if piece.total == 1 else cut(roles, rows)
        if not held:
            found[module] = roles
    return found


def _dotted(inside: str) -> str:
    """`img_attn_qkv` as `img_attn.qkv`; empty for no layer of a block."""
    names = (*bfl.DOUBLE.values(), *bfl.SINGLE.values(), *bfl.JOINED)
    return next((name for name in names if name.replace(".", "_") == inside), "")


def _rows(piece: bfl.Piece, outs: int) -> slice:
    """The rows of a part in a joined layer of `outs` outputs."""
    share = outs // piece.total
    return slice(piece.start * share, piece.stop * share)


def read(
    state: Mapping[str, Tensor], targets: Iterable[Target], method: Method, source: str
) -> tuple[dict[str, Roles], list[str]]:
    """({layer's name: {role: tensor}}, keys of no layer here) of a file in any dialect.

    Raises `Refused` where parts cannot be joined: what depends on the rank's order, on an input or on a shape
    of the whole factor is not the same in a joined layer.
    """
    by_module: dict[str, Roles] = {}
    spelled: dict[str, list[str]] = {}
    for key, value in state.items():
        module, role = keys.role_of(key) or (key.rpartition(".")[0], key.rpartition(".")[2])
        if key.endswith(keys.PEFT["magnitude"]):
            value = value.flatten()  # PEFT's has an axis in front for a convolution
        own = by_module.setdefault(keys.flat(module), {})
        if role in own:
            raise Refused(
                f"{source} gives the {role} of {module} twice, once as {key}; it holds two adapters at once, "
                "take one of them out"
            )
        own[role] = value
        spelled.setdefault(keys.flat(module), []).append(key)
    found, used = {}, set()
    for target in targets:
        name = next((one for one in target.spellings if one in by_module), None)
        if name is not None:
            found[target.name], sources = by_module[name], {name}
        else:
            found[target.name], sources = _other_flux(target, by_module, method, source)
        used |= sources
        if not found[target.name]:
            del found[target.name]
        else:
            _check_whole(target.name, found[target.name], method, source)
    return found, [key for name, given in spelled.items() if name not in used for key in given]


def _check_whole(name: str, roles: Roles, method: Method, source: str) -> None:
    """Raise `Refused` for a layer that has only a part of what its method trains."""
    factor = method.require_factor()
    trained = set(factor.trained) - {factor.shared}
    strange = roles.keys() - trained - factor.frozen - {"alpha", "magnitude", "router", *factor.record}
    if (absent := trained - roles.keys()) and (trained & roles.keys() or not strange):
        raise Refused(
            f"{name} in {source} has no {', '.join(sorted(absent))}, only {', '.join(sorted(roles))}; the "
            "file is not whole, use another"
        )


def check_start(
    state: Mapping[str, Tensor], metadata: Mapping[str, str], method: Method, source: str
) -> None:
    """Raise `Refused` for a plain LoRA where a method subtracts a start, which would come from the base.

    QR-LoRA's official files have no start either, and the keys of diffusers before PEFT: that is said.
    """
    factor = method.require_factor()
    roles = {told[1] for key in state if (told := keys.role_of(key))}
    plain = {"up", "down"} <= roles.intersection(factor.trained) and not roles.intersection(factor.copies)
    if factor.copy is None or not plain or "lowrank.method" in metadata:
        return
    if not any(key.endswith(f".{keys.OLD_UP}") for key in state):
        raise Refused(
            f"{source} holds pairs of a plain LoRA and does not say that {method.name} made it, which would "
            "subtract a start that these never had; use --network_module lora"
        )
    logger.warning(
        "%s is read as an official QR-LoRA file, whose start comes from this base; a LoRA of diffusers "
        "before PEFT has the same keys, and is one for --network_module lora",
        source,
    )


def _other_flux(
    target: Target, by_module: Mapping[str, Roles], method: Method, source: str
) -> tuple[Roles, set[str]]:
    """The roles of a FLUX layer out of a file with q, k and v the other way, and the names they came from."""
    factor = method.require_factor()
    chains = (*factor.chains, *((factor.copy,) if factor.copy else ()))
    outputs = {"magnitude", *(chain.up[0] for chain in chains)}
    cores = {role for chain in chains for role in (*chain.up[1:], *chain.down[:-1])}
    if part := bfl.piece(target.path):  # apart here
        name = part.module.replace(".", "_")
        if part.total == 1 or name not in by_module:
            return {}, set()
        roles = by_module[name]
        ups = [roles[role] for role in outputs & roles.keys()]
        total = max((up.shape[-2 if up.dim() == 3 else 0] for up in ups), default=0)
        return cut(roles, _rows(part, total), outputs), {name}
    held = bfl.modules(target.path)
    names = [path.replace(".", "_") for path, piece in held if piece.total > 1]
    parts = [by_module.get(name) for name in names]
    if not any(parts):
        return {}, set()
    if not alike(parts, outputs):
        _refuse_join(method, source, target.name)
    rows = [_rows(piece, host_shape(target.module)[0]) for _, piece in held]
    roles = join(parts, [one.stop - one.start for one in rows], outputs, cores)
    if any(part and "magnitude" in part for part in parts) and "magnitude" not in roles:
        lengths = torch.linalg.vector_norm(dense_weight(target.module).float(), dim=1)  # g = 1 where none is
        for part, own in zip(parts, rows, strict=True):
            if part:
                lengths[own] = part["magnitude"].flatten().to(lengths)
        roles["magnitude"] = lengths
    return roles, {name for name, part in zip(names, parts, strict=True) if part}


def _refuse_join(method: Method, source: str, name: str) -> None:
    """What depends on the rank's order, on the input or on a factor's shape is another in a joined layer."""
    apart = f"{source} has q, k and v apart, and {name} holds them in one layer"
    constrain = method.require_factor().constrain
    for slot, what in (("gate", "which ranks are open"), ("experts", "how experts are weighed")):
        if getattr(method, slot):
            raise Refused(
                f"{apart}, where {what} would be another; use {method.name} files of this model here"
            )
    if constrain:
        raise Refused(
            f"{apart}, where the shape of {', '.join(constrain)} is another; write it as a plain LoRA with "
            "tools/export_lora.py and load that with networks.lora"
        )
