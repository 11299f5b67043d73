"""Match the layers of an adapter file to a model, also if one has FLUX's q, k, v apart, the other joined."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lowrank.adapter_file import AdapterFile, Roles
from lowrank.adapters.method import Method
from lowrank.adapters.targets import Target, host_shape, original_weight
from lowrank.errors import Refused
from lowrank.naming import flux as flux_names
from lowrank.naming import keys
from lowrank.naming.flux_join import alike, cut_rows, join_layers, piece_rows
from lowrank.unused_keys import BIAS

logger = logging.getLogger(__name__)


def match_layers(
    file: AdapterFile, targets: Iterable[Target], method: Method
) -> tuple[dict[str, Roles], list[str]]:
    """Return ({name of the target: {role: tensor}}, keys of layers that are not in the model).

    Raises `Refused` for a layer that is incomplete or has tensors of another method, and for parts that
    cannot be joined, because the method depends on the order of ranks, on the input or on a factor's shape.
    """
    modules = {keys.flat(module): module for module in file.layers}
    by_name = {name: file.layers[module] for name, module in modules.items()}
    foreign: dict[str, str] = {}
    for unread in file.not_understood:
        if unread.kind == BIAS:  # beside the factors, which compute the same without it
            continue
        module, _, suffix = unread.key.rpartition(".")
        foreign.setdefault(keys.flat(module), suffix)
    matched: dict[str, Roles] = {}
    used: set[str] = set()
    for target in targets:
        spellings = target.spellings
        name = next((name for name in spellings if name in by_name), None)
        if name is not None:
            roles, sources = by_name[name], {name}
        elif target.flux:
            roles, sources = _joined_or_cut(target, by_name, method, file.source)
        else:
            roles, sources = {}, set()
        used |= sources
        suffix = next((foreign[name] for name in spellings if name in foreign), None)
        if suffix is not None:
            raise Refused(
                f"{target.name} has no {suffix!r}, which {file.source} gives; it was made by another method "
                f"than {method.name}"
            )
        if roles:
            matched[target.name] = roles
            _check_whole(target.name, roles, method, file.source)
    unused = [
        key for name, module in modules.items() if name not in used for key in file.keys[module].values()
    ]
    return matched, [*unused, *(unread.key for unread in file.not_understood)]


def _check_whole(name: str, roles: Roles, method: Method, source: str) -> None:
    """Raise `Refused` for a layer that lacks a trainable tensor; a layer of another method is skipped."""
    factor = method.require_factor()
    trained = set(factor.trained) - {factor.shared}
    unknown = roles.keys() - method.file_roles() - {"alpha", "magnitude", keys.ROUTER}
    if (absent := trained - roles.keys()) and (trained & roles.keys() or not unknown):
        raise Refused(
            f"{name} in {source} has no {', '.join(sorted(absent))}, only {', '.join(sorted(roles))}; the "
            "file is incomplete, use another"
        )


def joined_state(layers: Iterable[tuple[Target, Roles]]) -> dict[str, Tensor]:
    """Return the tensors of a file with kohya's keys, where FLUX's q, k and v are rows of one layer."""
    by_name: dict[str, list[tuple[Target, Roles]]] = {}
    for target, roles in layers:
        piece = flux_names.joined_rows(target.path) if target.part == "unet" else None
        name = target.name if piece is None else f"lora_unet_{piece.module.replace('.', '_')}"
        by_name.setdefault(name, []).append((target, roles))
    state = {}
    for name, parts in by_name.items():
        target, roles = parts[0]
        piece = flux_names.joined_rows(target.path) if target.part == "unet" else None
        if piece and piece.total > 1:
            unit = host_shape(target.module)[0] // (piece.stop - piece.start)
            of_path = {part.path: part_roles for part, part_roles in parts}
            pieces = flux_names.modules(piece.module)
            rows = [unit * (part.stop - part.start) for _, part in pieces]
            roles = join_layers([of_path.get(path) for path, _ in pieces], rows)
        state |= {f"{name}.{keys.KOHYA.get(role, role)}": value for role, value in roles.items()}
    return state


def check_start(file: AdapterFile, method: Method) -> None:
    """Raise `Refused` for a plain LoRA if the method subtracts a start, which would be taken from the base.

    Official files of QR-LoRA have no start and the keys of diffusers before PEFT; they are read, with a
    warning.
    """
    factor = method.require_factor()
    roles = {role for layer in file.layers.values() for role in layer}
    plain = {"up", "down"} <= roles.intersection(factor.trained) and not roles.intersection(factor.copies)
    if factor.copy is None or not plain or "lowrank.method" in file.metadata:
        return
    if not file.has_suffix(keys.OLD_UP):
        raise Refused(
            f"{file.source} is a plain LoRA without metadata of {method.name}, which would subtract a start "
            "that the file was not trained with; use --network_module lora"
        )
    logger.warning(
        "%s is read as an official QR-LoRA file, whose start is computed from this base; a LoRA of diffusers "
        "before PEFT has the same keys: use --network_module lora for it",
        file.source,
    )


def _joined_or_cut(
    target: Target, by_name: Mapping[str, Roles], method: Method, source: str
) -> tuple[Roles, set[str]]:
    """Return the tensors of a FLUX layer from a file's joined layer or parts, and the names of these."""
    factor = method.require_factor()
    chains = (*factor.chains, *((factor.copy,) if factor.copy else ()))
    ups = [factor.split_up(chain) for chain in chains]
    outputs = {"magnitude"} | {role for rows, up, _ in ups for role in (rows, up) if role}
    cores = {
        role for chain, (_, _, cores) in zip(chains, ups, strict=True) for role in (*cores, *chain.down[:-1])
    }
    if part := flux_names.joined_rows(target.path):  # the model has the parts
        name = part.module.replace(".", "_")
        if part.total == 1 or name not in by_name:
            return {}, set()
        roles = by_name[name]
        ups = [roles[role] for role in outputs & roles.keys()]
        total = max((up.shape[-2 if up.dim() == 3 else 0] for up in ups), default=0)
        return cut_rows(roles, piece_rows(part, total), outputs), {name}
    pieces = flux_names.modules(target.path)
    names = [path.replace(".", "_") for path, piece in pieces if piece.total > 1]
    parts = [by_name.get(name) for name in names]
    if not any(parts):
        return {}, set()
    if not alike(parts, outputs):
        _check_join(method, source, target.name)
    rows = [piece_rows(piece, host_shape(target.module)[0]) for _, piece in pieces]
    roles = join_layers(parts, [part.stop - part.start for part in rows], outputs, cores)
    if any(part and "magnitude" in part for part in parts) and "magnitude" not in roles:
        # parts without an adapter have g = 1
        lengths = torch.linalg.vector_norm(original_weight(target.module).float(), dim=1)
        for part, part_rows in zip(parts, rows, strict=True):
            if part:
                lengths[part_rows] = part["magnitude"].flatten().to(lengths)
        roles["magnitude"] = lengths
    return roles, {name for name, part in zip(names, parts, strict=True) if part}


def _check_join(method: Method, source: str, name: str) -> None:
    """Raise `Refused` if joining parts changes what the method computes."""
    apart = f"{source} has q, k and v apart, but {name} joins them"
    constrain = method.require_factor().constrain
    effects = {"gate": "other ranks would be open", "experts": "experts would have other weights"}
    for slot, effect in effects.items():
        if getattr(method, slot):
            raise Refused(f"{apart}, so {effect}; use a {method.name} file made on this kind of model")
    if constrain:
        raise Refused(
            f"{apart}, so {', '.join(constrain)} would have another shape; export the file as a plain LoRA "
            "with tools/export_lora.py and load the export with networks.lora"
        )
