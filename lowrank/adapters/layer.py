"""An adapted layer: a Linear or Conv2d of the base model, the host, and the low-rank branch added to it.

Shapes: O out, I in, R rank, B batch, k kernel. A convolution is the same equation: D is a k×k convolution
with the host's stride, padding and dilation, U a 1×1 convolution.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank.adapters import experts, gate, magnitude
from lowrank.adapters.clock import Clock, open_mask
from lowrank.adapters.method import Chain, Method
from lowrank.adapters.targets import Layer, dense_weight, stored_weight
from lowrank.errors import Refused
from lowrank.naming import keys
from lowrank.tensors import has_values


class AdaptedLayer(nn.Module):
    """A host and its branch, used through `delta`, `delta_weight`, `roles`, `tensors` and `load`.

    Trainable tensors are parameters, frozen ones buffers, records (written to files, unused in the forward)
    plain CPU tensors; each is named by its role. The host is never a child, because its module owns it.
    """

    alpha: Tensor
    magnitude: Tensor  # only if the method has a magnitude
    router: Tensor  # only if the method has experts
    multiplier: float | Tensor

    def __init__(self, name: str, host: Layer, method: Method, rank: int, alpha: float, clock: Clock) -> None:
        super().__init__()
        self.name, self.method, self.rank, self._clock, self._host = name, method, rank, clock, [host]
        self.factor, self.conv = method.require_factor(), isinstance(host, nn.Conv2d)
        if isinstance(host, nn.Conv2d) and host.groups != 1:
            raise Refused(
                f"{name} is a grouped convolution (groups={host.groups}), which no method supports; "
                "exclude it with --network_args exclude=…"
            )
        if self.conv and method.experts and method.experts.on == "x":
            raise Refused(
                f"{name} is a convolution, whose input and output differ in size, so {method.name} cannot "
                "route on x there; route on h, or exclude it with --network_args exclude=…"
            )
        if isinstance(host, nn.Conv2d):
            outs, ins, kernel = host.out_channels, host.in_channels, tuple(host.kernel_size)
        else:
            outs, ins, kernel = host.out_features, host.in_features, ()
        self.scale, self.multiplier = alpha / rank, 1.0
        self.dropout = self.rank_dropout = self.module_dropout = 0.0
        self.saved_only: dict[str, Tensor] = {}
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        for role, shape in self._shapes(outs, ins, kernel).items():
            empty = torch.empty(shape, device="meta" if stored_weight(host).is_meta else None)
            if role in self.factor.trained or role in ("magnitude", keys.ROUTER):
                self.register_parameter(role, nn.Parameter(empty))
            else:
                self.register_buffer(role, empty)

    def _shapes(self, outs: int, ins: int, kernel: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each trainable and frozen tensor, by role."""
        factor, E, ones = self.factor, self.method.experts, (1,) * len(kernel)
        R, shapes = self.rank // len(factor.chains), {}
        for chain in (*factor.chains, *((factor.copy,) if factor.copy else ())):
            rows, up, cores = factor.split_up(chain)
            shapes[chain.down[-1]], shapes[up] = (R, ins, *kernel), (outs, R, *ones)
            shapes |= {rows: (outs,)} if rows else {}
            for role in (*cores, *chain.down[:-1]):
                shapes[role] = (R,) if role in factor.diagonal else (R, R)
        if E:
            shapes[E.role] = (E.count, *shapes[E.role])
            shapes[keys.ROUTER] = (E.count, self.rank if E.on == "h" else ins)
        if self.method.magnitude:
            shapes["magnitude"] = (outs, 1, *ones)
        return shapes

    # ------------------------------------------------------------------ values

    @property
    def host(self) -> Layer:
        return self._host[0]

    def roles(self) -> dict[str, nn.Parameter]:
        """Return the trainable tensors by role; together they are exactly `parameters()`."""
        return {role: p for role, p in self._parameters.items() if p is not None}

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of a file by role: trainable, frozen, records and `alpha`."""
        trained = {role: self._role(role).detach() for role in self._parameters}  # as in the forward
        frozen = {role: value for role, value in self._buffers.items() if value is not None}
        return {**trained, **frozen, **self.saved_only}

    def load(self, values: dict[str, Tensor], source: str = "the file") -> None:
        """Copy values by role; other roles keep theirs. Raises `Refused` for a wrong shape, role or NaN."""
        for role, value in values.items():
            tensor = self._parameters.get(role, self._buffers.get(role))
            if not torch.isfinite(value).all():
                raise Refused(
                    f"{self.name}.{role} in {source} holds NaN or infinite values; use an earlier file"
                )
            if tensor is None:
                if role not in self.factor.saved_only:
                    raise Refused(
                        f"{self.name} has no {role!r}, which {source} gives; it was made by another method "
                        f"than {self.method.name}"
                    )
                self.saved_only[role] = value.detach().to("cpu", copy=True)
                continue
            value = self._fitted(role, value.flatten() if tensor.dim() == 1 else value, tensor.shape, source)
            with torch.no_grad():
                tensor.copy_(value.to(tensor.device))
        if "alpha" in values:
            self.scale = float(self.alpha) / self.rank

    def _fitted(self, role: str, value: Tensor, shape: torch.Size, source: str) -> Tensor:
        """Return a file's tensor in the shape of the layer's. Raises `Refused` if it does not fit."""
        if role == "magnitude" and shape[0] != len(value) == 1:
            raise Refused(
                f"{self.name}.dora_scale in {source} is {tuple(value.shape)}, a length for each input, but "
                "here each output has one; use it in LyCORIS, whose wd_on_output=False made it"
            )
        if _without_ones(shape) != _without_ones(value.shape):
            raise Refused(
                f"{self.name}.{role} is {tuple(value.shape)} in {source} and {tuple(shape)} here; "
                "the rank or the base model differs, check --network_dim (or use --dim_from_weights)"
            )
        constrain = self.factor.constrain.get(role)
        rows = value.reshape(shape).flatten(1) if constrain else value
        if constrain and not torch.equal(constrain(rows), rows):
            raise Refused(
                f"{self.name}.{role} in {source} has entries that {self.method.name} keeps at zero; "
                "it was made by another method"
            )
        return value.reshape(shape)

    def _apply(self, fn, recurse=True):
        """Apply `fn` as torch does, but to no narrower dtype if an initial copy is subtracted.

        Rounding U and U₀ separately would change U − U₀ by more than training did.
        """

        def apply_wide(value: Tensor) -> Tensor:
            result = fn(value)
            return value.to(result.device) if result.dtype.itemsize < value.dtype.itemsize else result

        return super()._apply(fn if self.factor.copy is None else apply_wide, recurse)

    def start_magnitude(self) -> None:
        """Set m = ‖W + ΔW‖ per row with the function of the forward, so that g is exactly 1 at step 0."""
        if self.method.magnitude and has_values(stored_weight(self.host)):
            with torch.no_grad():
                self.magnitude.copy_(self.row_norm(*self.factors()).reshape(self.magnitude.shape))

    # ------------------------------------------------------------------ mathematics

    def _role(self, role: str) -> Tensor:
        """Return a tensor as the forward uses it, constrained."""
        value, constrain = getattr(self, role), self.factor.constrain.get(role)
        return value if constrain is None else constrain(value.flatten(1)).reshape(value.shape)

    def _product(self, chain: Chain) -> tuple[Tensor, Tensor]:
        """Return U (O, R[, 1, 1]), with experts (E, O, R[, 1, 1]), and D (R, I[, k, k]) of one chain."""
        rows, up, cores = self.factor.split_up(chain)
        U, D = self._role(up), self._role(chain.down[-1])
        if rows or cores:
            ones = (1,) * (2 * self.conv)
            U = U.reshape(U.shape[: U.dim() - len(ones)])
            U = U if rows is None else self._role(rows)[:, None] * U
            for role in cores:
                C = self._role(role)
                U = U * C if role in self.factor.diagonal else U @ C  # (O, R) or (E, O, R)
            U = U.reshape(*U.shape, *ones)
        for role in reversed(chain.down[:-1]):
            C, flat = self._role(role), D.flatten(1)
            D = (C[:, None] * flat if role in self.factor.diagonal else C @ flat).reshape(D.shape)
        return U, D

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the pair of the whole branch: U (O, R[, 1, 1]), with experts (E, …), and D (R, I[, k, k]).

        If an initial copy is subtracted, the rank is 2R: U D − U₀ D₀ = [U | U−U₀]·[D−D₀ ; D₀]. This is
        exactly zero at the start, and not a difference of two large products, in which half precision would
        lose a small change.
        """
        pairs = [self._product(chain) for chain in self.factor.chains]
        U, D = pairs[0]
        if len(pairs) > 1:
            ups = [up for up, _ in pairs]
            if self.method.experts:  # Σₑ wₑ = 1, so a chain without experts is repeated for each
                dims = 4 if self.conv else 2  # of the up of one expert
                ups = [up.expand(self.method.experts.count, *up.shape[-dims:]) for up in ups]
            U = torch.cat(ups, dim=-3 if self.conv else -1)
            D = torch.cat([down for _, down in pairs])
        if self.factor.copy is None:
            return U, D
        U_0, D_0 = self._product(self.factor.copy)
        return torch.cat([U, U - U_0], dim=1), torch.cat([D - D_0, D_0])

    def delta_weight(self, at: Tensor | None = None) -> Tensor | None:
        """Return ΔW in the host's shape (O, I[, k, k]), or None if it depends on the input.

        With a magnitude ΔW is m·(W + ΔW)/‖W + ΔW‖ − W, and the multiplier scales that whole change, as in
        the programs that load DoRA files. A gated method has a different ΔW at each timestep, given by `at`
        (1,); raises `Refused` for such a method without `at`.
        """
        if self.method.experts is not None:
            return None
        mask = None
        if self.method.gate is not None:
            if at is None:
                raise Refused(
                    f"{self.method.name} has another ΔW at every timestep; keep it live, or export one with "
                    "tools/export_lora.py --at-timestep T"
                )
            mask = open_mask(self.method, at, self.rank)
        U, D = (factor.flatten(1) for factor in self.factors())
        dW = self.scale * (U @ (D if mask is None else mask.to(D).T * D))
        if self.method.magnitude is not None:
            g, W = self._row_scale(U, D)[:, None], dense_weight(self.host).to(dW)
            dW = (g - 1) * W + g * dW
        dW, host = self.multiplier * dW, self.host
        return dW.reshape(-1, host.in_channels, *host.kernel_size) if isinstance(host, nn.Conv2d) else dW

    def row_norm(self, U: Tensor, D: Tensor) -> Tensor:
        """Return ‖W + ΔW‖ per row, in fp32 or wider: half precision errs by more than training changes it."""
        wide = torch.promote_types(U.dtype, torch.float32)
        if self.method.experts:
            U = U.mean(0)  # a mixture has a ΔW for each input; the mean of the experts replaces it
        with torch.autocast(U.device.type, enabled=False):
            W, U, D = dense_weight(self.host).to(U.device, wide), U.flatten(1).to(wide), D.flatten(1).to(wide)
            squares = getattr(self.host, "row_norms", None)  # of a frozen host, before it was quantised
            squares = None if squares is None else squares.to(U.device, wide)
            return magnitude.row_norm(W, U, D, self.scale, squares)

    def _row_scale(self, U: Tensor, D: Tensor) -> Tensor:
        """Return g = m/‖W + ΔW‖ (O,), exactly 1 at the start: both are rounded to the magnitude's dtype."""
        detach = self.method.magnitude is None or self.method.magnitude.detach
        with torch.no_grad() if detach else contextlib.nullcontext():
            norm = self.row_norm(U, D).to(self.magnitude.dtype)
        return self.magnitude.flatten() / norm.masked_fill(norm == 0, 1)  # g of a zero row is m

    def _with_gain(self, out: Tensor, y: Tensor, g: Tensor, share: float = 1.0) -> Tensor:
        """Return out + share·(g − 1) ⊙ W x for the host's output y = W x + b; exactly `out` if g = 1."""
        column, bias = (-1, 1, 1) if self.conv else (-1,), self.host.bias
        Wx = y if bias is None else y - bias.to(y).reshape(column)
        return torch.addcmul(out, Wx, (g - 1).to(y).reshape(column), value=share)

    def _project(self, x: Tensor, D: Tensor) -> Tensor:
        """Return h = M(t)·D x with dropouts: (B, …, R'), or (B, R', h, w) for a convolution."""
        host = self.host
        if isinstance(host, nn.Conv2d):
            h = F.conv2d(x, D, stride=host.stride, padding=host.padding, dilation=host.dilation)
        else:
            h = F.linear(x, D)
        if self.method.gate is not None:
            if self.rank not in self._clock.masks:
                raise Refused(
                    f"{self.method.name} needs the timestep, which is not set; run the whole denoiser, or "
                    "run inside `with network.denoise_at(t)`"
                )
            mask = gate.mask_per_sample(self._clock.masks[self.rank], h.shape[0])
            h = h * _along_rank(mask, h, self.conv)
        if self.training and self.dropout:
            h = F.dropout(h, self.dropout)
        if self.training and self.rank_dropout:  # as in kohya: per sample, with kept ranks scaled up
            kept = (torch.rand(h.shape[0], self.rank, device=h.device) > self.rank_dropout).to(h)
            kept = kept.repeat(1, D.shape[0] // self.rank) / (1 - self.rank_dropout)
            h = h * _along_rank(kept, h, self.conv)
        return h

    def hidden(self, x: Tensor, D: Tensor) -> Tensor:
        """Return the input of the ups, h or with experts w ⊗ h, with channels at the host's position."""
        h, E = self._project(x, D), self.method.experts
        if E is None:
            return h
        h = h.movedim(1, -1) if self.conv else h  # (B, …, R)
        features = h if E.on == "h" else x
        features = features if E.scope == "token" else experts.pooled(features)
        wide = experts.mixed_hidden(h, E.route(features, self.router))
        return wide.movedim(-1, 1) if self.conv else wide

    def delta(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return what the branch adds to the host's output y = W x + b; only a magnitude needs `y`."""
        U, D = self.factors()
        h, up = self.hidden(x, D), experts.stacked_ups(U) if self.method.experts else U
        d = (F.conv2d(h, up) if self.conv else F.linear(h, up)) * self.scale
        if self.method.magnitude is not None:
            g = self._row_scale(U, D)
            d = d * (g.reshape(-1, 1, 1) if self.conv else g)
            d = self._with_gain(d, self._forward_host(x) if y is None else y, g)
        return d * _strength(self.multiplier, d)

    # ------------------------------------------------------------------ the host's forward

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        y = self._forward_host(x, *args, **kwargs)
        if isinstance(self.multiplier, float) and self.multiplier == 0:
            return y
        if self.training and self.module_dropout and torch.rand(()) < self.module_dropout:
            return y
        mixed = torch.is_autocast_enabled(x.device.type)
        x = x if mixed else x.to(getattr(self, self.factor.chains[0].down[-1]).dtype)
        if isinstance(self.multiplier, Tensor) or not self._fusable(y, mixed):
            return y + self.delta(x, y).to(y.dtype)
        U, D = self.factors()
        h, up = self.hidden(x, D).flatten(0, -2), experts.stacked_ups(U) if self.method.experts else U
        if self.method.magnitude is not None:
            g = self._row_scale(U, D)
            y, up = self._with_gain(y, y, g, self.multiplier), g[:, None] * up
        # y + s·h·Uᵀ in one call: no separate product and sum of the wide output
        sum_ = torch.addmm(
            y.flatten(0, -2), h.to(y.dtype), up.to(y.dtype).T, alpha=self.scale * self.multiplier
        )
        return sum_.view(y.shape)

    def _fusable(self, y: Tensor, mixed: bool) -> bool:
        """Return whether `addmm` can add the branch to y: for a Linear with y in the dtype of the factors."""
        if self.conv or y.dim() < 2:
            return False
        return mixed or y.dtype == getattr(self, self.factor.split_up(self.factor.chains[0])[1]).dtype

    def _forward_host(self, x: Tensor, *args, **kwargs) -> Tensor:
        chained = getattr(self, "_chained", None)
        return (chained[0] if chained else self.host.forward)(x, *args, **kwargs)

    def attach(self) -> None:
        """Replace the host's forward, which may be that of another adapter, by this layer's."""
        self._before = self.host.__dict__.get("forward")
        self._chained = [self.host.forward]  # in a list: a bound method of the host must not make it a child
        self.host.forward = self.forward  # pyright: ignore[reportAttributeAccessIssue]  # x for input

    def restore(self) -> None:
        """Restore the forward that the host had before `attach`."""
        if self.host.__dict__.get("forward") != self.forward:
            raise Refused(f"another adapter was attached to {self.name} later; restore that adapter first")
        if self._before is None:
            del self.host.forward
        else:
            self.host.forward = self._before
        del self._chained

    # ------------------------------------------------------------------ state dict, with keys of files

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        for role, value in self.tensors().items():
            destination[prefix + keys.KOHYA.get(role, role)] = value

    def _load_from_state_dict(self, state, prefix, _metadata, _strict, missing, unexpected, errors) -> None:
        values = {}
        for key in [key for key in state if key.startswith(prefix)]:
            role = keys.role_of(key)
            values[role[1] if role else key[len(prefix) :]] = state[key]
        expected = {*self._parameters, *self._buffers}
        missing += [prefix + keys.KOHYA.get(role, role) for role in expected - values.keys()]
        unknown = values.keys() - expected - set(self.factor.saved_only)
        unexpected += [prefix + keys.KOHYA.get(role, role) for role in unknown]
        try:
            self.load({role: value for role, value in values.items() if role not in unknown})
        except Refused as refused:
            errors.append(str(refused))


def _without_ones(shape: torch.Size) -> tuple[int, ...]:
    """Return a shape without trailing ones, which linear layers and 1×1 convolutions do not differ in."""
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


def _along_rank(mask: Tensor, h: Tensor, conv: bool) -> Tensor:
    """Return a mask (B, R) in a shape that multiplies h (B, …, R) or (B, R, h, w)."""
    B, R = mask.shape
    return mask.to(h).reshape((B, R, 1, 1) if conv else (B, *(1,) * (h.dim() - 2), R))


def _strength(multiplier: float | Tensor, d: Tensor) -> float | Tensor:
    """Return a scalar, or the multipliers (n,) of n samples repeated over a batch of n·k."""
    if not isinstance(multiplier, Tensor) or multiplier.dim() == 0:
        return multiplier
    rows = multiplier.to(d).repeat_interleave(d.shape[0] // multiplier.shape[0])
    return rows.reshape(-1, *(1,) * (d.dim() - 1))
