"""A method as a kohya network module: a module with two functions that build an `AdapterNetwork`.

kohya's trainers import a module by name and call
`create_network(1.0, dim, alpha, vae, text_encoder, unet, …)` or
`create_network_from_weights(multiplier, file, vae, text_encoder, unet, …)`; every network argument is passed
as a string.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import types
import typing
from collections.abc import Callable, Collection, Mapping, Set
from typing import Any

from torch import Tensor, nn

from lowrank.adapter_file import RawFile, open_adapter_file, read_adapter_file
from lowrank.adapters import dialect
from lowrank.adapters.arguments import Chosen, CommonArguments, layer_sizes, speeds
from lowrank.adapters.method import Factor, Method, check_made_by
from lowrank.adapters.network import AdapterNetwork, DenseWeights
from lowrank.adapters.targets import Target, find_all
from lowrank.config.flag import LARGEST, WORDS, parse_text, quoted
from lowrank.errors import Refused, joined, nearest, reasons_of
from lowrank.files import parse_json
from lowrank.naming import keys

logger = logging.getLogger(__name__)

Sizes = Mapping[str, tuple[int, float]]  # (rank, alpha) by layer name


class NetworkModule:
    """kohya's two functions for one method, and what this program's trainer needs before it calls them."""

    def __init__(
        self,
        method: Callable[[Any], Method],
        options: type,
        alpha_is_rank: bool,
        layers: Callable[[Any, CommonArguments, Any, nn.Module | None, int], Chosen],
    ) -> None:
        self._method, self._options, self._alpha_is_rank = method, options, alpha_is_rank
        self._layers = layers

    @property
    def known(self) -> tuple[str, ...]:
        """The names of all network arguments."""
        return tuple(f.name for kind in (self._options, CommonArguments) for f in dataclasses.fields(kind))

    def default_alpha(self, rank: int) -> float:
        """Return alpha without --network_alpha: the rank if the paper's equation has s = 1, else 1."""
        return float(rank) if self._alpha_is_rank else 1.0

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise `Refused` for unknown network arguments and malformed values, all of them together."""
        known, problems = self.known, []
        for name in arguments:
            if name not in known:
                problems.append(f"unknown network argument {name!r}{nearest(name, known)}")
        if problems:
            problems[-1] += f"; known: {', '.join(known)}"
        for name, value in arguments.items():
            try:
                self._parse({name: value} if name in known else {})
            except Refused as error:
                problems += reasons_of(error)
        if problems:
            raise joined("--network_args have several problems", problems)
        self._parse(arguments)

    def made(self, metadata: Mapping[str, str], source: str = "the file") -> Method:
        """Return the method with the structural options and the rank from a file's metadata."""
        return self._configure(self._structure(metadata, source)).for_rank(_network_rank(metadata, source))

    def _parse(self, arguments: Mapping[str, Any]) -> tuple[Method, CommonArguments]:
        return self._configure(arguments), _parse_arguments(CommonArguments, arguments)

    def _configure(self, arguments: Mapping[str, Any]) -> Method:
        options = _parse_arguments(self._options, arguments)
        method = self._method(options)
        return dataclasses.replace(method, options={**dataclasses.asdict(options), **method.options})

    def _structure(
        self, metadata: Mapping[str, str], source: str, given: Collection[str] = ()
    ) -> dict[str, Any]:
        """Return the options in a file's metadata that determine its tensors, without those in `given`.

        Raises `Refused` for a path among them: paths from metadata are not opened.
        """
        stored, options = options_of(metadata, source), {}
        for field in dataclasses.fields(self._options):
            if not field.metadata.get("structural") or field.name not in stored or field.name in given:
                continue
            value, words = stored[field.name], field.metadata["words"]
            if words is not None and value is not None and value not in words:
                raise Refused(
                    f"{source} has {field.name}={str(value)[:100]!r} in its metadata, but only "
                    f"{', '.join(words)} are read from there, because paths from metadata are not opened; "
                    f"pass {field.name}=… in --network_args, or use another file"
                )
            options[field.name] = value
        return options

    def create_network(
        self,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: Any,
        text_encoder: Any,
        unet: nn.Module | None,
        neuron_dropout: float | None = None,
        **arguments: Any,
    ) -> AdapterNetwork:
        """Return a network at its start values.

        Unknown arguments are ignored with a warning, because kohya's trainers pass arguments of other
        networks.
        """
        if unknown := [name for name in arguments if name not in self.known]:
            logger.warning(
                "unknown network arguments are ignored: %s%s",
                *(", ".join(unknown), nearest(unknown[0], self.known)),
            )
        method, common = self._parse({k: v for k, v in arguments.items() if k in self.known})
        if neuron_dropout is not None:
            common = dataclasses.replace(common, dropout=neuron_dropout)
        rank = 4 if network_dim is None else int(network_dim)
        alpha = self.default_alpha(rank) if network_alpha is None else float(network_alpha)
        options = _parse_arguments(self._options, arguments)
        chosen = self._layers(options, common, text_encoder, unet, rank)
        targets, method = chosen.targets, method.for_rank(rank)
        # A gate opens shares of the ranks: in small layers the rank is lowered, because more would be unused.
        sizes = layer_sizes(common, targets, rank, alpha, ranks=chosen.ranks, clamp=method.gate is not None)
        network = _build(method, common, targets, _allowed_ranks(method, targets, sizes), multiplier)
        network.speeds = {**chosen.speeds, **network.speeds}
        network.start()
        return network

    def create_network_from_weights(
        self,
        multiplier: float,
        file: str | None,
        vae: Any,
        text_encoder: Any,
        unet: nn.Module | None,
        weights_sd: Mapping[str, Tensor] | None = None,
        for_inference: bool = False,
        **arguments: Any,
    ) -> tuple[AdapterNetwork, Mapping[str, Tensor]]:
        """Return a network of a file's layers, ranks and alphas, without values, and the file's tensors."""
        network, state, unread = self.from_file(multiplier, file, text_encoder, unet, weights_sd, **arguments)
        if unread:
            logger.warning(
                "%s: %d layers are not in this model and are left out, for example %s",
                *(file or "the given weights", len(unread), min(unread)),
            )
        return network, state

    def from_file(
        self,
        multiplier: float,
        file: str | None,
        text_encoder: Any,
        unet: nn.Module | None,
        weights_sd: Mapping[str, Tensor] | None = None,
        **arguments: Any,
    ) -> tuple[AdapterNetwork, Mapping[str, Tensor], Set[str]]:
        """Return what `create_network_from_weights` returns, and the file's layers that the model lacks."""
        raw = open_adapter_file(file or "") if weights_sd is None else None
        raw = raw or RawFile(weights_sd or {}, {}, file or "the given weights")
        metadata, source = raw.metadata, raw.source
        given = {k: v for k, v in arguments.items() if k in self.known}
        method, common = self._parse({**self._structure(metadata, source, given), **given})
        method = method.for_rank(_network_rank(metadata, source))
        check_made_by(source, metadata, method)
        adapter = read_adapter_file(raw, method.file_roles())
        if weights_sd is None:
            dialect.check_start(adapter, method)
        selection = common.selection or {"target": ".*" if unet is not None else None}
        targets = find_all(text_encoder, unet, exclude=common.exclude, **selection)
        layers, unused = dialect.match_layers(adapter, targets, method)
        sizes = {
            name: size for name, roles in layers.items() if (size := _rank_alpha(method, roles)) is not None
        }
        if not sizes:
            raise Refused(
                f"{source} holds no {method.name} layer of this model; it was made by another method or for "
                "another base"
            )
        unread: Set[str] = set()
        if not common.selection and not common.exclude:
            modules = {key: module for module, by_role in adapter.keys.items() for key in by_role.values()}
            unread = {keys.flat(modules[key]) for key in unused if key in modules}
            adapted = any(target.part == "unet" for target in targets if target.name in sizes)
            if unet is not None and not adapted:
                _refuse_other_denoiser(source, unread)
        network = _build(method, common, targets, sizes, multiplier)
        state = {
            f"{name}.{keys.KOHYA.get(role, role)}": v for name in sizes for role, v in layers[name].items()
        }
        return network, {**state, **{key: raw.state[key] for key in unused}}, unread


def usual_layers(
    options: Any, common: CommonArguments, text_encoder: Any, unet: nn.Module | None, rank: int
) -> Chosen:
    """Return the default targets of the model, or those that the common arguments choose."""
    return Chosen(
        find_all(text_encoder, unet, exclude=common.exclude, conv=common.convolutional, **common.selection)
    )


def bind(
    method: Callable[[Any], Method],
    options: type,
    alpha_is_rank: bool = False,
    layers: Callable[[Any, CommonArguments, Any, nn.Module | None, int], Chosen] = usual_layers,
) -> tuple[Callable, Callable]:
    """Return kohya's two functions for a method; their `__self__` is the `NetworkModule`.

    `layers(options, common, text_encoder, unet, rank)` chooses the layers and their ranks.
    """
    module = NetworkModule(method, options, alpha_is_rank, layers)
    return module.create_network, module.create_network_from_weights


# ---------- arguments


def _parse_arguments(kind: type, arguments: Mapping[str, Any]) -> Any:
    """Return an options record of class `kind` with the arguments that it has fields for."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.name in arguments]
    return kind(**{name: _value(name, arguments[name], hints[name]) for name in names})


def _value(name: str, text: Any, hint: Any) -> Any:
    """Return a network argument in the type that its field is declared with."""
    kinds = [k for k in typing.get_args(hint) or (hint,) if k is not types.NoneType]
    if text is None or (text == "None" and len(kinds) < len(typing.get_args(hint))):
        return None
    value = parse_text(kinds[0], str(text))
    if value is None and kinds[0] is bool:
        raise Refused(f"network argument {name}={quoted(text)} is not a yes or no; write True or False")
    if value is None or (kinds[0] is int and abs(value) >= LARGEST):
        raise Refused(f"network argument {name}={quoted(text)} is not {WORDS[kinds[0]]}; correct its value")
    return value


def _unsaved_roles(factor: Factor, common: CommonArguments) -> frozenset[str]:
    """Return the roles that `save_basis` leaves out of files."""
    record = frozenset(factor.saved_only)
    unsaved = {"full": frozenset(), "q": record, "none": record | factor.frozen}
    if common.save_basis not in unsaved:
        raise Refused(
            f"save_basis {common.save_basis!r} is not one of "
            f"{', '.join(unsaved)}{nearest(common.save_basis, unsaved)}"
        )
    if common.save_basis == "none" and factor.not_recomputable:
        raise Refused(
            f"save_basis=none leaves out {', '.join(sorted(factor.frozen))}, which "
            f"{factor.not_recomputable} and nowhere else; save them with save_basis=full"
        )
    return unsaved[common.save_basis]


def _loraplus_rates(network: AdapterNetwork, common: CommonArguments) -> dict[tuple[str, str], float]:
    """Return LoRA+'s multiples of the learning rate by component and role."""
    ups = set(network.factor.loraplus) & set(network.factor.trained)
    rates = {}
    for part in {target.part for target in network.targets.values()}:
        special = common.loraplus_unet_lr_ratio if part == "unet" else common.loraplus_text_encoder_lr_ratio
        ratio = common.loraplus_lr_ratio if special is None else special
        if ratio and not ups:
            raise Refused(
                f"LoRA+ speeds up the trained up factor, and {network.method.name} trains none; leave "
                "loraplus out"
            )
        rates |= {(part, role): ratio or 1.0 for role in ups if ratio is not None}
    return rates


# ---------- building a network


def _build(
    method: Method, common: CommonArguments, targets: list[Target], sizes: Sizes, multiplier: float
) -> AdapterNetwork:
    """Return a network of the targets that have a size, configured by the common arguments."""
    targets = [target for target in targets if target.name in sizes]
    network = AdapterNetwork(method, targets, lambda target: sizes[target.name], multiplier)
    for layer in network.layers():
        layer.dropout = common.dropout or 0.0
        layer.rank_dropout = common.rank_dropout or 0.0
        layer.module_dropout = common.module_dropout or 0.0
    network.leave_out = _unsaved_roles(network.factor, common)
    network.speeds = speeds(common, targets)
    network.role_rates = _loraplus_rates(network, common)
    return network


def _allowed_ranks(method: Method, targets: list[Target], sizes: Sizes) -> Sizes:
    """Return the sizes with ranks that the method's factor can have, at unchanged scale s = alpha/rank."""
    allowed_ranks = method.require_factor().allowed_ranks
    if allowed_ranks is None:
        return sizes
    hosts = {target.name: target.module for target in targets if target.name in sizes}
    ranks = allowed_ranks(DenseWeights(hosts), {name: rank for name, (rank, _) in sizes.items()})
    return {name: (R, alpha * R / rank) for name, (rank, alpha) in sizes.items() if (R := ranks[name])}


def _rank_alpha(method: Method, roles: Mapping[str, Tensor]) -> tuple[int, float] | None:
    """Return (rank, alpha) of a file's layer, the rank if it has no alpha; None for one without a factor."""
    ranks = (method.require_factor().rank_in(role, value.shape) for role, value in roles.items())
    rank = next((rank for rank in ranks if rank), None)
    if rank is None:
        return None
    return rank, float(roles["alpha"].reshape(-1)[0]) if "alpha" in roles else float(rank)


def _refuse_other_denoiser(source: str, unread: Set[str]) -> None:
    """Raise `Refused` if layers of a denoiser are among those that the model lacks."""
    denoisers = {name for name in unread if not keys.is_flat_text(name)}
    if denoisers:
        raise Refused(
            f"{source} has {len(denoisers)} layers for a denoiser and this one has none of them, for example "
            f"{min(denoisers)}; it was made for another base"
        )


# ---------- the method that a file names


def network_named(name: str) -> NetworkModule | None:
    """Return `networks.<name>` if it is one of this program's network modules, else None.

    No other function imports a module because a file names it; only modules of the folder `networks` are
    imported.
    """
    if not name.isidentifier() or importlib.util.find_spec(f"networks.{name}") is None:
        return None
    create = getattr(importlib.import_module(f"networks.{name}"), "create_network", None)
    module = getattr(create, "__self__", None)
    return module if isinstance(module, NetworkModule) else None


def method_made_by(metadata: Mapping[str, str], source: str) -> Method | None:
    """Return the method that a file's metadata name, with its options, or None without a known name."""
    module = network_named(metadata.get("lowrank.method", ""))
    return module.made(metadata, source) if module else None


def options_of(metadata: Mapping[str, str], source: str) -> dict[str, Any]:
    """Return the method's options from a file's metadata. Raises `Refused` unless they are a JSON object."""
    damaged = f"{source} has damaged metadata: lowrank.options"
    stored = parse_json(metadata.get("lowrank.options", "{}"), damaged)
    if not isinstance(stored, dict):
        raise Refused(f"{damaged} is no object; use another file")
    return stored


def _network_rank(metadata: Mapping[str, str], source: str) -> int | None:
    """Return the network's rank, which a gate counts from, from a file's metadata; None if not there."""
    rank = metadata.get("tlora_max_rank")
    if rank is not None and not (rank.isdecimal() and rank.isascii() and int(rank[:9])):
        raise Refused(f"{source} has damaged metadata (tlora_max_rank: {rank!r}); use another file")
    return None if rank is None else int(rank[:9])
