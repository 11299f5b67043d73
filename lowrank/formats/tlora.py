"""T-LoRA files: what says their schedule, the pairs that a prefix of opens, and LyCORIS' format.

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
from lowrank.files import atomic
from lowrank.formats.delta import is_orthogonal
from lowrank.naming import keys
from lowrank.naming.places import LayerPath, lycoris_layer
from lowrank.tensors import write_tensors

Layers = dict[str, dict[str, Tensor]]

METHOD = "tlora"  # also the algorithm's name in LyCORIS' configuration
SIDECAR = "lycoris_config.json"
SCHEDULE_KEYS = ("tlora_T", "lycoris_config")  # metadata that can have a schedule
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
    """Which components of W the copies are that a file leaves out: in LyCORIS' the principal ones."""
    told = options_of(metadata, source).get("sig_type", PARTS[0])
    if told not in PARTS:
        raise Refused(f"{source} has damaged metadata (sig_type {told!r}); use another file")
    return told


def with_copies(
    layers: Layers, weight: Callable[[str], Tensor], metadata: Mapping[str, str], source: str
) -> Layers:
    """Layers with the initial copies that LyCORIS' files leave out, and ours with save_basis=none.

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
    """Which ranks the file's layers open when; None for a file without a schedule.

    `config` is SimpleTuner's `_tlora_config` {max_rank, min_rank, alpha} and goes before the file. Else the
    file's own metadata tell, then the `lycoris_config.json` beside it, then LyCORIS' metadata, and for its
    format at last SimpleTuner's defaults (R_min 1, alpha 1), which is said. Raises `Refused` for a config of
    another rank, for the authors' orthogonal format without one, which says no schedule, for LyCORIS' files
    of several ranks, which it cuts from one mask, and for values that are no numbers.
    """
    tlora = [roles for roles in layers.values() if is_orthogonal(roles)]
    group = 2 if tlora else _number(int, metadata.get("tlora_group", 1), "tlora_group", str(path))
    ranks = _ranks(layers, group)
    told = _told(Path(path), metadata, ranks if tlora else None)
    if config is not None:
        told = _configured(config, ranks, str(path), told)
    if told is None:
        if tlora and len(without_copies(layers)) < len(tlora):
            raise Refused(
                f"{path} does not say its schedule; pass the one it was trained with as "
                'config={"max_rank": …, "min_rank": …, "alpha": …}, or import it with --tlora_min_rank'
            )
        if not tlora:
            return None
        logger.warning(
            "%s does not say its schedule; SimpleTuner's defaults are used: from 1 rank up, linear", path
        )
        told = Schedule(1, max_rank=_one_rank(ranks, str(path)))
    return replace(told, group=group)


def _ranks(layers: Layers, group: int) -> set[int]:
    """The ranks of a file's layers, as a schedule counts them."""
    orthogonal = any(map(is_orthogonal, layers.values()))
    downs = ("down", *(_factor().chains[0].down if orthogonal else ()))
    ranks = {len(roles[role]) for roles in layers.values() for role in downs if role in roles}
    return {rank // (2 if group == 2 and not orthogonal else 1) for rank in ranks}


def _one_rank(ranks: set[int], source: str) -> int:
    if len(ranks) > 1:
        raise Refused(
            f"{source} has layers of rank {', '.join(map(str, sorted(ranks)))}, and LyCORIS cuts one mask "
            "for all of them, which is no share of each; use it there"
        )
    return next(iter(ranks))


def _number(kind: type, told: Any, name: str, source: str) -> Any:
    """A number of somebody's metadata. Raises `Refused` for what is none, and for those of 0 or less."""
    try:
        value = kind(told)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise Refused(
            f"{source} says {name} {told!r}, which is no number above 0; correct it, or use another file"
        )
    return value


def _told(path: Path, metadata: Mapping[str, str], lycoris: set[int] | None) -> Schedule | None:
    """What metadata say, or LyCORIS' configuration; for a file in its format (these ranks) also beside it."""
    if "tlora_T" in metadata:
        told = {
            name: _number(int, metadata[name], name, str(path)) if name in metadata else None
            for name in ("tlora_min_rank", "tlora_max_rank", "tlora_T")
        }
        alpha = _number(float, metadata.get("tlora_alpha", 1.0), "tlora_alpha", str(path))
        return Schedule(told["tlora_min_rank"], alpha, told["tlora_T"] or 1000, 1, told["tlora_max_rank"])
    beside, inside = path.parent / SIDECAR, metadata.get("lycoris_config")
    texts = {f"lycoris_config of {path}": inside}
    if lycoris is not None and beside.is_file():
        texts = {str(beside): beside.read_bytes().decode("utf-8", "replace"), **texts}
    for source, text in texts.items():
        try:
            config = json.loads(text or "null")
        except (ValueError, RecursionError) as error:
            raise Refused(f"{source} is no JSON ({error}); correct it, or take it away") from error
        if isinstance(config, dict) and config.get("algo") == METHOD:
            return _of_lycoris(config, lycoris or set(), source, path)
    return None


def _of_lycoris(config: Mapping[str, Any], ranks: set[int], source: str, path: Path) -> Schedule:
    rank = _one_rank(ranks, str(path)) if ranks else None
    if rank is not None and config.get("linear_dim", rank) != rank:
        raise Refused(
            f"{source} is of a file of rank {config['linear_dim']} and {path} has {rank}; put its own "
            "beside it"
        )
    least, alpha = (config.get(name, 1) for name in ("tlora_min_rank", "tlora_alpha"))
    return Schedule(
        _number(int, least, "tlora_min_rank", source),
        _number(float, alpha, "tlora_alpha", source),
        max_rank=rank,
    )


def _configured(config: Mapping[str, Any], ranks: set[int], source: str, told: Schedule | None) -> Schedule:
    for name in config:
        if name not in _CONFIG:
            raise Refused(
                f"_tlora_config has {name!r}{nearest(name, _CONFIG)}; it holds {', '.join(_CONFIG)}"
            )
    rank = next(iter(ranks)) if len(ranks) == 1 else None
    rank = rank if told is None or told.max_rank is None else told.max_rank
    if config.get("max_rank", rank) != rank:
        has = "layers of several ranks" if rank is None else f"rank {rank}"
        raise Refused(f"max_rank {config['max_rank']} is not that of {source}, which has {has}; give that")
    asked = Schedule(
        _number(int, config.get("min_rank", 1), "min_rank", "_tlora_config"),
        _number(float, config.get("alpha", 1.0), "alpha", "_tlora_config"),
        max_rank=rank,
    )
    before = None if told is None else (told.least(rank or 1), told.alpha)
    if rank is not None and before is not None and before != (asked.min_rank, asked.alpha):
        logger.warning(
            "%s was trained with min_rank %d, alpha %g; the given %d, %g are used",
            *(source, *before, asked.min_rank, asked.alpha),
        )
    return asked


# ------------------------------------------------------------------ LyCORIS


def export_lycoris(
    layers: Mapping[LayerPath, Mapping[str, Tensor]],
    metadata: Mapping[str, str],
    schedule: Schedule | None,
    source: str,
    target: str | Path,
) -> dict[str, Tensor]:
    """Write an orthogonal T-LoRA as LyCORIS' `tlora`, `lycoris_config.json` beside it; returns its tensors.

    The initial copies are written too: LyCORIS' loader of new networks ignores them, its loader into one
    that is there takes them, and then misses nothing. Raises `Refused` where LyCORIS would load it wrongly.
    """
    down = _factor().chains[0].down[-1]
    made = options_of(metadata, source)
    downs = {place: roles[down] for place, roles in layers.items() if down in roles}
    ranks = {(len(value), float(layers[place]["alpha"])) for place, value in downs.items()}
    why = None
    if schedule is None or len(downs) < len(layers):
        why = "is no orthogonal T-LoRA, the only form that LyCORIS has"
    elif any(place.part != "unet" for place in layers):
        why = "has layers of a text encoder, which LyCORIS would mask"
    elif any(value.shape[2:] not in ((), (1, 1)) for value in downs.values()):
        why = "has k×k convolutions, which LyCORIS holds as 1×1"
    elif len(ranks) > 1:
        why = "has layers of several ranks or alphas, and LyCORIS cuts one mask for all of them"
    elif not (made.get("use_data_init") and made.get("sig_type") == PARTS[0]):
        why = "starts from other components than the principal ones of W, which LyCORIS takes on loading"
    if why is not None or schedule is None:
        raise Refused(
            f"{source} {why}, so it would add something else there; write a plain LoRA (--to kohya), or "
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
    write_sidecar(Path(target).parent, config)
    write_tensors(target, state, {**kept, "lycoris_config": json.dumps(config)})
    return state


def ranks_of(state: Mapping[str, Tensor]) -> set[int]:
    """The ranks in an exported T-LoRA."""
    end = f".{keys.KOHYA[_factor().chains[0].down[-1]]}"
    return {value.shape[0] for key, value in state.items() if key.endswith(end)}


def write_sidecar(folder: Path, config: Mapping[str, Any]) -> Path:
    """`lycoris_config.json`, which LyCORIS' users keep beside the file. Raises `Refused` rather than replace
    another one."""
    path, text = folder / SIDECAR, json.dumps(config, indent=2) + "\n"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != config:
        raise Refused(f"{path} is there and says something else; write to a folder of its own")
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def _classes(names: list[str]) -> list[str]:
    """diffusers' classes of the blocks that the layers are in."""
    if any("_proj_in." in name or "_proj_out." in name for name in names):
        return ["Transformer2DModel"]
    flux = any("single_transformer_blocks" in name or "lycoris_transformer_blocks" in name for name in names)
    found = ["FluxAttention" if flux else "Attention"] if any("attn" in name for name in names) else []
    return found + (
        ["FeedForward"] if any("_ff_" in name or "_ff_context_" in name for name in names) else []
    )
