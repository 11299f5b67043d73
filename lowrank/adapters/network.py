"""The network: all adapted layers of a model, with the methods that kohya's trainers call.

The methods apply_to, load_weights, save_weights, prepare_optimizer_params, prepare_grad_etc, on_epoch_start,
get_trainable_params, set_multiplier, merge_to, … are those of kohya sd-scripts' networks/lora.py.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapter_file import AdapterFile, RawFile, read_adapter_file, warn_zero_alpha
from lowrank.adapters import dialect, kohya_trainer, magnitude, rates, sharing
from lowrank.adapters.clock import Clock
from lowrank.adapters.layer import AdaptedLayer
from lowrank.adapters.method import Method, check_made_by
from lowrank.adapters.targets import Layer, Target, original_weight, stored_weight
from lowrank.errors import Refused
from lowrank.naming import keys
from lowrank.tensors import has_values, write_tensors

logger = logging.getLogger(__name__)


class DenseWeights(Mapping[str, Tensor]):
    """The dense weights of hosts by layer name, read one at a time; of frozen hosts those before storing."""

    def __init__(self, hosts: Mapping[str, Layer]) -> None:
        self._hosts = hosts

    def __getitem__(self, name: str) -> Tensor:
        return original_weight(self._hosts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._hosts)

    def __len__(self) -> int:
        return len(self._hosts)


class AdapterNetwork(nn.Module):
    """Adapted layers of one model. They are in the state dict after `apply_to` has attached them."""

    def __init__(
        self,
        method: Method,
        targets: list[Target],
        size: Callable[[Target], tuple[int, float]],
        multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        self.method, self.factor, self.clock = method, method.require_factor(), Clock(method)
        self.targets = {target.name: target for target in targets}
        # read by kohya's FLUX and SD3 trainers
        self.train_t5xxl = any(target.part == "te3" for target in targets)
        if len(self.targets) != len(targets):
            raise Refused("two target layers have one key; choose fewer with --network_args target=…")
        ungated = dataclasses.replace(method, gate=None)  # text encoders have no timestep
        self._all_layers = {
            t.name: AdaptedLayer(
                t.name, t.module, method if t.part == "unet" else ungated, *size(t), self.clock
            )
            for t in targets
        }
        self.clock.set_ranks(layer.rank for layer in self.layers("unet"))
        self._owners = sharing.share_trained(self._all_layers, self.targets, self.factor)
        sharing.share_frozen(self._all_layers.values(), self.factor)
        self.start_metadata: dict[str, str] = {}  # the origin of the start values
        # (part, role) -> multiple of the part's learning rate
        self.role_rates: dict[tuple[str, str], float] = {}
        self.speeds: Mapping[str, rates.Speed] = {}  # by layer name, where not that of the part
        self.leave_out: frozenset[str] = frozenset()  # roles that are not saved
        self._backup: dict[str, Tensor] = {}
        self._penalties: dict[str, Callable[[Any], Tensor]] = {}
        self._in_kohyas_trainer = False
        self._add_penalties: Callable[[nn.Module], None] | None = None  # in kohya's trainers
        self.set_multiplier(multiplier)

    def _apply(self, fn, recurse=True):
        """Apply `fn` as torch does, but once to a buffer that layers share, so that they still share it."""
        if not self.factor.common:
            return super()._apply(fn, recurse)
        return super()._apply(sharing.once(fn), recurse)

    # ------------------------------------------------------------------ layers and values

    def layers(self, part: str | None = None) -> list[AdaptedLayer]:
        """Return the attached layers (before `apply_to`: all layers) in the model's order."""
        attached = [child for child in self.children() if isinstance(child, AdaptedLayer)]
        layers = attached or list(self._all_layers.values())
        return [layer for layer in layers if part is None or self.targets[layer.name].part == part]

    def start(self, only: Iterable[str] | None = None, roles: Iterable[str] | None = None) -> None:
        """Set the values at step 0, `only` of layers with these names, and only of these `roles`."""
        layers = [layer for layer in self._all_layers.values() if only is None or layer.name in set(only)]
        if not layers or not has_values(stored_weight(layers[0].host)):
            return
        ranks = {layer.name: layer.rank for layer in layers}
        scales = {layer.name: layer.scale for layer in layers}
        values, metadata = self.factor.start(
            DenseWeights({layer.name: layer.host for layer in layers}), ranks, scales
        )
        for layer in layers:
            tensors, constrain = {**layer.roles(), **dict(layer.named_buffers())}, self.factor.constrain
            chosen = {}
            for role, value in values[layer.name].items():
                if role == self.factor.shared and self._owners[layer.name] != layer.name:
                    continue
                if roles is None or role in set(roles):
                    value = constrain[role](value) if role in constrain else value
                    chosen[role] = (
                        self._in_shape(role, value, tensors[role].shape) if role in tensors else value
                    )
            layer.load(chosen, "the start values")
            if roles is None:
                if keys.ROUTER in layer.roles():
                    nn.init.normal_(layer.router, std=0.3 / layer.router.shape[1] ** 0.5)
                layer.start_magnitude()
        self.start_metadata.update(metadata)
        for note in self.method.notes if roles is None else ():
            logger.warning(note)

    def _in_shape(self, role: str, value: Tensor, shape: torch.Size) -> Tensor:
        """Reshape a start value to its parameter; one value for all experts is repeated."""
        if self.method.experts and role == self.method.experts.role and value.numel() < shape.numel():
            return value.reshape(shape[1:]).expand(shape)
        return value.reshape(shape)

    def apply_to(self, text_encoder, unet, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Attach the layers of the chosen parts to their hosts' forwards, without writing base weights."""
        for name, layer in self._all_layers.items():
            if apply_unet if self.targets[name].part == "unet" else apply_text_encoder:
                layer.attach()
                self.add_module(name, layer)
        if apply_unet:
            self.clock.attach(unet)

    def restore(self) -> None:
        """Detach every layer from its host."""
        for layer in reversed(self.layers()):
            layer.restore()
        self.clock.detach()

    def denoise_at(self, timestep: Tensor | None):
        """`with network.denoise_at(t):` sets the samples' timesteps (B,) in 0..1000 for gated layers."""
        return self.clock.pinned(timestep)

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Cast frozen tensors to the dtype of the forward, so that files have the values used in training.

        An initial copy keeps its dtype, because it is subtracted before anything is rounded.
        """
        for layer in self._all_layers.values():
            for role, value in layer.named_buffers(recurse=False):
                if role != "alpha" and role not in (*self.factor.copies, *self.factor.precise):
                    setattr(layer, role, value.to(dtype))
        sharing.share_frozen(self._all_layers.values(), self.factor)

    def penalties(self) -> dict[str, Tensor]:
        """Return the method's penalties at the current parameters, by name."""
        if not self._penalties:
            self._prepare_penalties()
        return {name: value(self) for name, value in self._penalties.items()}

    # ------------------------------------------------------------------ training, as kohya's trainers do it

    def tagged(self) -> list[rates.Tagged]:
        """Return every trainable parameter with its part, its role and its layer's learning rate."""
        return [
            rates.Tagged(part, role, parameter, self.speeds.get(layer.name, rates.Speed()))
            for layer in self.layers()
            for part in (self.targets[layer.name].part,)
            for role, parameter in layer.roles().items()
            if role != self.factor.shared or self._owners[layer.name] == layer.name
        ]

    def prepare_optimizer_params_with_multiple_te_lrs(self, text_encoder_lr, unet_lr, default_lr=None):
        """Return optimizer groups and their names.

        `text_encoder_lr` is None, a number, or a list in the order of the encoders.
        """
        given = list(text_encoder_lr) if isinstance(text_encoder_lr, (list, tuple)) else [text_encoder_lr]
        given = [default_lr if rate is None else rate for rate in given or [None]]
        part_rates: dict[str, Any] = {"unet": default_lr if unet_lr is None else unet_lr, "te": given[0]}
        part_rates |= {f"te{i + 1}": given[min(i, len(given) - 1)] for i in range(3)}
        role_rates = {
            (part, role): factor for part in part_rates for role, factor in self.method.rates.items()
        }
        groups, names = rates.groups(self.tagged(), part_rates, role_rates | self.role_rates)
        if self._in_kohyas_trainer and self.factor.copy:  # its optimizer can decay to 0 only
            groups = [{**group, "weight_decay": 0.0} for group in groups]
        return groups, names

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr, default_lr=None):
        return self.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)

    def enable_gradient_checkpointing(self) -> None:
        """Do nothing: the forwards of layers are recomputed with those of their hosts."""

    def prepare_grad_etc(self, text_encoder, unet) -> None:
        """Make the parameters trainable; the values of this moment are where penalties start from."""
        self.requires_grad_(True)
        self._prepare_penalties()

    def _prepare_penalties(self) -> None:
        for penalty in self.method.penalty:
            value = penalty.prepare(self) if penalty.prepare else penalty.value
            assert value is not None  # a penalty has `prepare` or `value`
            self._penalties[penalty.name] = value

    def on_epoch_start(self, text_encoder, unet) -> None:
        self.train()

    def on_step_start(self, *_) -> None:
        """Add the gradients of the penalties in kohya's trainers, which have only the loss of the task."""
        if self._add_penalties is not None:
            self._add_penalties(self)

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        return self.parameters()

    def set_multiplier(self, multiplier: float | Tensor) -> None:
        """Set the strength of every layer: one number, or one per sample."""
        for layer in self._all_layers.values():
            layer.multiplier = multiplier if isinstance(multiplier, Tensor) else float(multiplier)

    def prepare_network(self, args: Any) -> None:
        """Take the options of kohya's trainers, the only callers. Raises `Refused`, see `check_trainer`."""
        self._in_kohyas_trainer = True
        kohya_trainer.check_trainer(self.method, args)
        self._add_penalties = kohya_trainer.pull(args) if self.method.penalty else None

    def set_current_generation(self, *_: Any) -> None:
        """Do nothing: only regional masks need the batch size that kohya's gen_img passes."""

    def set_region(self, *_: Any) -> None:
        raise Refused("regional masks are not offered by this network; generate without a mask image")

    def set_enabled(self, enabled: bool) -> None:
        self.set_multiplier(1.0 if enabled else 0.0)

    def apply_max_norm_regularization(self, value: float, device) -> tuple[int, float, float]:
        """Scale trained factors so that each ‖s·U·D‖_F ≤ value; return (number scaled, mean, max norm)."""
        return kohya_trainer.limit_norms(self, value)

    # ------------------------------------------------------------------ files

    def native_state(self) -> dict[str, Tensor]:
        """Return the tensors of a native file by key."""
        layers = [(self.targets[layer.name], layer.tensors()) for layer in self.layers()]
        if self.factor.joined:
            return dialect.joined_state(layers)
        state = {}
        for target, tensors in layers:
            native, table = target.native, keys.PEFT if target.native else keys.KOHYA
            if self.factor.copy is not None:
                table = {**table, **keys.SUBTRACTED}
            for role, value in tensors.items():
                if role in self.leave_out:
                    continue
                if role == "magnitude" and native:
                    value = magnitude.in_peft_shape(value)
                state[f"{native or target.name}.{table.get(role, role)}"] = value
        return state

    def describe(self) -> dict[str, str]:
        """Return the metadata of a native file: method, options, rank, alpha, origin of the start values."""
        sizes = {(layer.rank, float(layer.alpha)) for layer in self.layers()}
        rank, alpha = sizes.pop() if len(sizes) == 1 else (None, None)
        return {
            "lowrank.method": self.method.name,
            "lowrank.options": json.dumps(dict(self.method.options), sort_keys=True, default=str),
            "lowrank.rank": str(rank),
            "lowrank.alpha": str(alpha),
            "lowrank.layers": str(len(self.layers())),
            **{f"lowrank.{key}": value for key, value in self.start_metadata.items()},
            **({} if self.method.gate is None else self.method.gate.metadata(rank)),
        }

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write a native file, atomically."""
        state = {k: v if dtype is None else v.to(dtype) for k, v in self.native_state().items()}
        write_tensors(Path(file), state, {**self.describe(), **(metadata or {})})

    def load_weights(self, file: str):
        """Load a file of any dialect; returns torch's named tuple of missing and unexpected keys."""
        adapter = read_adapter_file(file, self.method.file_roles())
        dialect.check_start(adapter, self.method)
        return self._load(adapter)

    def read_state(self, state: Mapping[str, Tensor], metadata: Mapping[str, str], source: str):
        """Load tensors that are already read, as `load_weights` loads a file."""
        return self._load(read_adapter_file(RawFile(state, metadata, source), self.method.file_roles()))

    def _load(self, file: AdapterFile):
        """Load the layers of a file; frozen tensors that it leaves out are computed from the base."""
        source, metadata = file.source, file.metadata
        check_made_by(source, metadata, self.method)
        layers, unexpected = dialect.match_layers(file, self.targets.values(), self.method)
        if not layers:
            raise Refused(
                f"{source} has no layer of this model: it holds {', '.join(unexpected[:2])} and the model "
                f"has {', '.join(list(self.targets)[:2])}; it was made for another base"
            )
        warn_zero_alpha(source, layers)
        for name, values in layers.items():
            sharing.check_equal(self.factor, name, self._owners.get(name, name), layers, source)
            self._all_layers[name].load(values, source)
        incomplete = [name for name, values in layers.items() if not self.factor.frozen <= values.keys()]
        if incomplete:
            self._start_frozen(incomplete, metadata, source)
        missing = [
            f"{name}.{keys.KOHYA.get(role, role)}"
            for name, layer in self._all_layers.items()
            for role in layer.roles()
            if role not in layers.get(name, {})
        ]
        return nn.modules.module._IncompatibleKeys(missing, unexpected)

    def _start_frozen(self, names: list[str], metadata: Mapping[str, str], source: str) -> None:
        """Compute the frozen tensors of these layers from the base.

        Raises `Refused` if that is impossible, or if the base gives another basis than the file names.
        """
        frozen = self.factor.frozen
        if self.factor.not_recomputable:
            raise Refused(
                f"{source} leaves out {', '.join(sorted(frozen))} of {names[0]}, which "
                f"{self.factor.not_recomputable} and nowhere else; use the file that has them"
            )
        self.start(names, frozen | set(self.factor.saved_only))
        want, have = metadata.get("lowrank.basis_hash"), self.start_metadata.get("basis_hash")
        if want and have and want != have:
            raise Refused(
                f"{source} leaves out its basis {want[:12]} and this base model gives {have[:12]}; load it "
                "on the model it was trained on"
            )

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Load as torch does, and also keys of native files, which kohya's gen_img passes."""
        native = {key for key in self.native_state() if not key.startswith("lora_")}
        if not self._modules or native & state_dict.keys():
            return self.read_state(state_dict, {}, "the state dict")
        return super().load_state_dict(state_dict, strict, assign)

    # ------------------------------------------------------------------ merging into the base

    def is_mergeable(self) -> bool:
        return self.method.experts is None and self.method.gate is None

    def merge_to(self, text_encoder, unet, weights_sd=None, dtype=None, device=None) -> None:
        """Set W ← W + ΔW in fp32, rounded once to W's dtype. No other function writes base weights."""
        if weights_sd is not None:
            self.read_state(weights_sd, {}, "the weights to merge")
        with torch.no_grad():
            for layer in self.layers():
                weight = layer.host.weight
                if type(weight) is not nn.Parameter:
                    raise Refused(
                        f"{layer.name} is quantised ({type(weight).__name__}), so no adapter can be merged "
                        "into it; keep the adapter live"
                    )
                layer.to(device or weight.device)
                dW = layer.delta_weight()
                if dW is None:
                    raise Refused(f"{self.method.name} has no one ΔW to merge; keep the adapter live")
                weight.copy_((weight.to(dW.device, torch.float32) + dW.float()).to(weight.dtype))

    def backup_weights(self) -> None:
        self._backup = {layer.name: layer.host.weight.detach().clone() for layer in self.layers()}

    def restore_weights(self) -> None:
        with torch.no_grad():
            for layer in self.layers():
                layer.host.weight.copy_(self._backup[layer.name])

    def pre_calculation(self) -> None:
        self.merge_to(None, None)
        self.set_multiplier(0.0)
