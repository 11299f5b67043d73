"""T-LoRA files: their schedules, their initial copies, and LyCORIS' format.

Files that are read: ours (plain and orthogonal), our export as a plain LoRA, LyCORIS' and SimpleTuner's
`tlora`, the authors' (`…processor.to_q_lora.…`). Component i of an orthogonal layer is the neighbours 2i and
2i + 1 of a plain pair, so that a mask stays a prefix: (pᵢλᵢ, qᵢ − q₀ᵢ) and (pᵢλᵢ − p₀ᵢλ₀ᵢ, q₀ᵢ), whose sum is
pᵢλᵢqᵢ − p₀ᵢλ₀ᵢq₀ᵢ without a small difference of large products.

Owners of the formats: LyCORIS 4.1 (modules/tlora.py), SimpleTuner (lycoris_config.json, `_tlora_config`).
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank.adapters.gate import Schedule
from lowrank.adapters.method import Factor
from lowrank.adapters.network_module import network_named, options_of
from lowrank.bases.singular import PARTS, singular_components
from lowrank.errors import Refused, nearest
from lowrank.files import atomic, parse_json, read_json
from lowrank.formats.delta import is_orthogonal
from lowrank.naming import keys
from lowrank.naming.places import LayerPath, lycoris_layer

Layers = dict[str, dict[str, Tensor]]

METHOD = "tlora"  # also the algorithm's name in LyCORIS' configuration
SIDECAR = "lycoris_config.json"
SCHEDULE_KEYS = ("tlora_T", "tlora_group", "lycoris_config")  # metadata that can have a schedule
_CONFIG = ("max_rank", "min_rank", "alpha")  # of SimpleTuner's `_tlora_config`
logger = logging.getLogger(__name__)


# ------------------------------------------------------------------ factors


@functools.cache
def _factor() -> Factor:
    """The factor of the orthogonal T-LoRA, whose start is subtracted."""
    module = network_named(METHOD)
    if module is None:
        raise Refused(f"networks/{METHOD}.py is not here, which T-LoRA files need; install the whole program")
    return module.made({}).require_factor()


def without_copies(layers: Layers) -> list[str]:
    """The orthogonal layers that lack their initial copies, as LyCORIS' files do."""
    return [
        module
        for module, roles in layers.items()
        if is_orthogonal(roles) and not {*_factor().copies} <= roles.keys()
    ]


def start_of(metadata: Mapping[str, str], source: str) -> str:
    """The components of W that the initial copies of a file are; LyCORIS' are the principal ones."""
    sig_type = options_of(metadata, source).get("sig_type", PARTS[0])
    if sig_type not in PARTS:
        raise Refused(f"{source} has damaged metadata (sig_type {sig_type!r}); use another file")
    return sig_type


def with_copies(
    layers: Layers, weight: Callable[[str], Tensor], metadata: Mapping[str, str], source: str
) -> Layers:
    """The layers with initial copies, which LyCORIS' files and ours with save_basis=none do not have.

    `weight(module)` is W (O, I). The SVD is the one that LyCORIS computes when it loads the file. Raises
    `Refused` where the factors are not of W's size.
    """
    whole = dict(layers)
    for module in without_copies(layers):
        roles, W = layers[module], weight(module)
        chain, copy = _factor().chains[0], _factor().copy
        assert copy is not None  # an orthogonal T-LoRA has one
        up, down = roles[chain.up[0]], roles[chain.down[-1]]
        P, S, Q = singular_components(W, start_of(metadata, source), len(down))
        have = up.flatten(1).shape[0], down.flatten(1).shape[1]
        if have != W.shape:
            raise Refused(
                f"{module} is {have[0]}×{have[1]} in {source} and {W.shape[0]}×{W.shape[1]} in the model; "
                "the adapter is for another base, or a k×k convolution, which LyCORIS holds as 1×1"
            )
        starts = zip((*copy.up, *copy.down), (P.reshape(up.shape), S, Q.reshape(down.shape)), strict=True)
        whole[module] = {**roles, **dict(starts)}
    return whole


# ------------------------------------------------------------------ the schedule


def schedule_of(
    path: str | Path, layers: Layers, metadata: Mapping[str, str], config: Mapping[str, Any] | None = None
) -> Schedule | None:
    """The schedule of a file's ranks; None for a file without one.

    The first of these counts: `config`, which is SimpleTuner's `_tlora_config` {max_rank, min_rank, alpha};
    the file's own metadata; the `lycoris_config.json` beside it; LyCORIS' metadata; for LyCORIS' format
    SimpleTuner's defaults (R_min 1, alpha 1), with a warning. Raises `Refused` for a config of another rank,
    for the authors' orthogonal format without a config, for LyCORIS' files of several ranks, which have one
    mask, and for values that are no numbers.
    """
    tlora = [roles for roles in layers.values() if is_orthogonal(roles)]
    group = 2 if tlora else _number(int, metadata.get("tlora_group", 1), "tlora_group", str(path))
    ranks = _ranks(layers, group)
    stored = _stored_schedule(Path(path), metadata, ranks if tlora else None)
    if config is not None:
        stored = _configured(config, ranks, str(path), stored)
    if stored is None:
        if tlora and len(without_copies(layers)) < len(tlora):
            raise Refused(
                f"{path} has no schedule; pass the one it was trained with as "
                'config={"max_rank": …, "min_rank": …, "alpha": …}, or import it with --tlora_min_rank'
            )
        if not tlora:
            return None
        logger.warning(
            "%s has no schedule; SimpleTuner's defaults are used: linear, from 1 rank upwards", path
        )
        stored = Schedule(1, max_rank=_one_rank(ranks, str(path)))
    return replace(stored, group=group)


def _ranks(layers: Layers, group: int) -> set[int]:
    """The ranks of a file's layers, as a schedule counts them."""
    orthogonal = any(map(is_orthogonal, layers.values()))
    downs = ("down", *(_factor().chains[0].down if orthogonal else ()))
    ranks = {len(roles[role]) for roles in layers.values() for role in downs if role in roles}
    return {rank // (2 if group == 2 and not orthogonal else 1) for rank in ranks}


def _one_rank(ranks: set[int], source: str) -> int:
    if len(ranks) > 1:
        raise Refused(
            f"{source} has layers of rank {', '.join(map(str, sorted(ranks)))}, and LyCORIS' one mask for "
            "all of them is no share of each rank; use the file in LyCORIS"
        )
    if not ranks:
        raise Refused(f"{source} has no down factor in any layer, so it has no rank; use a complete file")
    return next(iter(ranks))


def _number(kind: type, stored: Any, name: str, source: str) -> Any:
    """A number of a file's metadata. Raises `Refused` for other values, and for numbers of 0 or less."""
    try:
        value = kind(stored)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise Refused(
            f"{source} has {name} {stored!r}, which is no number above 0; correct it, or use another file"
        )
    return value


def _stored_schedule(path: Path, metadata: Mapping[str, str], lycoris: set[int] | None) -> Schedule | None:
    """The schedule in the metadata or in LyCORIS' configuration, inside or beside the file.

    `lycoris` has the ranks of a file in LyCORIS' format; for other files nothing beside the file is read.
    """
    if "tlora_T" in metadata:
        sizes = {
            name: _number(int, metadata[name], name, str(path)) if name in metadata else None
            for name in ("tlora_min_rank", "tlora_max_rank", "tlora_T")
        }
        alpha = _number(float, metadata.get("tlora_alpha", 1.0), "tlora_alpha", str(path))
        return Schedule(sizes["tlora_min_rank"], alpha, sizes["tlora_T"] or 1000, 1, sizes["tlora_max_rank"])
    beside, inside = path.parent / SIDECAR, metadata.get("lycoris_config")
    texts = {f"lycoris_config of {path}": inside}
    if lycoris is not None and beside.is_file():
        texts = {str(beside): beside.read_bytes().decode("utf-8", "replace"), **texts}
    for source, text in texts.items():
        config = parse_json(text or "null", source)
        if isinstance(config, dict) and config.get("algo") == METHOD:
            return _of_lycoris(config, lycoris or set(), source, path)
    return None


def _of_lycoris(config: Mapping[str, Any], ranks: set[int], source: str, path: Path) -> Schedule:
    rank = _one_rank(ranks, str(path)) if ranks else None
    if rank is not None and config.get("linear_dim", rank) != rank:
        raise Refused(
            f"{source} is for rank {config['linear_dim']} and {path} has rank {rank}; put the adapter's own "
            "configuration beside it"
        )
    least, alpha = (config.get(name, 1) for name in ("tlora_min_rank", "tlora_alpha"))
    return Schedule(
        _number(int, least, "tlora_min_rank", source),
        _number(float, alpha, "tlora_alpha", source),
        max_rank=rank,
    )


def _configured(config: Mapping[str, Any], ranks: set[int], source: str, stored: Schedule | None) -> Schedule:
    """The schedule of SimpleTuner's `_tlora_config`, with a warning where the file has another."""
    for name in config:
        if name not in _CONFIG:
            raise Refused(
                f"_tlora_config has {name!r}{nearest(name, _CONFIG)}; its keys are {', '.join(_CONFIG)}"
            )
    rank = next(iter(ranks)) if len(ranks) == 1 else None
    rank = rank if stored is None or stored.max_rank is None else stored.max_rank
    if config.get("max_rank", rank) != rank:
        has = "layers of several ranks" if rank is None else f"rank {rank}"
        raise Refused(f"max_rank {config['max_rank']} is not that of {source}, which has {has}; correct it")
    given = Schedule(
        _number(int, config.get("min_rank", 1), "min_rank", "_tlora_config"),
        _number(float, config.get("alpha", 1.0), "alpha", "_tlora_config"),
        max_rank=rank,
    )
    trained = None if stored is None else (stored.least(rank or 1), stored.alpha)
    if rank is not None and trained is not None and trained != (given.min_rank, given.alpha):
        logger.warning(
            "%s was trained with min_rank %d, alpha %g; the given %d, %g are used",
            *(source, *trained, given.min_rank, given.alpha),
        )
    return given


# ------------------------------------------------------------------ LyCORIS


def export_lycoris(
    layers: Mapping[LayerPath, Mapping[str, Tensor]],
    metadata: Mapping[str, str],
    schedule: Schedule | None,
    source: str,
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Return an orthogonal T-LoRA as LyCORIS' `tlora`: tensors, metadata, and `lycoris_config.json`.

    The initial copies are written too: LyCORIS ignores them in a new network, and needs them to load the
    file into an existing one. Raises `Refused` where LyCORIS would compute another ΔW.
    """
    down = _factor().chains[0].down[-1]
    options = options_of(metadata, source)
    downs = {place: roles[down] for place, roles in layers.items() if down in roles}
    ranks = {(len(value), float(layers[place]["alpha"])) for place, value in downs.items()}
    why = None
    if schedule is None or len(downs) < len(layers):
        why = "is no orthogonal T-LoRA, the only kind in LyCORIS"
    elif any(place.part != "unet" for place in layers):
        why = "has layers of a text encoder, which LyCORIS would mask"
    elif any(value.shape[2:] not in ((), (1, 1)) for value in downs.values()):
        why = "has k×k convolutions, which LyCORIS stores as 1×1"
    elif len(ranks) > 1:
        why = "has layers of several ranks or alphas, and LyCORIS has one mask for all of them"
    elif not (options.get("use_data_init") and options.get("sig_type") == PARTS[0]):
        why = "starts from other components than the principal ones of W, which LyCORIS computes on loading"
    if why is not None or schedule is None:
        raise Refused(
            f"{source} {why}, so its ΔW would be another in LyCORIS; write a plain LoRA (--to kohya), or "
            "train with --network_args sig_type=principal use_data_init=True"
        )
    state = {}
    for place, roles in layers.items():
        name = lycoris_layer(place)
        for role, sides in _factor().sides().items():
            value = roles[role].reshape(1, -1) if len(sides) == 1 else roles[role]
            state[f"{name}.{keys.KOHYA[role]}"] = value
        state[f"{name}.alpha"] = roles["alpha"].reshape(())
    rank, alpha = ranks.pop()
    config = {
        "algo": METHOD,
        "multiplier": 1.0,
        "linear_dim": rank,
        "linear_alpha": int(alpha) if alpha.is_integer() else alpha,
        "tlora_min_rank": schedule.least(2 * rank),
        "tlora_alpha": schedule.alpha,
        "apply_preset": {"target_module": _classes(list(state))},
    }
    kept = {k: v for k, v in metadata.items() if k.startswith(("ss_", "modelspec.", "lowrank.", "tlora_"))}
    return state, {**kept, "lycoris_config": json.dumps(config)}, config


def ranks_of(state: Mapping[str, Tensor]) -> set[int]:
    """The ranks in an exported T-LoRA."""
    end = f".{keys.KOHYA[_factor().chains[0].down[-1]]}"
    return {value.shape[0] for key, value in state.items() if key.endswith(end)}


def check_sidecar(folder: Path, config: Mapping[str, Any]) -> Path:
    """Return the path of `lycoris_config.json`. Raises `Refused` where one with other content exists."""
    path = folder / SIDECAR
    if path.is_file() and read_json(path, "LyCORIS' configuration") != config:
        raise Refused(f"{path} exists with other content; write the adapter to another folder")
    return path


def write_sidecar(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write `lycoris_config.json` into a folder. Raises `Refused` as `check_sidecar`."""
    path, text = check_sidecar(folder, config), json.dumps(config, indent=2) + "\n"
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def _classes(names: list[str]) -> list[str]:
    """diffusers' classes of the blocks that the layers are in."""
    if any("_proj_in." in name or "_proj_out." in name for name in names):
        return ["Transformer2DModel"]
    flux = any("single_transformer_blocks" in name or "lycoris_transformer_blocks" in name for name in names)
    attention = ["FluxAttention" if flux else "Attention"] if any("attn" in name for name in names) else []
    return attention + (
        ["FeedForward"] if any("_ff_" in name or "_ff_context_" in name for name in names) else []
    )
