"""The façade: a method becomes a kohya network module with two functions.

kohya's trainers import a module by name and call
`create_network(1.0, dim, alpha, vae, text_encoder, unet, …)` or
`create_network_from_weights(multiplier, file, vae, text_encoder, unet, …)`; every network argument arrives as
a string.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import types
import typing
from collections.abc import Callable, Collection, Mapping, Set
from typing import Any

from torch import Tensor, nn

from lowrank.adapter_file import RawFile, open_adapter_file, read_adapter_file
from lowrank.adapters import dialect
from lowrank.adapters.arguments import CommonArguments, layer_sizes, speeds
from lowrank.adapters.method import Factor, Method, check_made_by
from lowrank.adapters.network import AdapterNetwork, DenseWeights
from lowrank.adapters.targets import Target, find_all
from lowrank.config.flag import WORDS, parse_text
from lowrank.errors import Refused, nearest
from lowrank.naming import keys
from lowrank.naming.flux_join import strength

logger = logging.getLogger(__name__)


def _value(owner: str, name: str, text: Any, hint: Any) -> Any:
    """A network argument as the type its field is declared with."""
    kinds = [k for k in typing.get_args(hint) or (hint,) if k is not types.NoneType]
    if text is None or (text == "None" and len(kinds) < len(typing.get_args(hint))):
        return None
    value = parse_text(kinds[0], str(text))
    if value is None and kinds[0] is bool:
        raise Refused(f"{owner} argument {name}={text!r} is not a yes or no; write True or False")
    if value is None:
        raise Refused(f"{owner} argument {name}={text!r} is not {WORDS[kinds[0]]}; correct its value")
    return value


def _parse_options(kind: type, arguments: Mapping[str, Any]) -> Any:
    """A record of network arguments from those that it has a field for."""
    hints = typing.get_type_hints(kind)
    given = {
        field.name: _value("network", field.name, arguments[field.name], hints[field.name])
        for field in dataclasses.fields(kind)
        if field.name in arguments
    }
    return kind(**given)


def _tell_unread(file: str, unread: Set[str], no_denoiser: bool) -> None:
    """Warn of a file's layers that are not here; `Refused` where they are all that it has of a denoiser."""
    denoisers = {name for name in unread if not keys.is_flat_text(name)}
    if no_denoiser and denoisers:
        raise Refused(
            f"{file} has {len(denoisers)} layers for a denoiser and this one has none of them, for example "
            f"{min(denoisers)}; it was made for another base"
        )
    if unread:
        logger.warning(
            "%s: %d layers are not in this model and are left out, for example %s",
            *(file, len(unread), min(unread)),
        )


class NetworkModule:
    """kohya's two functions for one method, and what our own trainer may ask beforehand."""

    def __init__(self, method: Callable[[Any], Method], options: type, alpha_is_rank: bool) -> None:
        self._method, self._options, self._alpha_is_rank = method, options, alpha_is_rank

    @property
    def known(self) -> tuple[str, ...]:
        """The names of all network arguments."""
        return tuple(f.name for kind in (self._options, CommonArguments) for f in dataclasses.fields(kind))

    def default_alpha(self, rank: int) -> float:
        """Alpha when the user names none: the rank where the paper's equation has s = 1, else kohya's 1."""
        return float(rank) if self._alpha_is_rank else 1.0

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise `Refused` for a network argument that nobody would read."""
        for name in arguments:
            if name not in self.known:
                raise Refused(
                    f"unknown network argument {name!r}{nearest(name, self.known)}; known: "
                    f"{', '.join(self.known)}"
                )
        self._parse(arguments)

    def made(self, metadata: Mapping[str, str], source: str = "the file") -> Method:
        """The method as a file of it tells, in all that decides which tensors there are."""
        return self._parse_method(self._structure(metadata, source)).of(_network_rank(metadata, source))

    def _parse(self, arguments: Mapping[str, Any]) -> tuple[Method, CommonArguments]:
        return self._parse_method(arguments), _parse_options(CommonArguments, arguments)

    def _parse_method(self, arguments: Mapping[str, Any]) -> Method:
        options = _parse_options(self._options, arguments)
        method = self._method(options)
        return dataclasses.replace(method, options={**dataclasses.asdict(options), **method.options})

    def _network(
        self,
        method: Method,
        layout: CommonArguments,
        targets: list[Target],
        size: Mapping[str, tuple[int, float]],
        multiplier: float,
    ) -> AdapterNetwork:
        network = AdapterNetwork(method, targets, lambda target: size[target.name], multiplier)
        for layer in network.layers():
            layer.dropout = layout.dropout or 0.0
            layer.rank_dropout = layout.rank_dropout or 0.0
            layer.module_dropout = layout.module_dropout or 0.0
        network.leave_out = self._left_out(network.factor, layout)
        network.speeds = speeds(layout, targets)
        ups = set(network.factor.plus) & set(network.factor.trained)
        parts = {target.part for target in targets}
        for part in parts:
            own = layout.loraplus_unet_lr_ratio if part == "unet" else layout.loraplus_text_encoder_lr_ratio
            ratio = layout.loraplus_lr_ratio if own is None else own
            if ratio and not ups:
                raise Refused(
                    f"LoRA+ speeds up the trained up factor, and {method.name} trains none; "
                    "leave loraplus out"
                )
            network.role_rates |= {(part, role): ratio or 1.0 for role in ups if ratio is not None}
        return network

    def _structure(
        self, metadata: Mapping[str, str], source: str, given: Collection[str] = ()
    ) -> dict[str, Any]:
        """The options of a file that decide which tensors it has, but those that the user gives instead.

        Raises `Refused` for a path among them, which is not opened.
        """
        stored = options_of(metadata, source)
        found = {}
        for field in dataclasses.fields(self._options):
            if not field.metadata.get("structural") or field.name not in stored or field.name in given:
                continue
            value, words = stored[field.name], field.metadata["words"]
            if words is not None and value is not None and value not in words:
                raise Refused(
                    f"{source} says {field.name}={str(value)[:100]!r} of itself, and what a file names is "
                    f"not opened, only {', '.join(words)}; give {field.name}=… yourself where the network is "
                    "made, or use another file"
                )
            found[field.name] = value
        return found

    def _fit(
        self, method: Method, targets: list[Target], size: Mapping[str, tuple[int, float]]
    ) -> Mapping[str, tuple[int, float]]:
        """Ranks that the method's factor can have; the scale s = alpha/rank stays."""
        fit = method.require_factor().fit
        if fit is None:
            return size
        hosts = {target.name: target.module for target in targets if target.name in size}
        ranks = fit(DenseWeights(hosts), {name: rank for name, (rank, _) in size.items()})
        return {name: (R, alpha * R / rank) for name, (rank, alpha) in size.items() if (R := ranks[name])}

    def _left_out(self, factor: Factor, layout: CommonArguments) -> frozenset[str]:
        kinds = ("full", "q", "none")
        if layout.save_basis not in kinds:
            raise Refused(
                f"save_basis {layout.save_basis!r} is not one of "
                f"{', '.join(kinds)}{nearest(layout.save_basis, kinds)}"
            )
        table = {"full": frozenset(), "q": frozenset(factor.record)}
        if layout.save_basis == "none" and factor.unique:
            raise Refused(
                f"save_basis=none leaves out {', '.join(sorted(factor.frozen))}, which {factor.unique} and "
                "nowhere else; save them with save_basis=full"
            )
        return table.get(layout.save_basis, frozenset(factor.record) | factor.frozen)

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
        """A network at its start values.

        Unknown arguments are warned about: kohya's trainers pass what others need.
        """
        unknown = [name for name in arguments if name not in self.known]
        if unknown:
            logger.warning(
                "network arguments nobody reads: %s%s", ", ".join(unknown), nearest(unknown[0], self.known)
            )
        method, layout = self._parse({k: v for k, v in arguments.items() if k in self.known})
        if neuron_dropout is not None:
            layout = dataclasses.replace(layout, dropout=neuron_dropout)
        rank = 4 if network_dim is None else int(network_dim)
        alpha = self.default_alpha(rank) if network_alpha is None else float(network_alpha)
        targets = find_all(
            text_encoder, unet, exclude=layout.exclude, conv=layout.convolutional, **layout.selection
        )
        method = method.of(rank)
        clamp = (
            method.gate is not None
        )  # a gate counts shares of ranks, and a rank that is never used is none
        size = self._fit(method, targets, layer_sizes(layout, targets, rank, alpha, clamp))
        kept = [target for target in targets if target.name in size]
        network = self._network(method, layout, kept, size, multiplier)
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
        """A network of the file's shapes (ranks, alphas, layers) without values, and the file's tensors."""
        raw = open_adapter_file(file or "") if weights_sd is None else None
        raw = raw or RawFile(weights_sd or {}, {}, file or "the given weights")
        metadata, source = raw.metadata, raw.source
        given = {k: v for k, v in arguments.items() if k in self.known}
        method, layout = self._parse({**self._structure(metadata, source, given), **given})
        method = method.of(_network_rank(metadata, source))
        check_made_by(source, metadata, method)
        adapter = read_adapter_file(raw, method.file_roles())
        if weights_sd is None:
            dialect.check_start(adapter, method)
        chosen = layout.selection or {"target": ".*" if unet is not None else None}
        targets = find_all(text_encoder, unet, exclude=layout.exclude, **chosen)
        layers, unused = dialect.match_layers(adapter, targets, method)
        size = {
            name: rank for name, roles in layers.items() if (rank := _rank_alpha(method, roles)) is not None
        }
        if not size:
            raise Refused(
                f"{source} holds no {method.name} layer of this model; it was made by another method or for "
                "another base"
            )
        kept = [target for target in targets if target.name in size]
        if not layout.selection and not layout.exclude:
            names = {key: module for module, own in adapter.keys.items() for key in own.values()}
            unread = {keys.flat(names[key]) for key in unused if key in names}
            _tell_unread(source, unread, unet is not None and all(one.part != "unet" for one in kept))
        network = self._network(method, layout, kept, size, multiplier)
        state = {
            f"{name}.{keys.KOHYA.get(role, role)}": v for name in size for role, v in layers[name].items()
        }
        return network, {**state, **{key: raw.state[key] for key in unused}}


def network_named(name: str) -> NetworkModule | None:
    """`networks.<name>`, where it is one of this program's network modules; None for any other module.

    The one place that imports a module because a file names it: nothing outside the folder `networks` is.
    """
    if not name.isidentifier() or importlib.util.find_spec(f"networks.{name}") is None:
        return None
    create = getattr(importlib.import_module(f"networks.{name}"), "create_network", None)
    module = getattr(create, "__self__", None)
    return module if isinstance(module, NetworkModule) else None


def method_made_by(metadata: Mapping[str, str], source: str) -> Method | None:
    """The method that a file's metadata name, with its options; None where they name none of ours."""
    module = network_named(metadata.get("lowrank.method", ""))
    return module.made(metadata, source) if module else None


def options_of(metadata: Mapping[str, str], source: str) -> dict[str, Any]:
    """The options that a file says its method had. Raises `Refused` for what is no JSON object."""
    try:
        stored = json.loads(metadata.get("lowrank.options", "{}"))
        if not isinstance(stored, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise Refused(
            f"{source} has damaged metadata (lowrank.options: {error}); use another file"
        ) from error
    return stored


def _network_rank(metadata: Mapping[str, str], source: str) -> int | None:
    """The rank that a file's gate counts by, where the file says it."""
    told = metadata.get("tlora_max_rank")
    if told is not None and not (told.isdecimal() and told.isascii() and int(told[:9])):
        raise Refused(f"{source} has damaged metadata (tlora_max_rank: {told!r}); use another file")
    return None if told is None else int(told[:9])


def _rank_alpha(method: Method, roles: Mapping[str, Tensor]) -> tuple[int, float] | None:
    """(rank, alpha) of a file's layer, or None for one without a factor."""
    ranks = (method.require_factor().rank_in(role, value.shape) for role, value in roles.items())
    rank = next((rank for rank in ranks if rank), None)
    return None if rank is None else (rank, rank * strength(roles, rank))


def bind(
    method: Callable[[Any], Method], options: type, alpha_is_rank: bool = False
) -> tuple[Callable, Callable]:
    """kohya's two functions for a method; their `__self__` is the `NetworkModule`."""
    facade = NetworkModule(method, options, alpha_is_rank)
    return facade.create_network, facade.create_network_from_weights
