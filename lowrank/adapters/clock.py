"""The timestep for gated layers: a clock per network, and a hook that sets it from the denoiser's arguments.

Gates use timesteps in 0..1000, where 0 is the clean image and 1000 noise. Denoisers take other numbers: raw
timesteps, σ = t/1000, or 1 − σ. `CONVENTIONS` has a row for each class, taken from the pipelines of diffusers
0.42 and from kohya's trainers. A class without a row is refused.

The hook runs before the denoiser's forward, so it works in stock pipelines, our loop and other trainers, also
under `torch.compile`. Timesteps that a caller sets with `Clock.pinned` take precedence over the hook's.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lowrank.adapters import gate
from lowrank.adapters.method import Method
from lowrank.errors import Refused


def open_mask(method: Method, timestep: Tensor, rank: int) -> Tensor | None:
    """Return the gate's mask (B, R) at timesteps (B,), or None without a gate.

    Every chain has the same mask. If an initial copy is subtracted, the mask is repeated for it: (B, 2R).
    """
    if method.gate is None:
        return None
    factor = method.require_factor()
    parts = len(factor.chains)
    mask = gate.prefix(method.gate.open(timestep, rank // parts), rank // parts)
    return mask.repeat(1, parts if factor.copy is None else 2)


class Clock:
    """The timesteps (B,) of the samples in the denoiser, and the gate's mask for each rank in use.

    Masks are computed when the timestep is set, once for all layers; for a compiled graph they are inputs.
    """

    def __init__(self, method: Method) -> None:
        self._method, self._ranks = method, ()
        self.timestep: Tensor | None = None
        self.masks: dict[int, Tensor] = {}
        self._pinned = False  # whether `pinned` set the timestep; the hook then leaves it
        self._hook: Hook | None = None
        self.steps: Callable[[], Tensor | None] = lambda: None  # the scheduler's timesteps, if known

    def set_ranks(self, ranks: Iterable[int]) -> None:
        """Set the ranks to make masks for. Raises `Refused` if the gate does not allow one of them."""
        self._ranks = tuple(sorted(set(ranks)))
        with self.pinned(torch.zeros(1)):
            pass

    def attach(self, denoiser: nn.Module) -> None:
        """Attach a hook that reads the denoiser's timestep, if there is a gate and the class is known."""
        model = uncompiled(denoiser)
        if self._method.gate is not None and type(model).__name__ in CONVENTIONS and _arguments(model)[1]:
            self._hook = Hook(denoiser, self)

    def detach(self) -> None:
        """Remove the hook from the denoiser."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def set(self, timestep: Tensor | None) -> None:
        """Set the timesteps from the hook; ignored while `pinned` is active."""
        if not self._pinned:
            self._set(timestep)

    def _set(self, timestep: Tensor | None) -> None:
        self.timestep, self.masks = timestep, {}
        if timestep is not None and self._method.gate is not None:
            masks = {rank: open_mask(self._method, timestep, rank) for rank in self._ranks}
            self.masks = {rank: mask for rank, mask in masks.items() if mask is not None}

    @contextlib.contextmanager
    def pinned(self, timestep: Tensor | None) -> Iterator[None]:
        """Set the timesteps within the block, then restore the previous ones."""
        previous = self.timestep, self.masks, self._pinned
        try:
            self._set(timestep)
            self._pinned = timestep is not None
            yield
        finally:
            self.timestep, self.masks, self._pinned = previous

    def now(self) -> contextlib.AbstractContextManager:
        """Return a context with the current timesteps, for gradient checkpointing to recompute in."""
        return self.pinned(self.timestep)


# ------------------------------------------------------------------ timestep arguments of denoisers


class Convention(NamedTuple):
    """How a denoiser's timestep argument is converted: timestep in 0..1000 = offset + scale · argument."""

    scale: float
    offset: float = 0.0

    def timestep(self, argument: Tensor, steps: Tensor | None = None) -> Tensor:
        """Return timesteps (B,) in float64 from the denoiser's argument, () or (B,).

        Pipelines divide by 1000 in the precision of the latents. To undo this rounding, the nearest of the
        scheduler's `steps` is taken if it is within the rounding error; else the result is rounded to 0.001.
        """
        t = self.offset + self.scale * argument.reshape(-1).double()
        if argument.is_floating_point() and steps is not None:
            near = steps.to(t).reshape(-1)
            near = near[(near - t[:, None]).abs().argmin(1)]
            t = torch.where((near - t).abs() <= 1000 * torch.finfo(argument.dtype).eps, near, t)
        return t.round(decimals=3)


RAW, SIGMA, REVERSED = Convention(1.0), Convention(1000.0), Convention(-1000.0, 1000.0)

CONVENTIONS: Mapping[str, Convention] = {
    **dict.fromkeys(
        (
            *("UNet2DConditionModel", "SdxlUNet2DConditionModel", "SD3Transformer2DModel"),
            *("PixArtTransformer2DModel", "SanaTransformer2DModel", "HunyuanDiT2DModel", "Kandinsky3UNet"),
            *(
                "CogView3PlusTransformer2DModel",
                "CogView4Transformer2DModel",
                "HiDreamImageTransformer2DModel",
            ),
            *("HunyuanImageTransformer2DModel", "BriaTransformer2DModel", "LTXVideoTransformer3DModel"),
            *("WanTransformer3DModel", "HunyuanVideoTransformer3DModel", "CogVideoXTransformer3DModel"),
        ),
        RAW,
    ),
    **dict.fromkeys(
        (
            *("FluxTransformer2DModel", "Flux", "Chroma", "Flux2Transformer2DModel"),
            "QwenImageTransformer2DModel",
            *("AuraFlowTransformer2DModel", "ChromaTransformer2DModel", "LongCatImageTransformer2DModel"),
            *("OvisImageTransformer2DModel", "Krea2Transformer2DModel", "PRXTransformer2DModel"),
        ),
        SIGMA,
    ),
    **dict.fromkeys(
        ("ZImageTransformer2DModel", "Lumina2Transformer2DModel", "LuminaNextDiT2DModel"), REVERSED
    ),
    "MochiTransformer3DModel": Convention(-1.0, 1000.0),
}


def uncompiled(denoiser: Any) -> Any:
    """Return the module that `torch.compile` or kohya's gen_img wrapped, or the module itself."""
    return getattr(denoiser, "_orig_mod", getattr(denoiser, "delegate", denoiser))


def convention(denoiser: nn.Module) -> Convention:
    """Return the timestep convention of a denoiser. Raises `Refused` for a class without a row."""
    model: Any = uncompiled(denoiser)
    row = CONVENTIONS.get(type(model).__name__)
    if row is None:
        raise Refused(
            f"the timestep convention of {type(model).__name__} is unknown; run it inside `with "
            "network.denoise_at(t)`, t in 0..1000, or use one of " + ", ".join(CONVENTIONS)
        )
    scale = getattr(getattr(model, "config", None), "timestep_scale", None)  # Sana's pipelines multiply by it
    return Convention(row.scale / scale) if scale and row is RAW else row


def _arguments(model: nn.Module) -> tuple[list[str], str | None]:
    """Return the argument names of a model's forward, and that of its timestep argument or None."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return names, next((name for name in ("timestep", "timesteps") if name in names), None)


class Timed(Protocol):
    """What a `Hook` sets: timesteps (B,), given the scheduler's steps if they are known."""

    timestep: Tensor | None
    steps: Callable[[], Tensor | None]

    def set(self, timestep: Tensor | None) -> None: ...


class Hook:
    """Forward hooks on a denoiser that set a clock from its timestep argument, until `remove()`."""

    def __init__(self, denoiser: nn.Module, clock: Timed) -> None:
        rule, model = convention(denoiser), uncompiled(denoiser)
        names, name = _arguments(model)
        if name is None:
            raise Refused(
                f"{type(model).__name__} has no timestep argument ({', '.join(names)}); run it in "
                "`with network.denoise_at(t)`, t in 0..1000"
            )
        position = names.index(name)
        device = next(model.parameters()).device

        def before(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            argument = torch.as_tensor(kwargs[name] if name in kwargs else args[position], device=device)
            if argument.dim() > 1:
                raise Refused(
                    f"{type(model).__name__} got a timestep for each token {tuple(argument.shape)}; a gate "
                    "needs one for each sample; run the pipeline without expand_timesteps"
                )
            self._previous = clock.timestep
            clock.set(rule.timestep(argument, clock.steps()))

        def after(_module: nn.Module, _args: tuple, out: Any) -> None:
            # `out` is None if the forward raised. With gradients the timestep stays, because a backward
            # may recompute this forward.
            if out is None or not torch.is_grad_enabled():
                clock.set(self._previous)

        self._previous: Tensor | None = None

        self._handles = (
            denoiser.register_forward_pre_hook(before, with_kwargs=True),
            denoiser.register_forward_hook(after, always_call=True),
        )

    def remove(self) -> None:
        """Remove the hooks from the denoiser."""
        for handle in self._handles:
            handle.remove()
