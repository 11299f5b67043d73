"""The network: every adapted layer of a model, under kohya's network contract.

The contract (kohya sd-scripts, networks/lora.py as read by its trainers): apply_to, load_weights,
save_weights, prepare_optimizer_params, prepare_grad_etc, on_epoch_start, get_trainable_params,
set_multiplier, merge_to and their kin.
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
from lowrank.adapters import dialect, kohya_trainer, magnitude, rates
from lowrank.adapters.clock import Clock
from lowrank.adapters.layer import AdaptedLayer
from lowrank.adapters.method import Method, check_made_by
from lowrank.adapters.targets import Layer, Target, dense_weight
from lowrank.errors import Refused
from lowrank.naming import keys
from lowrank.tensors import write_tensors

logger = logging.getLogger(__name__)


class DenseWeights(Mapping[str, Tensor]):
    """The hosts' dense weights by layer name, unpacked only when read."""

    def __init__(self, hosts: Mapping[str, Layer]) -> None:
        self._hosts = hosts

    def __getitem__(self, name: str) -> Tensor:
        return dense_weight(self._hosts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._hosts)

    def __len__(self) -> int:
        return len(self._hosts)


class AdapterNetwork(nn.Module):
    """Adapted layers of one model. Layers join the state dict when `apply_to` has put them on their hosts."""

    train_t5xxl = False  # read by kohya's FLUX and SD3 trainers

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
        if len(self.targets) != len(targets):
            raise Refused("two target layers share one key; name fewer with --network_args target=…")
        ungated = dataclasses.replace(method, gate=None)  # text is encoded once, at no timestep
        self._made = {
            t.name: AdaptedLayer(
                t.name, t.module, method if t.part == "unet" else ungated, *size(t), self.clock
            )
            for t in targets
        }
        self.clock.set_ranks(layer.rank for layer in self.layers("unet"))
        self._owners = self._join()
        self.facts: dict[str, str] = {}  # what the start values were made from, for the file's metadata
        # (part, role) -> multiple of the part's learning rate
        self.role_rates: dict[tuple[str, str], float] = {}
        self.speeds: Mapping[str, rates.Speed] = {}  # by layer name, where a layer does not follow its part
        self.leave_out: frozenset[str] = frozenset()  # roles that files go without
        self._backup: dict[str, Tensor] = {}
        self._penalties: dict[str, Callable[[Any], Tensor]] = {}
        self._pull: Callable[[nn.Module], None] | None = None  # adds penalties where the trainer does not
        self.set_multiplier(multiplier)

    def _join(self) -> dict[str, str]:
        """Give layers of one input space one tensor for the shared role; (layer -> the one it is from)."""
        owners: dict[Any, str] = {}
        found, role = {}, self.factor.shared
        if self.factor.share is None or role is None:
            return {}
        for name, layer in self._made.items():
            target, own = self.targets[name], layer.roles()[role]
            key = (self.factor.share(target.part, target.path, tuple(own.shape[1:])), own.shape)
            owner = owners.setdefault(key, name)
            layer.register_parameter(role, self._made[owner].roles()[role])
            found[name] = owner
        return found

    # ------------------------------------------------------------------ life

    def layers(self, part: str | None = None) -> list[AdaptedLayer]:
        """The adapted layers in the model's order; before `apply_to` all that were made."""
        own = [m for m in self.children() if isinstance(m, AdaptedLayer)] or list(self._made.values())
        return [layer for layer in own if part is None or self.targets[layer.name].part == part]

    def start(self, only: Iterable[str] | None = None, roles: Iterable[str] | None = None) -> None:
        """Give the layers their values at step 0; `only` some layers, `roles` only some tensors of theirs."""
        layers = [layer for layer in self._made.values() if only is None or layer.name in set(only)]
        if not layers or layers[0].host.weight.is_meta:
            return
        ranks = {layer.name: layer.rank for layer in layers}
        scales = {layer.name: layer.scale for layer in layers}
        values, facts = self.factor.start(
            DenseWeights({layer.name: layer.host for layer in layers}), ranks, scales
        )
        for layer in layers:
            own, constrain = {**layer.roles(), **dict(layer.named_buffers())}, self.factor.constrain
            chosen = {}
            for role, value in values[layer.name].items():
                if role == self.factor.shared and self._owners[layer.name] != layer.name:
                    continue
                if roles is None or role in set(roles):
                    value = constrain[role](value) if role in constrain else value
                    chosen[role] = self._in_shape(role, value, own[role].shape) if role in own else value
            layer.load(chosen, "the start values")
            if roles is None:
                if keys.ROUTER in layer.roles():
                    nn.init.normal_(layer.router, std=0.3 / layer.router.shape[1] ** 0.5)
                layer.start_magnitude()
        self.facts.update(facts)
        for note in self.method.notes if roles is None else ():
            logger.warning(note)

    def _in_shape(self, role: str, value: Tensor, shape: torch.Size) -> Tensor:
        """A start value in its parameter's shape; experts start alike where one value is given for all."""
        if self.method.experts and role == self.method.experts.role and value.numel() < shape.numel():
            return value.reshape(shape[1:]).expand(shape)
        return value.reshape(shape)

    def apply_to(self, text_encoder, unet, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Put the layers of the chosen parts in front of their hosts' forwards; the base weights stay."""
        for name, layer in self._made.items():
            if apply_unet if self.targets[name].part == "unet" else apply_text_encoder:
                layer.attach()
                self.add_module(name, layer)
        for one in self.method.penalty:
            value = one.prepare(self) if one.prepare else one.value
            assert value is not None  # a penalty has one or the other
            self._penalties[one.name] = value
        if apply_unet:
            self.clock.attach(unet)

    def restore(self) -> None:
        """Take every layer off its host again."""
        for layer in reversed(self.layers()):
            layer.restore()
        self.clock.detach()

    def denoise_at(self, timestep: Tensor | None):
        """`with network.denoise_at(t):` tells gated layers the samples' timesteps (B,) in 0..1000."""
        return self.clock.pinned(timestep)

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Hold frozen tensors in the dtype of the forward, so that a file says what training used.

        An initial copy stays as it is: it is subtracted before anything is rounded.
        """
        for layer in self._made.values():
            for role, value in layer.named_buffers(recurse=False):
                if role != "alpha" and role not in (*self.factor.copies, *self.factor.precise):
                    setattr(layer, role, value.to(dtype))

    def penalties(self) -> dict[str, Tensor]:
        """The method's penalties at the present parameters, by name."""
        return {name: value(self) for name, value in self._penalties.items()}

    # ------------------------------------------------------------------ training, as kohya's trainers do it

    def tagged(self) -> list[rates.Tagged]:
        """Every trained parameter with its part, its role and how fast it learns."""
        return [
            rates.Tagged(part, role, parameter, self.speeds.get(layer.name, rates.Speed()))
            for layer in self.layers()
            for part in (self.targets[layer.name].part,)
            for role, parameter in layer.roles().items()
            if role != self.factor.shared or self._owners[layer.name] == layer.name
        ]

    def prepare_optimizer_params_with_multiple_te_lrs(self, text_encoder_lr, unet_lr, default_lr=None):
        """Groups and their descriptions.

        `text_encoder_lr`: None, a number, or a list in the order of the encoders.
        """
        given = list(text_encoder_lr) if isinstance(text_encoder_lr, (list, tuple)) else [text_encoder_lr]
        given = [default_lr if rate is None else rate for rate in given or [None]]
        part_rates: dict[str, Any] = {"unet": default_lr if unet_lr is None else unet_lr, "te": given[0]}
        part_rates |= {f"te{i + 1}": given[min(i, len(given) - 1)] for i in range(3)}
        role_rates = {
            (part, role): factor for part in part_rates for role, factor in self.method.rates.items()
        }
        return rates.groups(self.tagged(), part_rates, role_rates | self.role_rates)

    def prepare_optimizer_params(self, text_encoder_lr, unet_lr, default_lr=None):
        return self.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: the layers' forwards are recomputed with their hosts'."""

    def prepare_grad_etc(self, text_encoder, unet) -> None:
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder, unet) -> None:
        self.train()

    def on_step_start(self, *_) -> None:
        """In kohya's trainers, the penalties; values that depend on the step come from the clock."""
        if self._pull is not None:
            self._pull(self)

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        return self.parameters()

    def set_multiplier(self, multiplier: float | Tensor) -> None:
        """Strength of every layer: one number, or one per sample."""
        for layer in self._made.values():
            layer.multiplier = multiplier if isinstance(multiplier, Tensor) else float(multiplier)

    def prepare_network(self, args: Any) -> None:
        """kohya's trainers hand over their options, ours does not. Raises `Refused`, see `check_trainer`."""
        kohya_trainer.check_trainer(self.method, args)
        self._pull = kohya_trainer.pull(args) if self.method.penalty else None

    def set_current_generation(self, *_: Any) -> None:
        """Nothing to do: only regional masks need the batch that kohya's gen_img passes here."""

    def set_region(self, *_: Any) -> None:
        raise Refused("regional masks are not offered by this network; generate without a mask image")

    def set_enabled(self, enabled: bool) -> None:
        self.set_multiplier(1.0 if enabled else 0.0)

    def apply_max_norm_regularization(self, value: float, device) -> tuple[int, float, float]:
        """Scale trained factors until each ‖s·U·D‖_F ≤ value; (how many were scaled, mean, max norm)."""
        factor = self.factor
        if factor.copy or factor.share or self.method.experts:
            raise Refused(f"--scale_weight_norms is not defined for {self.method.name}; leave it out")
        norms, scaled = [], 0
        with torch.no_grad():
            for layer in self.layers():
                U, D = (factor.flatten(1) for factor in layer.factors())
                norm = layer.scale * ((U.T @ U) * (D @ D.T).T).sum().clamp_min(0).sqrt()
                ratio = norm.clamp(max=value) / norm.clamp_min(value / 2)
                trained = [layer.roles()[role] for role in factor.trained]
                if ratio < 1 and norm > value:
                    scaled += 1
                    for parameter in trained:
                        parameter.mul_(ratio ** (1 / len(trained)))
                norms.append(norm.clamp(max=value))
        stacked = torch.stack(norms)
        return scaled, stacked.mean().item(), stacked.max().item()

    # ------------------------------------------------------------------ files

    def native_state(self) -> dict[str, Tensor]:
        """The state dict under native file keys."""
        state = {}
        for layer in self.layers():
            native = self.targets[layer.name].native
            table = keys.PEFT if native else keys.KOHYA
            for role, value in layer.tensors().items():
                if role in self.leave_out:
                    continue
                if role == "magnitude" and native:
                    value = magnitude.in_peft_shape(value)
                state[f"{native or layer.name}.{table.get(role, role)}"] = value
        return state

    def describe(self) -> dict[str, str]:
        """What a reader of the file must know: method, options, ranks, where the start values came from."""
        sizes = {(layer.rank, float(layer.alpha)) for layer in self.layers()}
        one = sizes.pop() if len(sizes) == 1 else (None, None)
        return {
            "lowrank.method": self.method.name,
            "lowrank.options": json.dumps(dict(self.method.options), sort_keys=True, default=str),
            "lowrank.rank": str(one[0]),
            "lowrank.alpha": str(one[1]),
            "lowrank.layers": str(len(self.layers())),
            **{f"lowrank.{key}": value for key, value in self.facts.items()},
            **({} if self.method.gate is None else self.method.gate.metadata(one[0])),
        }

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the native file: whole or not at all."""
        state = {k: v if dtype is None else v.to(dtype) for k, v in self.native_state().items()}
        write_tensors(Path(file), state, {**self.describe(), **(metadata or {})})

    def load_weights(self, file: str):
        """Read a file of any dialect; returns torch's named tuple of missing and unexpected keys."""
        adapter = read_adapter_file(file, self.method.file_roles())
        dialect.check_start(adapter, self.method)
        return self.read_layers(adapter)

    def read_state(self, state: Mapping[str, Tensor], metadata: Mapping[str, str], source: str):
        """`load_weights` for tensors already read."""
        return self.read_layers(read_adapter_file(RawFile(state, metadata, source), self.method.file_roles()))

    def read_layers(self, file: AdapterFile):
        """Load an adapter file's layers; frozen tensors that it leaves out are computed from the base."""
        source, metadata = file.source, file.metadata
        check_made_by(source, metadata, self.method)
        found, unexpected = dialect.match_layers(file, self.targets.values(), self.method)
        if not found:
            raise Refused(
                f"{source} has no layer of this model: it holds {', '.join(unexpected[:2])} and the model "
                f"has {', '.join(list(self.targets)[:2])}; it was made for another base"
            )
        warn_zero_alpha(source, found)
        for name, values in found.items():
            self._check_shared(name, found, source)
            self._made[name].load(values, source)
        frozen = self.factor.frozen
        absent = [name for name, values in found.items() if not frozen <= values.keys()]
        if absent:
            self._start_frozen(absent, frozen, metadata, source)
        missing = [
            f"{name}.{keys.KOHYA.get(role, role)}"
            for name, layer in self._made.items()
            for role in layer.roles()
            if role not in found.get(name, {})
        ]
        return nn.modules.module._IncompatibleKeys(missing, unexpected)

    def _check_shared(self, name: str, found: Mapping[str, Mapping[str, Tensor]], source: str) -> None:
        role, owner = self.factor.shared, self._owners.get(name, name)
        mine, theirs = (found.get(one, {}).get(role or "") for one in (name, owner))
        if mine is not None and theirs is not None and not torch.equal(mine, theirs):
            raise Refused(
                f"{source} has another {role} for {name} than for {owner}, which have one in common; "
                "use the file as it was saved"
            )

    def _start_frozen(
        self, names: list[str], frozen: frozenset[str], metadata: Mapping[str, str], source: str
    ) -> None:
        if self.factor.unique:
            raise Refused(
                f"{source} leaves out {', '.join(sorted(frozen))} of {names[0]}, which {self.factor.unique} "
                "and nowhere else; use the file that has them"
            )
        self.start(names, frozen | set(self.factor.record))
        want, have = metadata.get("lowrank.basis_hash"), self.facts.get("basis_hash")
        if want and have and want != have:
            raise Refused(
                f"{source} leaves out its basis {want[:12]} and this base model gives {have[:12]}; load it "
                "on the model it was trained on"
            )

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As torch's; also takes the keys of native files, which kohya's gen_img hands over as they are."""
        if not self._modules or any(key in self._native_keys() for key in state_dict):
            return self.read_state(state_dict, {}, "the state dict")
        return super().load_state_dict(state_dict, strict, assign)

    def _native_keys(self) -> set[str]:
        return {key for key in self.native_state() if not key.startswith("lora_")}

    # ------------------------------------------------------------------ merging into the base

    def is_mergeable(self) -> bool:
        return self.method.experts is None and self.method.gate is None

    def merge_to(self, text_encoder, unet, weights_sd=None, dtype=None, device=None) -> None:
        """W ← W + ΔW in fp32, rounded once to W's dtype: the only place that writes base weights."""
        if weights_sd is not None:
            self.read_state(weights_sd, {}, "the weights to merge")
        with torch.no_grad():
            for layer in self.layers():
                weight = layer.host.weight
                if type(weight) is not nn.Parameter:
                    raise Refused(
                        f"{layer.name} is quantised ({type(weight).__name__}) and cannot be merged into; "
                        "keep the adapter live"
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
