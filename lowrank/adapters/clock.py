"""Who tells gated layers the timestep: a clock for each network, and a hook that sets it from any denoiser.

Gates read timesteps in 0..1000, where 0 is the picture and 1000 noise. Denoisers are told other numbers: raw
timesteps, σ = t/1000, or 1 − σ. `CONVENTIONS` has a row for each class, read off the pipelines of diffusers
0.42 and of kohya's trainers; a class without a row is refused, not guessed.

The hook stands in front of the denoiser's forward, so that stock pipelines, our loop and other trainers are
served alike, also under `torch.compile`. What a caller says itself (`Clock.pinned`) goes before what the hook
hears.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank.adapters import gate
from lowrank.adapters.method import Method
from lowrank.errors import Refused


def open_mask(method: Method, timestep: Tensor, rank: int) -> Tensor | None:
    """The gate's mask (B, R) at timesteps (B,), the same for each chain, or None without a gate.

    Where the initial copy is subtracted it is there twice, (B, 2R).
    """
    if method.gate is None:
        return None
    factor = method.require_factor()
    parts = len(factor.chains)
    mask = gate.prefix(method.gate.open(timestep, rank // parts), rank // parts)
    return mask.repeat(1, parts if factor.copy is None else 2)


class Clock:
    """The timesteps (B,) of the samples now in the denoiser, and the gate's mask for each rank in use.

    Masks are made when the timestep is set, once for all layers; inside a compiled graph they are inputs.
    """

    def __init__(self, method: Method) -> None:
        self._method, self._ranks = method, ()
        self.timestep: Tensor | None = None
        self.masks: dict[int, Tensor] = {}
        self._pinned = False  # by `pinned`, which the hook does not overrule
        self._hook: Hook | None = None
        self.steps: Callable[[], Tensor | None] = lambda: None  # the scheduler's timesteps, where known

    def set_ranks(self, ranks: Iterable[int]) -> None:
        """Make masks for these ranks. Raises `Refused` where the gate does not fit one."""
        self._ranks = tuple(sorted(set(ranks)))
        with self.pinned(torch.zeros(1)):
            pass

    def attach(self, denoiser: nn.Module) -> None:
        """Read the timestep of this denoiser whenever it runs, if there is a gate and its class is known."""
        model = uncompiled(denoiser)
        if self._method.gate is not None and type(model).__name__ in CONVENTIONS and _arguments(model)[1]:
            self._hook = Hook(denoiser, self)

    def detach(self) -> None:
        """Remove the hook from the denoiser."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def set(self, timestep: Tensor | None) -> None:
        """Set the timesteps that the hook read, unless a caller pinned others."""
        if not self._pinned:
            self._set(timestep)

    def _set(self, timestep: Tensor | None) -> None:
        self.timestep, self.masks = timestep, {}
        if timestep is not None and self._method.gate is not None:
            made = {rank: open_mask(self._method, timestep, rank) for rank in self._ranks}
            self.masks = {rank: mask for rank, mask in made.items() if mask is not None}

    @contextlib.contextmanager
    def pinned(self, timestep: Tensor | None) -> Iterator[None]:
        """Set the timesteps for a block and restore what was there."""
        before = self.timestep, self.masks, self._pinned
        try:
            self._set(timestep)
            self._pinned = timestep is not None
            yield
        finally:
            self.timestep, self.masks, self._pinned = before

    def now(self) -> contextlib.AbstractContextManager:
        """Return to this moment later: gradient checkpointing re-enters it when it recomputes."""
        return self.pinned(self.timestep)


# ------------------------------------------------------------------ what denoisers are told


class Convention(NamedTuple):
    """timestep in 0..1000 = offset + scale · what the denoiser is told."""

    scale: float
    offset: float = 0.0

    def timestep(self, told: Tensor, steps: Tensor | None = None) -> Tensor:
        """Timesteps (B,) in float64 from what a denoiser is told, () or (B,).

        Pipelines divide by 1000 in the precision of the latents. That rounding is undone: by the step of the
        scheduler (`steps`) that is within it, else to a thousandth of a step.
        """
        t = self.offset + self.scale * told.reshape(-1).double()
        if told.is_floating_point() and steps is not None:
            near = steps.to(t).reshape(-1)
            near = near[(near - t[:, None]).abs().argmin(1)]
            t = torch.where((near - t).abs() <= 1000 * torch.finfo(told.dtype).eps, near, t)
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
    """The module that `torch.compile`, or kohya's gen_img, wrapped, or the module itself."""
    return getattr(denoiser, "_orig_mod", getattr(denoiser, "delegate", denoiser))


def convention(denoiser: nn.Module) -> Convention:
    """How this denoiser is told the timestep. Raises `Refused`, by name, for a class without a row."""
    model: Any = uncompiled(denoiser)
    found = CONVENTIONS.get(type(model).__name__)
    if found is None:
        raise Refused(
            f"it is not known how {type(model).__name__} is told the timestep; run it inside `with "
            "network.denoise_at(t)`, t in 0..1000, or use one of " + ", ".join(CONVENTIONS)
        )
    scale = getattr(getattr(model, "config", None), "timestep_scale", None)  # Sana's pipelines multiply by it
    return Convention(found.scale / scale) if scale and found is RAW else found


def _arguments(model: nn.Module) -> tuple[list[str], str | None]:
    """The names of a forward's arguments, and that of the timestep among them."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return names, next((name for name in ("timestep", "timesteps") if name in names), None)


class Hook:
    """Tells a clock the time whenever the denoiser runs; `remove()` ends it."""

    def __init__(self, denoiser: nn.Module, clock: Clock) -> None:
        rule, model = convention(denoiser), uncompiled(denoiser)
        names, name = _arguments(model)
        if name is None:
            raise Refused(
                f"this {type(model).__name__} takes no timestep, only {', '.join(names)}; run it inside "
                "`with network.denoise_at(t)`, t in 0..1000"
            )
        position = names.index(name)
        device = next(model.parameters()).device

        def before(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            told = torch.as_tensor(kwargs[name] if name in kwargs else args[position], device=device)
            if told.dim() > 1:
                raise Refused(
                    f"{type(model).__name__} was told a timestep for each token {tuple(told.shape)}; a gate "
                    "needs one for each sample, so run the pipeline without expand_timesteps"
                )
            self._earlier = clock.timestep
            clock.set(rule.timestep(told, clock.steps()))

        def after(_module: nn.Module, _args: tuple, out: Any) -> None:
            # after a forward that raised, torch gives no output; with one and a gradient, a backward may yet
            # recompute this forward, or the one before
            if out is None or not torch.is_grad_enabled():
                clock.set(self._earlier)

        self._earlier: Tensor | None = None

        self._handles = (
            denoiser.register_forward_pre_hook(before, with_kwargs=True),
            denoiser.register_forward_hook(after, always_call=True),
        )

    def remove(self) -> None:
        """Take the hook off its denoiser."""
        for handle in self._handles:
            handle.remove()
