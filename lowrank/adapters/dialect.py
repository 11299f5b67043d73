"""An adapter file's layers as this model's layers: FLUX's q, k and v as three layers or joined in one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch

from lowrank.adapter_file import AdapterFile, Roles
from lowrank.adapters.method import Method
from lowrank.adapters.targets import Target, dense_weight, host_shape
from lowrank.errors import Refused
from lowrank.naming import flux as flux_names
from lowrank.naming import keys
from lowrank.naming.flux_join import alike, cut_rows, join_layers, piece_rows

logger = logging.getLogger(__name__)


def match_layers(
    file: AdapterFile, targets: Iterable[Target], method: Method
) -> tuple[dict[str, Roles], list[str]]:
    """({layer's name: {role: tensor}}, keys of no layer of this model).

    Raises `Refused` where parts cannot be joined: what depends on the rank's order, on an input or on a shape
    of the whole factor is not the same in a joined layer.
    """
    by_name = {keys.flat(module): (module, roles) for module, roles in file.layers.items()}
    plain = {name: roles for name, (_, roles) in by_name.items()}
    foreign: dict[str, list[str]] = {}
    for unread in file.not_understood:
        module, _, suffix = unread.key.rpartition(".")
        foreign.setdefault(keys.flat(module), []).append(suffix)
    matched: dict[str, Roles] = {}
    used: set[str] = set()
    for target in targets:
        name = next((one for one in target.spellings if one in plain), None)
        if name is not None:
            roles, sources = plain[name], {name}
        elif target.flux:
            roles, sources = _other_flux(target, plain, method, file.source)
        else:
            roles, sources = {}, set()
        used |= sources
        other = next((suffix for one in target.spellings for suffix in foreign.get(one, ())), None)
        if other is not None:
            raise Refused(
                f"{target.name} has no {other!r}, which {file.source} gives; it was made by another method "
                f"than {method.name}"
            )
        if roles:
            matched[target.name] = roles
            _check_whole(target.name, roles, method, file.source)
    unused = [
        key for name, (module, _) in by_name.items() if name not in used for key in file.keys[module].values()
    ]
    return matched, [*unused, *(one.key for one in file.not_understood)]


def _check_whole(name: str, roles: Roles, method: Method, source: str) -> None:
    """Raise `Refused` for a layer that has only a part of what its method trains."""
    factor = method.require_factor()
    trained = set(factor.trained) - {factor.shared}
    strange = roles.keys() - method.file_roles() - {"alpha", "magnitude", keys.ROUTER}
    if (absent := trained - roles.keys()) and (trained & roles.keys() or not strange):
        raise Refused(
            f"{name} in {source} has no {', '.join(sorted(absent))}, only {', '.join(sorted(roles))}; the "
            "file is not whole, use another"
        )


def check_start(file: AdapterFile, method: Method) -> None:
    """Raise `Refused` for a plain LoRA where a method subtracts a start, which would come from the base.

    QR-LoRA's official files have no start either, and the keys of diffusers before PEFT: that is logged.
    """
    factor = method.require_factor()
    roles = {role for own in file.layers.values() for role in own}
    plain = {"up", "down"} <= roles.intersection(factor.trained) and not roles.intersection(factor.copies)
    if factor.copy is None or not plain or "lowrank.method" in file.metadata:
        return
    if not file.has_suffix(keys.OLD_UP):
        raise Refused(
            f"{file.source} holds pairs of a plain LoRA and does not say that {method.name} made it, which "
            "would subtract a start that these never had; use --network_module lora"
        )
    logger.warning(
        "%s is read as an official QR-LoRA file, whose start comes from this base; a LoRA of diffusers "
        "before PEFT has the same keys, and is one for --network_module lora",
        file.source,
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
