"""`--lycoris_config`: translate LyCORIS' and SimpleTuner's JSON into a network module and its arguments.

Key names and their meanings are those of lycoris_lora 4.1.3 (wrapper.py, config_sdk.py) and of SimpleTuner's
documentation/LYCORIS.md. docs/lycoris_config.md lists the differences and their reasons.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lowrank.config.flag import fields_of, option
from lowrank.errors import Refused, nearest
from lowrank.tensors import existing_file

_OTHERS = ("loha", "lokr", "dylora", "glora", "full", "diag-oft", "boft", "ia3")


@dataclass(frozen=True)
class Config:
    """The top level of a LyCORIS file."""

    algo: str = option("lora", "training method", choices=("lora", "locon", "tlora"))
    multiplier: float = option(1.0, "constant strength of the adapter, multiplied into alpha", above=0)
    linear_dim: int = option(4, "rank", low=1)
    linear_alpha: float = option(1.0, "alpha of linear layers, scale × rank; 0 means the rank", low=0)
    conv_dim: int | None = option(None, "rank of k×k convolutions (unset: linear_dim)", low=1)
    conv_alpha: float | None = option(None, "alpha of k×k convolutions (unset: linear_alpha)", low=0)
    dropout: float = option(0.0, "probability that a hidden value is dropped", low=0, below=1)
    rank_dropout: float = option(0.0, "probability that a rank is dropped", low=0, below=1)
    module_dropout: float = option(0.0, "probability that a layer is skipped", low=0, below=1)
    tlora_min_rank: int = option(1, "active ranks at pure noise", low=1)
    tlora_alpha: float = option(1.0, "exponent of T-LoRA's rank schedule", above=0)
    sig_type: str = option(
        "principal", "singular vectors that T-LoRA starts from", choices=("principal", "middle", "last")
    )
    use_data_init: bool = option(True, "start from singular vectors of W instead of a random matrix")
    dora_wd: bool = option(False, "train DoRA magnitudes")
    wd_on_output: bool = option(True, "one DoRA magnitude per output instead of per input")
    preset: str = option("full", "name of a LyCORIS preset", choices=("full",))


@dataclass(frozen=True)
class Preset:
    """The table `apply_preset`: which layers are adapted."""

    enable_conv: bool = option(True, "adapt k×k convolutions too")
    target_module: tuple[str, ...] = option((), "classes of blocks whose layers are adapted")
    unet_target_module: tuple[str, ...] = option((), "classes of denoiser blocks to adapt")
    target_name: tuple[str, ...] = option((), "patterns of names of layers to adapt")
    unet_target_name: tuple[str, ...] = option((), "patterns of names of denoiser layers")
    text_encoder_target_module: tuple[str, ...] = option((), "classes of text encoder blocks (refused)")
    text_encoder_target_name: tuple[str, ...] = option((), "patterns of text encoder layers (refused)")
    exclude_name: tuple[str, ...] = option((), "patterns of names of layers to leave out")
    use_fnmatch: bool = option(False, "read patterns as shell wildcards instead of regular expressions")


@dataclass(frozen=True)
class Override:
    """One entry of `module_algo_map` or `name_algo_map`: settings of the layers that it matches."""

    algo: str | None = option(None, "training method")
    dim: int | None = option(None, "rank of these layers", low=1)
    alpha: float | None = option(None, "alpha of these layers, scale × rank", low=0)
    sig_type: str | None = option(
        None, "singular vectors that T-LoRA starts from", choices=("principal", "middle", "last")
    )
    use_data_init: bool | None = option(None, "start from singular vectors of W")


# Keys that choose between equal computations or messages in LyCORIS.
_WITHOUT_EFFECT: Mapping[str, str] = {
    "bypass_mode": "adapters are always computed through their factors",
    "mask_group_id": "every network here has its own rank mask",
    "lora_prefix": "files always have the keys that docs/lora.md lists",
    "warn_on_unmatched": "a target that matches nothing is always an error",
}
# Keys for features that do not exist here; accepted if they switch the feature off.
_OFF: Mapping[str, str] = {
    "use_tucker": "Tucker decomposition of convolutions is not supported",
    "use_cp": "Tucker decomposition of convolutions is not supported",
    "use_conv_cp": "Tucker decomposition of convolutions is not supported",
    "use_scalar": "a trained scalar beside alpha is not supported",
    "train_norm": "training of normalisation layers is not supported",
    "rs_lora": "give the alpha that it computes, rank / √rank × alpha, as linear_alpha",
    "train_llm_adapter": "no supported model has an LLM adapter",
    "full_matrix": "it is an option of algo lokr",
    "unbalanced_factorization": "it is an option of algo lokr",
    "decompose_both": "it is an option of algo lokr",
    "constraint": "it is an option of algo diag-oft and boft",
    "rescaled": "it is an option of algo diag-oft and boft",
    "factor": "it is an option of algo lokr",
    "block_size": "it is an option of algo dylora",
}
# Keys of SimpleTuner's config.json that concern the adapter, with their required values.
_OUTER: Mapping[str, Any] = {
    "model_type": "lora",
    "lora_type": "lycoris",
    "validation_lycoris_strength": 1.0,
}
Group = TypeVar("Group", Config, Preset, Override)


@dataclass(frozen=True)
class Translation:
    """The settings of a file as network module, rank, alpha and arguments; alpha 0 means the rank."""

    path: Path
    module: str
    rank: int
    alpha: float
    arguments: Mapping[str, str]
    notes: tuple[str, ...]


def translate(path: str | Path) -> Translation:
    """Translate a LyCORIS file, or a SimpleTuner config.json that names one.

    Raises `Refused` for a file that is not JSON, for an unknown key (with the nearest known one) or value,
    and for a feature that no network here has.
    """
    path, keys, notes = _opened(Path(path))
    preset_table = _table(path, "apply_preset", keys.pop("apply_preset", None))
    maps = {name: _table(path, name, preset_table.get(name)) for name in _MAPS}
    preset_keys = {key: value for key, value in preset_table.items() if key not in _MAPS}
    config = _read(Config, keys, f"{path}", notes, extra=("apply_preset",))
    preset = _read(Preset, preset_keys, f"apply_preset in {path}", notes, extra=_MAPS)
    overrides = {
        name: {
            key: _read(Override, entry, f"{name} {key!r} in {path}", notes) for key, entry in table.items()
        }
        for name, table in maps.items()
    }
    _check(path, config, preset, keys, overrides)
    arguments = _starts(path, config, overrides, _covered(preset, maps)) if config.algo == "tlora" else {}
    shares = ("dropout", "rank_dropout", "module_dropout")
    arguments |= {name: f"{getattr(config, name):g}" for name in shares if getattr(config, name)}
    arguments |= _targets(preset, maps) | _convolutions(config, preset)
    if rules := _rules(config, preset, overrides):
        arguments["module_rules"] = rules
    if config.multiplier != 1:
        notes.append(
            f"multiplier {config.multiplier:g} of {path} is multiplied into alpha; the file has strength 1"
        )
    module = "networks.dora" if config.dora_wd else f"networks.{config.algo.replace('locon', 'lora')}"
    alpha = _alpha(config, config.linear_alpha, config.linear_dim)
    return Translation(path, module, config.linear_dim, alpha, arguments, tuple(dict.fromkeys(notes)))


_MAPS = ("module_algo_map", "name_algo_map")


# ---------- reading


def _opened(path: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """Path, keys and notes of the LyCORIS file: `path` itself, or the file that a config.json names."""
    keys, notes = _json(path), []
    if "lycoris_config" in keys:
        for key, value in keys.items():
            if key == "lycoris_config":
                continue
            if key not in _OUTER:
                raise Refused(
                    f"{path} has {key}{nearest(key, _OUTER)}, and only lycoris_config, {', '.join(_OUTER)} "
                    "are read from such a file; give the other settings as flags of this script"
                )
            if value != _OUTER[key]:
                raise Refused(
                    f"{key} in {path} is {value!r}, and --lycoris_config supports only {_OUTER[key]!r}; "
                    "correct it, or leave it out"
                )
        named = Path(str(keys["lycoris_config"]))
        # SimpleTuner resolves it from its own folder, which contains config/
        places = [named, path.parent / named, path.parent.parent / named, path.parent / named.name]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise Refused(
                f"lycoris_config in {path} names {named}, which does not exist in {Path.cwd()} or "
                f"{path.parent.resolve()}; give --lycoris_config the LyCORIS file itself"
            )
        notes.append(f"the adapter's settings come from {file}, which {path} names")
        path, keys = file, _json(file)
    return path, keys, notes


def _json(path: Path) -> dict[str, Any]:
    text = existing_file(path, "correct --lycoris_config").read_text(encoding="utf-8-sig", errors="replace")
    try:
        table = json.loads(text, object_pairs_hook=_once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise Refused(f"{path} is not JSON: {error}; correct the file") from error
    return _table(path, "the file", table)


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in items]
    for name in names:
        if names.count(name) > 1:
            raise Refused(f"a table of --lycoris_config has {name} twice; give it once")
    return dict(items)


def _table(path: Path, name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Refused(f"{name} in {path} is not a table {{…}} but {value!r:.40}; correct the file")
    return value


def _read(
    kind: type[Group], table: Mapping[str, Any], where: str, notes: list[str], extra: Sequence[str] = ()
) -> Group:
    """Read one table into its record; add keys without effect to `notes`. Raises `Refused`."""
    known, values = fields_of(kind), {}
    for key, value in _table(Path(where), "an entry", table).items():
        if key in _WITHOUT_EFFECT:
            notes.append(f"{key} in {where} has no effect: {_WITHOUT_EFFECT[key]}")
        elif key in _OFF:
            if value not in (False, None, 0):
                raise Refused(f"{key}={value} in {where} is not supported: {_OFF[key]}; leave it out")
        elif key not in known:
            names = (*known, *extra, *_WITHOUT_EFFECT, *_OFF)
            raise Refused(
                f"unknown key {key!r}{nearest(key, names)} in {where}; known: {', '.join((*known, *extra))}"
            )
        elif key == "algo" and value in _OTHERS:
            raise Refused(
                f"algo {value} in {where} is not a method of networks/ (lora, locon and tlora are); train it "
                f"with --network_module lycoris.kohya --network_args algo={value} …, or choose lora"
            )
        elif value is not None:
            values[key] = known[key].read(key, value, f" in {where}")
    return kind(**values)


# ---------- consistency


def _check(
    path: Path,
    config: Config,
    preset: Preset,
    given: Iterable[str],
    overrides: Mapping[str, Mapping[str, Override]],
) -> None:
    tlora_keys = ("tlora_min_rank", "tlora_alpha", "sig_type", "use_data_init")
    stray = [key for key in tlora_keys if key in given]
    if stray and config.algo != "tlora":
        raise Refused(f"{stray[0]} in {path} is for algo tlora, and algo is {config.algo}; leave one out")
    if preset.text_encoder_target_module or preset.text_encoder_target_name:
        raise Refused(
            f"{path} names layers of text encoders, which are adapted as a whole or not at all; leave "
            "text_encoder_target_… out, and give --train_text_encoder to adapt text encoders"
        )
    if config.dora_wd:
        if config.algo == "tlora":
            raise Refused(
                f"{path} has dora_wd with algo tlora, whose ΔW depends on the timestep; leave one out"
            )
        if not config.wd_on_output:
            raise Refused(
                f"wd_on_output=false in {path} means one magnitude per input; here each output has one; "
                "leave it out, or train with --network_module lycoris.kohya"
            )
        if config.multiplier != 1:
            raise Refused(
                f"multiplier {config.multiplier:g} in {path} scales the whole change of dora_wd, which alpha "
                "cannot express; set it to 1.0"
            )
    for name, table in overrides.items():
        for key, entry in table.items():
            same = {"lora": "lora", "locon": "lora"}.get(config.algo, config.algo)
            if entry.algo and {"locon": "lora"}.get(entry.algo, entry.algo) != same:
                raise Refused(
                    f"{name} {key!r} in {path} has algo {entry.algo} beside {config.algo}, and a network "
                    "here has one method; leave algo out there, or leave those layers out with exclude_name"
                )


def _covered(preset: Preset, maps: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether every target has an entry in a map."""
    classes = {*preset.target_module, *preset.unet_target_module}
    names = {*preset.target_name, *preset.unet_target_name}
    return (
        classes <= maps["module_algo_map"].keys()
        and names <= maps["name_algo_map"].keys()
        and any(maps.values())
    )


def _starts(
    path: Path, config: Config, overrides: Mapping[str, Mapping[str, Override]], covered: bool
) -> dict[str, str]:
    """The arguments of networks.tlora. LyCORIS takes a start from its maps; one network here has one."""
    arguments = {"tlora_min_rank": str(config.tlora_min_rank), "tlora_alpha": repr(config.tlora_alpha)}
    arguments["orthogonal"] = "True"  # LyCORIS has no other form, whatever SimpleTuner's page says
    entries = [entry for table in overrides.values() for entry in table.values()]
    for name in ("sig_type", "use_data_init"):
        top, values = getattr(config, name), {getattr(entry, name) for entry in entries}
        if values - {None} and values - {top}:
            if not covered or len(values) > 1:
                raise Refused(
                    f"{name} in {path} differs between layers, and a network here has one; write it beside "
                    "algo, at the top"
                )
            top = values.pop()
        arguments[name] = str(top)
    return arguments


# ---------- our arguments


def _alpha(config: Config, alpha: float, rank: int) -> float:
    """The alpha whose scale has the multiplier in it; 0 stays the rank where nothing is multiplied."""
    return alpha if config.multiplier == 1 else config.multiplier * (alpha or rank)


def _targets(preset: Preset, maps: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    classes = dict.fromkeys((*preset.target_module, *preset.unet_target_module, *maps["module_algo_map"]))
    names = dict.fromkeys((*preset.target_name, *preset.unet_target_name, *maps["name_algo_map"]))
    if not classes and not names and not preset.enable_conv:
        classes = {"Linear": None}
    arguments = {
        "target": "" if classes or names else ".",  # every Linear and Conv2d, of which a model may have none
        "target_module": ",".join(classes),
        "target_name": ";".join(_pattern(preset, name) for name in names),
        "exclude": "|".join(_pattern(preset, name, block=True) for name in preset.exclude_name),
    }
    return {name: text for name, text in arguments.items() if text}


def _pattern(preset: Preset, name: str, block: bool = False, part: str = "^") -> str:
    """A regular expression, to be searched in a path, for a name as LyCORIS matches it from the start.

    A wildcard is for a whole path; with `block` also for a block that the layer is in.
    """
    if ";" in name or "->" in name or "\n" in name:
        raise Refused(
            f"{name!r} of apply_preset has a ; an arrow or a line break in it, which no layer's name has"
        )
    if not preset.use_fnmatch:
        return f"{part}(?:{name})"
    inner = re.sub(r"\\[Zz]$", "", fnmatch.translate(name))
    return f"{part}{inner}" + (r"(?:\.|$)" if block else "$")


def _convolutions(config: Config, preset: Preset) -> dict[str, str]:
    if not preset.enable_conv:
        return {"conv_dim": "0"}
    alike = (config.conv_dim, config.conv_alpha) == (None, None)
    if alike:  # as other layers
        return {}
    rank = config.conv_dim or config.linear_dim
    alpha = config.linear_alpha if config.conv_alpha is None else config.conv_alpha
    return {"conv_dim": str(rank), "conv_alpha": repr(_alpha(config, alpha, rank))}


def _rules(config: Config, preset: Preset, overrides: Mapping[str, Mapping[str, Override]]) -> str:
    """Ranks and alphas of the maps; names come before classes, as the more exact."""
    rules = []
    for name in ("name_algo_map", "module_algo_map"):
        for key, entry in overrides[name].items():
            rank, alpha = entry.dim or config.linear_dim, entry.alpha
            if alpha is None and entry.dim and not config.linear_alpha:
                alpha = 0.0  # the rank, whose multiple depends on the rank
            assigned = [f"rank={entry.dim}"] if entry.dim else []
            assigned += [] if alpha is None else [f"alpha={_alpha(config, alpha, rank) or float(rank)!r}"]
            where = f"class:{key}" if name == "module_algo_map" else _pattern(preset, key, part=r"^unet\.")
            rules += [f"{where} -> {' '.join(assigned)}"] if assigned else []
    return "; ".join(rules)
