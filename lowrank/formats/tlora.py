"""T-LoRA files: what says their schedule, the pairs that a prefix of opens, and LyCORIS' format.

Files that are read: ours (plain and orthogonal), our export as a plain LoRA, LyCORIS' and SimpleTuner's
`tlora`, the authors' (`…processor.to_q_lora.…`). Component i of an orthogonal layer is the neighbours 2i and
2i + 1 of a plain pair, so that a mask stays a prefix: (pᵢλᵢ, qᵢ − q₀ᵢ) and (pᵢλᵢ − p₀ᵢλ₀ᵢ, q₀ᵢ), whose sum is
pᵢλᵢqᵢ − p₀ᵢλ₀ᵢq₀ᵢ without a small difference of large products.

Owners of the formats: LyCORIS 4.1 (modules/tlora.py), SimpleTuner (lycoris_config.json, `_tlora_config`).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank.adapters.gate import Schedule
from lowrank.adapters.method import Chain
from lowrank.adapters.network_module import options_of
from lowrank.errors import Refused, nearest
from lowrank.files import atomic
from lowrank.naming import keys
from lowrank.naming import unet as unet_names

Layers = dict[str, dict[str, Tensor]]

PARTS = ("principal", "middle", "last")  # of singular components, largest first
ORTHOGONAL, COPY = (
    Chain(("p_layer", "lambda_layer"), ("q_layer",)),
    Chain(("base_p", "base_lambda"), ("base_q",)),
)
COPIES = (*COPY.up, *COPY.down)
ROLES = (*ORTHOGONAL.up, *ORTHOGONAL.down, *COPY.up, *COPY.down)
SIDECAR = "lycoris_config.json"
_CONFIG = ("max_rank", "min_rank", "alpha")  # of SimpleTuner's `_tlora_config`
# layers that the authors' FLUX processors make for single blocks, and never run
_DEAD = re.compile(r"^single_transformer_blocks\.\d+\.attn\.(to_out\.0|add_[qkv]_proj)$")

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------ factors


def interleaved(roles: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """An orthogonal layer as up (O, 2R) and down (2R, I·k·k), the two of each component side by side."""
    flat = {role: roles[role].float().flatten(1) for role in ("p_layer", "q_layer", "base_p", "base_q")}
    U, U_0 = (flat[p] * roles[of].float().flatten() for p, of in (ORTHOGONAL.up, COPY.up))
    D, D_0 = flat["q_layer"], flat["base_q"]
    up = torch.stack([U, U - U_0], dim=2).flatten(1)
    return up, torch.stack([D - D_0, D_0], dim=1).flatten(0, 1)


def component_slice(sig_type: str, count: int, rank: int) -> slice:
    """Which `rank` of `count` singular components, largest first; the middle ones as the authors count."""
    begin = {"principal": 0, "middle": math.ceil((count - rank) / 2), "last": count - rank}[sig_type]
    return slice(begin, begin + rank)


def singular_components(weight: Tensor, sig_type: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """P (O, R), Λ (R,), Q (R, I): singular components of W (O, I), by the SVD that LyCORIS computes.

    Of a rank that W does not have, which only LyCORIS' files give small layers, the rest is zero, as there.
    """
    P, S, Q = torch.linalg.svd(weight.float(), full_matrices=False)
    if len(S) < rank:
        more = rank - len(S)
        return F.pad(P, (0, more)), F.pad(S, (0, more)), F.pad(Q, (0, 0, 0, more))
    chosen = component_slice(sig_type, len(S), rank)
    return P[:, chosen], S[chosen], Q[chosen]


def without_copies(layers: Layers) -> list[str]:
    """The orthogonal layers that lack their initial copies, as LyCORIS' files do."""
    return [
        module for module, roles in layers.items() if "q_layer" in roles and not {*COPIES} <= roles.keys()
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
        P, S, Q = singular_components(W, start_of(metadata, source), len(roles["q_layer"]))
        have = tuple(roles[role].flatten(1).shape[side] for role, side in (("p_layer", 0), ("q_layer", 1)))
        if have != W.shape:
            raise Refused(
                f"{module} is {have[0]}×{have[1]} in {source} and {W.shape[0]}×{W.shape[1]} in the model; "
                "the adapter is for another base, or a k×k convolution, which LyCORIS holds as 1×1"
            )
        copies = {"base_p": P.reshape(roles["p_layer"].shape), "base_q": Q.reshape(roles["q_layer"].shape)}
        whole[module] = {**roles, **copies, "base_lambda": S}
    return whole


def without_dead(layers: Layers) -> Layers:
    """Layers without those that no FLUX has and the authors' files hold."""
    return {module: roles for module, roles in layers.items() if not _DEAD.match(module)}


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
    tlora = [roles for roles in layers.values() if "q_layer" in roles]
    group = 2 if tlora else _number(int, metadata.get("tlora_group", 1), "tlora_group", str(path))
    ranks = _ranks(layers, group)
    told = _told(Path(path), metadata, ranks if tlora else None)
    if config is not None:
        told = _configured(config, ranks, str(path), told)
    if told is None:
        if tlora and any("base_q" in roles for roles in tlora):
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
    ranks = {len(roles[role]) for roles in layers.values() for role in ("q_layer", "down") if role in roles}
    halved = group == 2 and not any("q_layer" in roles for roles in layers.values())
    return {rank // (2 if halved else 1) for rank in ranks}


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
        if isinstance(config, dict) and config.get("algo") == "tlora":
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


def to_lycoris(
    layers: Layers, metadata: Mapping[str, str], source: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """LyCORIS' `tlora` tensors and the configuration that goes with them.

    The initial copies are written too: LyCORIS' loader of new networks ignores them, its loader into one
    that is there takes them, and then misses nothing. Raises `Refused` where LyCORIS would load it wrongly.
    """
    schedule = schedule_of(source, layers, metadata)
    made = options_of(metadata, source)
    ranks = {
        (len(roles["q_layer"]), float(roles["alpha"])) for roles in layers.values() if "q_layer" in roles
    }
    why = None
    if schedule is None or not all("q_layer" in roles for roles in layers.values()):
        why = "is no orthogonal T-LoRA, the only form that LyCORIS has"
    elif any(keys.is_text_encoder(module) for module in layers):
        why = "has layers of a text encoder, which LyCORIS would mask"
    elif any(roles["q_layer"].shape[2:] not in ((), (1, 1)) for roles in layers.values()):
        why = "has k×k convolutions, which LyCORIS holds as 1×1"
    elif len(ranks) > 1:
        why = "has layers of several ranks or alphas, and LyCORIS cuts one mask for all of them"
    elif not (made.get("use_data_init") and made.get("sig_type") == "principal"):
        why = "starts from other components than the principal ones of W, which LyCORIS takes on loading"
    if why is not None or schedule is None:
        raise Refused(
            f"{source} {why}, so it would add something else there; write a plain LoRA (--to kohya), or "
            "train with --network_args sig_type=principal use_data_init=True"
        )
    state = {}
    for module, roles in layers.items():
        name = lycoris_name(module)
        for role in ROLES:
            value = roles[role].reshape(1, -1) if "lambda" in role else roles[role]
            state[f"{name}.{keys.KOHYA[role]}"] = value
        state[f"{name}.alpha"] = roles["alpha"].reshape(())
    rank, alpha = ranks.pop()
    config = {
        "algo": "tlora",
        "multiplier": 1.0,
        "linear_dim": rank,
        "linear_alpha": int(alpha) if alpha.is_integer() else alpha,
        "tlora_min_rank": schedule.least(2 * rank),
        "tlora_alpha": schedule.alpha,
        "apply_preset": {"target_module": _classes(list(state))},
    }
    return state, config


def write_sidecar(folder: Path, config: Mapping[str, Any]) -> Path:
    """`lycoris_config.json`, which LyCORIS' users keep beside the file. Raises `Refused` rather than replace
    another one."""
    path, text = folder / SIDECAR, json.dumps(config, indent=2) + "\n"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != config:
        raise Refused(f"{path} is there and says something else; write to a folder of its own")
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def lycoris_name(module: str) -> str:
    """LyCORIS' name of a layer: its path in diffusers' model, from a name in our files."""
    flat = keys.flat(module)
    for original, path in _sdxl_blocks().items():
        if flat.startswith(original):
            flat = path + flat[len(original) :]
            break
    return f"lycoris_{flat}"


def _sdxl_blocks() -> dict[str, str]:
    """What SDXL's attention blocks begin with: kohya's flat name -> diffusers'."""
    paths = [
        f"{side}_blocks.{i}.attentions.{j}." for side in ("down", "up") for i in range(3) for j in range(3)
    ]
    paths.append("mid_block.attentions.0.")
    return {
        unet_names.unet_name(path, unet_names.SDXL).replace(".", "_"): path.replace(".", "_")
        for path in paths
    }


def _classes(names: list[str]) -> list[str]:
    """diffusers' classes of the blocks that the layers are in."""
    if any("_proj_in." in name or "_proj_out." in name for name in names):
        return ["Transformer2DModel"]
    flux = any("single_transformer_blocks" in name or "lycoris_transformer_blocks" in name for name in names)
    found = ["FluxAttention" if flux else "Attention"] if any("attn" in name for name in names) else []
    return found + (
        ["FeedForward"] if any("_ff_" in name or "_ff_context_" in name for name in names) else []
    )
