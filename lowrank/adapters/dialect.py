"""A file's tensors as this model's layers: every spelling of a name, FLUX's q, k and v apart or joined."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lowrank.adapters.method import Method
from lowrank.adapters.targets import Target, dense_weight, host_shape
from lowrank.errors import Refused
from lowrank.naming import flux as flux_names
from lowrank.naming import keys
from lowrank.naming.flux_join import Roles, alike, cut_rows, join_layers, piece_rows

logger = logging.getLogger(__name__)


def warn_zero_alphas(source: str, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Warn of layers whose alpha is 0, which programs read in two ways."""
    zeros = [name for name, roles in layers.items() if "alpha" in roles and not roles["alpha"].any()]
    if zeros:
        logger.warning(
            "%s: alpha is 0 in %d of %d layers, for example %s: they add nothing, as in ComfyUI, A1111 and "
            "diffusers; kohya's and LyCORIS' networks take the rank for it, and if that is meant, set it",
            *(source, len(zeros), len(layers), min(zeros)),
        )


def match_layers(
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
    if part := flux_names.joined_rows(target.path):  # apart here
        name = part.module.replace(".", "_")
        if part.total == 1 or name not in by_module:
            return {}, set()
        roles = by_module[name]
        ups = [roles[role] for role in outputs & roles.keys()]
        total = max((up.shape[-2 if up.dim() == 3 else 0] for up in ups), default=0)
        return cut_rows(roles, piece_rows(part, total), outputs), {name}
    held = flux_names.modules(target.path)
    names = [path.replace(".", "_") for path, piece in held if piece.total > 1]
    parts = [by_module.get(name) for name in names]
    if not any(parts):
        return {}, set()
    if not alike(parts, outputs):
        _refuse_join(method, source, target.name)
    rows = [piece_rows(piece, host_shape(target.module)[0]) for _, piece in held]
    roles = join_layers(parts, [one.stop - one.start for one in rows], outputs, cores)
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
