"""`--lycoris_config`: LyCORIS' and SimpleTuner's JSON in; our module, rank, alpha and network arguments out.

Key names and their meanings are those of lycoris_lora 4.1.3 (wrapper.py, config_sdk.py) and of SimpleTuner's
documentation/LYCORIS.md; what differs here, and why, is in docs/lycoris_config.md.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lowrank.config.flag import fields_of, option
from lowrank.errors import Refused, nearest
from lowrank.files import CONFIG, parse_json, read_text

_OTHERS = ("loha", "lokr", "dylora", "glora", "full", "diag-oft", "boft", "ia3")


@dataclass(frozen=True)
class Config:
    """LyCORIS' file"""

    algo: str = option("lora", "the method", choices=("lora", "locon", "tlora"))
    multiplier: float = option(1.0, "strength of the adapter", above=0)
    linear_dim: int = option(4, "rank", low=1)
    linear_alpha: float = option(1.0, "scale × rank; 0 is the rank", low=0)
    conv_dim: int | None = option(None, "rank of k×k convolutions (unset: linear_dim)", low=1)
    conv_alpha: float | None = option(None, "their alpha (unset: linear_alpha)", low=0)
    dropout: float = option(0.0, "dropout", low=0, below=1)
    rank_dropout: float = option(0.0, "dropout of ranks", low=0, below=1)
    module_dropout: float = option(0.0, "dropout of layers", low=0, below=1)
    tlora_min_rank: int = option(1, "ranks that are open at pure noise", low=1)
    tlora_alpha: float = option(1.0, "exponent of the schedule", above=0)
    sig_type: str = option(
        "principal", "singular vectors of the start", choices=("principal", "middle", "last")
    )
    use_data_init: bool = option(True, "those of W; else of a random matrix")
    dora_wd: bool = option(False, "DoRA")
    wd_on_output: bool = option(True, "DoRA's length for each output")
    preset: str = option("full", "LyCORIS' presets by name", choices=("full",))


@dataclass(frozen=True)
class Preset:
    """apply_preset"""

    enable_conv: bool = option(True, "adapt k×k convolutions too")
    target_module: tuple[str, ...] = option((), "classes of blocks")
    unet_target_module: tuple[str, ...] = option((), "the same")
    target_name: tuple[str, ...] = option((), "patterns of layers")
    unet_target_name: tuple[str, ...] = option((), "the same")
    text_encoder_target_module: tuple[str, ...] = option((), "classes in text encoders")
    text_encoder_target_name: tuple[str, ...] = option((), "patterns in text encoders")
    exclude_name: tuple[str, ...] = option((), "patterns of what is left out")
    use_fnmatch: bool = option(False, "patterns are shell wildcards, not regular expressions")


@dataclass(frozen=True)
class Override:
    """An entry of module_algo_map or name_algo_map"""

    algo: str | None = option(None, "the method")
    dim: int | None = option(None, "rank", low=1)
    alpha: float | None = option(None, "scale × rank", low=0)
    sig_type: str | None = option(None, "as above", choices=("principal", "middle", "last"))
    use_data_init: bool | None = option(None, "as above")


# Keys that LyCORIS reads for its own ways of computing the same thing, or for its messages.
_WITHOUT_EFFECT: Mapping[str, str] = {
    "bypass_mode": "layers are always computed the short way",
    "mask_group_id": "every network here has masks of its own",
    "lora_prefix": "files have the keys of docs/lora.md",
    "warn_on_unmatched": "a target that matches nothing is always an error",
}
# Keys that would change what is trained, and are not here; off is accepted.
_OFF: Mapping[str, str] = {
    "use_tucker": "there is no Tucker decomposition here",
    "use_cp": "there is no Tucker decomposition here",
    "use_conv_cp": "there is no Tucker decomposition here",
    "use_scalar": "a trained scalar is a second scale beside alpha",
    "train_norm": "norms are not adapted here",
    "rs_lora": "say the alpha that it would compute",
    "train_llm_adapter": "no model here has one",
    "full_matrix": "it is lokr's",
    "unbalanced_factorization": "it is lokr's",
    "decompose_both": "it is lokr's",
    "constraint": "it is diag-oft's and boft's",
    "rescaled": "it is diag-oft's and boft's",
    "factor": "it is lokr's",
    "block_size": "it is dylora's",
}
# SimpleTuner's config.json as far as it is about the adapter.
_OUTER: Mapping[str, Any] = {
    "model_type": "lora",
    "lora_type": "lycoris",
    "validation_lycoris_strength": 1.0,
}
Group = TypeVar("Group", Config, Preset, Override)


@dataclass(frozen=True)
class Translation:
    """What a file asks for, in our words; an alpha of 0 is the rank."""

    path: Path
    module: str
    rank: int
    alpha: float
    arguments: Mapping[str, str]
    notes: tuple[str, ...]


def translate(path: str | Path) -> Translation:
    """The network that a LyCORIS file, or the SimpleTuner config.json that names one, describes.

    Raises `Refused` for a file that is not JSON, for an unknown key (with the nearest known one) or value,
    and for what no network here can do (with the way out). Nothing is rounded or cut.
    """
    path, found, notes = _opened(Path(path))
    told = _table(path, "apply_preset", found.pop("apply_preset", None))
    maps = {name: _table(path, name, told.get(name)) for name in _MAPS}
    preset_keys = {key: value for key, value in told.items() if key not in _MAPS}
    config = _read(Config, found, f"{path}", notes, extra=("apply_preset",))
    preset = _read(Preset, preset_keys, f"apply_preset in {path}", notes, extra=_MAPS)
    overrides = {
        name: {
            key: _read(Override, entry, f"{name} {key!r} in {path}", notes) for key, entry in table.items()
        }
        for name, table in maps.items()
    }
    _check(path, config, preset, found, overrides)
    arguments = _starts(path, config, overrides, _covered(preset, maps)) if config.algo == "tlora" else {}
    shares = ("dropout", "rank_dropout", "module_dropout")
    arguments |= {name: f"{getattr(config, name):g}" for name in shares if getattr(config, name)}
    arguments |= _targets(preset, maps) | _convolutions(config, preset)
    if rules := _rules(config, preset, overrides):
        arguments["module_rules"] = rules
    if config.multiplier != 1:
        notes.append(
            f"multiplier {config.multiplier:g} of {path} is part of alpha: files have it at strength 1"
        )
    module = "networks.dora" if config.dora_wd else f"networks.{config.algo.replace('locon', 'lora')}"
    alpha = _alpha(config, config.linear_alpha, config.linear_dim)
    return Translation(path, module, config.linear_dim, alpha, arguments, tuple(dict.fromkeys(notes)))


_MAPS = ("module_algo_map", "name_algo_map")


# ---------- reading


def _opened(path: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The LyCORIS file at or behind `path`: where it is, its keys, and notes."""
    found, notes = _json(path), []
    if "lycoris_config" in found:
        for key, value in found.items():
            if key == "lycoris_config":
                continue
            if key not in _OUTER:
                raise Refused(
                    f"{path} has {key}{nearest(key, _OUTER)}, and of such a file only the adapter is read "
                    f"here (lycoris_config, {', '.join(_OUTER)}); say the rest with this script's flags"
                )
            if value != _OUTER[key]:
                raise Refused(
                    f"{key} in {path} is {value!r}, and --lycoris_config is for {_OUTER[key]!r}; correct "
                    "it, or leave it out"
                )
        told = Path(str(found["lycoris_config"]))
        # SimpleTuner sees it from its own folder, in which config/ is
        places = [told, path.parent / told, path.parent.parent / told, path.parent / told.name]
        there = next((place for place in places if os.path.isfile(place)), None)
        if there is None:
            raise Refused(
                f"lycoris_config in {path} names {told}, which is not there (seen from {Path.cwd()} and from "
                f"{path.parent.resolve()}); give --lycoris_config the file itself"
            )
        notes.append(f"{path} names {there} for the adapter")
        path, found = there, _json(there)
    return path, found, notes


def _json(path: Path) -> dict[str, Any]:
    text = read_text(path, "the file", CONFIG, "correct --lycoris_config")
    return _table(path, "the file", parse_json(text, path, _once))


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, count in Counter(name for name, _ in items).items():
        if count > 1:
            raise Refused(f"a table of --lycoris_config has {name} twice; give it once")
    return dict(items)


def _table(path: Path, name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Refused(f"{name} in {path} is not a table {{…}} but {value!r:.40}; correct the file")
    return value


def _read(
    kind: type[Group], found: Mapping[str, Any], where: str, notes: list[str], extra: Sequence[str] = ()
) -> Group:
    """A record of the keys of one table; what has no effect is added to `notes`. Raises `Refused`."""
    known, values = fields_of(kind), {}
    for key, value in _table(Path(where), "an entry", found).items():
        if key in _WITHOUT_EFFECT:
            notes.append(f"{key} in {where} has no effect: {_WITHOUT_EFFECT[key]}")
        elif key in _OFF:
            if value not in (False, None, 0):
                raise Refused(
                    f"{key}={value} in {where} is not for a network here: {_OFF[key]}; leave it out"
                )
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


# ---------- what fits together


def _check(
    path: Path,
    config: Config,
    preset: Preset,
    given: Iterable[str],
    overrides: Mapping[str, Mapping[str, Override]],
) -> None:
    own = ("tlora_min_rank", "tlora_alpha", "sig_type", "use_data_init")
    stray = [key for key in own if key in given]
    if stray and config.algo != "tlora":
        raise Refused(f"{stray[0]} in {path} is for algo tlora, and algo is {config.algo}; leave one out")
    if preset.text_encoder_target_module or preset.text_encoder_target_name:
        raise Refused(
            f"{path} names layers of text encoders, which are adapted as a whole or not at all; leave "
            "text_encoder_target_… out, and give --train_text_encoder if they shall be adapted"
        )
    if config.dora_wd:
        if config.algo == "tlora":
            raise Refused(
                f"{path} asks for dora_wd with algo tlora, whose ΔW has no one length; leave one out"
            )
        if not config.wd_on_output:
            raise Refused(
                f"wd_on_output=false in {path} frees a length for each input; here each output has one; "
                "leave it out, or train with --network_module lycoris.kohya"
            )
        if config.multiplier != 1:
            raise Refused(
                f"multiplier {config.multiplier:g} in {path} is a share of the whole change of dora_wd, "
                "which no alpha can say; set it to 1.0"
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
        top, told = getattr(config, name), {getattr(entry, name) for entry in entries}
        if told - {None} and told - {top}:
            if not covered or len(told) > 1:
                raise Refused(
                    f"{name} in {path} differs between layers, and a network here has one; write it beside "
                    "algo, at the top"
                )
            top = told.pop()
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
    found = {
        "target": "" if classes or names else ".",  # every Linear and Conv2d, of which a model may have none
        "target_module": ",".join(classes),
        "target_name": ";".join(_pattern(preset, name) for name in names),
        "exclude": "|".join(_pattern(preset, name, block=True) for name in preset.exclude_name),
    }
    return {name: text for name, text in found.items() if text}


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
            said = [f"rank={entry.dim}"] if entry.dim else []
            said += [] if alpha is None else [f"alpha={_alpha(config, alpha, rank) or float(rank)!r}"]
            where = f"class:{key}" if name == "module_algo_map" else _pattern(preset, key, part=r"^unet\.")
            rules += [f"{where} -> {' '.join(said)}"] if said else []
    return "; ".join(rules)
