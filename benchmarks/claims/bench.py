"""One loaded model on which many adapters are trained, compared and drawn with, in one process.

Pictures and captions are encoded once. Equal seeds give equal data, noise, timesteps and start values to
every arm, so that differences between arms are paired.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.claims.record import Arm
from benchmarks.claims.world import Pictures
from lowrank.adapter_file import RawFile
from lowrank.adapters.network import AdapterNetwork
from lowrank.combine.columns import Call, recorded
from lowrank.combine.mixture import Mixture
from lowrank.combine.rules import RULES, Merging, RuleOptions
from lowrank.errors import Refused
from lowrank.formats.read import Adapter, read_adapter
from lowrank.models.family import Source
from lowrank.models.flux import FLUX, FluxOptions
from lowrank.models.sd import SD15
from lowrank.models.sdxl import SDXL
from lowrank.objective.diffusion import Diffusion
from lowrank.objective.flow import Flow

FAMILIES = {
    "StableDiffusionPipeline": SD15,
    "StableDiffusionXLPipeline": SDXL,
    "FluxPipeline": FLUX,
}


class Sizes(NamedTuple):
    """What a run costs: steps and batch of a training, rates to tune over, pictures and steps of a number."""

    steps: int = 40
    batch: int = 4
    seeds: int = 5
    pictures: int = 4
    draw_steps: int = 12
    guidance: float = 2.0


class Examples(NamedTuple):
    """Latents (N, C, h, w) and the captions of pictures."""

    latents: Tensor
    captions: list[str]


class Trained(NamedTuple):
    """An attached network, its losses by step, and what `watch` returned, by step."""

    network: AdapterNetwork
    losses: list[float]
    watched: dict[int, Any]


class Bench:
    """A model, a world of pictures, a scorer and the sizes of the experiments."""

    def __init__(
        self, model: Path, world: Any, judge: Any, sizes: Sizes, cache: Path, device: str = "cpu"
    ) -> None:
        index = model / "model_index.json"
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name") if index.is_file() else None
        if kind not in FAMILIES:
            raise Refused(
                f"--model {model} is no diffusers folder of {', '.join(FAMILIES)} (found {kind}); give one"
            )
        self.world, self.judge, self.sizes, self.cache, self.device = world, judge, sizes, cache, device
        self.family: Any = FAMILIES[kind]
        self.models = self.family.load(Source(str(model), dtype=torch.float32, device=device))
        for part in (self.models.denoiser, self.models.vae, *self.models.text_encoders):
            part.requires_grad_(False)
        self.flows = self.family is FLUX
        self.options = FluxOptions(guidance_scale=1.0) if self.flows else self.family.options()
        v = not self.flows and self.family.prediction(self.models) == "v_prediction"
        self.objective: Any = Flow() if self.flows else Diffusion(v_parameterization=v)
        self._texts: dict[str, dict[str, Tensor]] = {}

    @property
    def model_hash(self) -> str:
        """The hash of the denoiser's weights, as in adapter files."""
        return self.family.model_hash(self.models, "denoiser")

    # ------------------------------------------------------------------ data

    def encode(self, pictures: Pictures) -> Examples:
        """Encode pictures to latents."""
        pixels = torch.from_numpy(pictures.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        moments = self.family.encode_images(self.models, pixels.to(self.device))
        return Examples(self.family.latents(self.models, moments, None), pictures.captions)

    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The encoded captions as one batch."""
        for caption in set(captions) - self._texts.keys():
            self._texts[caption] = self.family.encode_text(self.models, [caption], self.options)[0]
        chosen = [self._texts[caption] for caption in captions]
        batch = {key: torch.stack([text[key] for text in chosen]) for key in chosen[0]}
        if self.family.size_conditions is not None:
            side = torch.full((len(captions), 2), float(self.world.size))
            batch |= self.family.size_conditions(side, torch.zeros_like(side), side)
        return batch

    # ------------------------------------------------------------------ training

    def losses(self, examples: Examples, chosen: Sequence[int], generator: torch.Generator) -> Tensor:
        """Losses (B,) of the chosen examples, with gradient."""
        drawn = self.objective.draw(examples.latents[list(chosen)], generator)
        text = self.text([examples.captions[i] for i in chosen])
        prediction = self.family.denoise(
            self.models.denoiser, drawn.noisy, drawn.timesteps, text, self.options
        )
        return self.objective.losses(prediction, drawn)

    @torch.no_grad()
    def loss(self, examples: Examples, repeats: int = 2) -> float:
        """The mean loss of examples on fixed noise and timesteps, equal for every arm."""
        generator, count = torch.Generator().manual_seed(99), len(examples.captions)
        values = [self.losses(examples, range(count), generator) for _ in range(repeats)]
        return float(torch.cat(values).mean())

    @contextlib.contextmanager
    def network(self, arm: Arm, seed: int) -> Iterator[AdapterNetwork]:
        """A new network of an arm on the denoiser for a block."""
        torch.manual_seed(seed)
        arguments = dict(arm.arguments)
        module = importlib.import_module(f"networks.{arm.module}")
        if arm.module in ("delta_r", "delta_r_triu", "qrlora", "pissa"):
            arguments.setdefault("basis_cache", str(self.cache / "basis"))
        if arm.module == "null_lora":
            arguments.setdefault("svd_cache_path", str(self.cache / "null"))
        made = module.create_network(
            1.0, arm.rank, float(arm.rank), None, [], self.models.denoiser, **arguments
        )
        made.apply_to([], self.models.denoiser, False, True)
        made.to(self.device)
        try:
            if arm.prepare is not None:
                arm.prepare(made)
            made.prepare_grad_etc([], self.models.denoiser)
            yield made
        finally:
            made.restore()

    def train(
        self,
        network: AdapterNetwork,
        rate: float,
        seed: int,
        examples: Examples,
        steps: int | None = None,
        watch: Callable[[], Any] | None = None,
        watch_at: Sequence[int] = (),
    ) -> Trained:
        """Train with AdamW and a cosine to zero; `watch()` is called after the steps in `watch_at`."""
        steps = steps or self.sizes.steps
        groups = network.prepare_optimizer_params(rate, rate)[0]
        optimizer = torch.optim.AdamW(groups, rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator, losses, watched = torch.Generator().manual_seed(seed), [], {}
        for step in range(1, steps + 1):
            chosen = torch.randint(len(examples.captions), (self.sizes.batch,), generator=generator).tolist()
            loss = self.losses(examples, chosen, generator).mean()
            losses.append(float(loss.detach()))
            for penalty in network.penalties().values():
                loss = loss + penalty
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if watch is not None and step in watch_at:
                watched[step] = watch()
        return Trained(network, losses, watched)

    def adapter(self, network: AdapterNetwork, name: str) -> Adapter:
        """What a saved file of the network would be read as, for a merge."""
        state = {key: value.detach().clone() for key, value in network.native_state().items()}
        file = RawFile(state, network.describe(), name)
        return read_adapter(file, precision=torch.float32, strict=False, foreign=True)

    # ------------------------------------------------------------------ pictures

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seed: int) -> np.ndarray:
        """Pictures (N, H, W, 3) uint8 of prompts, with whatever is attached."""
        options, size = self.options, self.world.size
        if self.flows:
            options = replace(options, guidance_scale=self.sizes.guidance)
            guided = {"guidance": self.sizes.guidance}
        else:
            guided = {"negative": self.text([""] * len(prompts)), "scale": self.sizes.guidance}
        images = self.family.sample(
            self.models,
            self.text(prompts),
            options,
            height=size,
            width=size,
            steps=self.sizes.draw_steps,
            generator=torch.Generator().manual_seed(seed),
            **guided,
        )
        return np.stack([np.asarray(image.convert("RGB")) for image in images])

    def draw_merged(
        self,
        adapters: Sequence[Adapter],
        weights: Sequence[float],
        rule: str,
        prompts: Sequence[str],
        seed: int,
    ) -> np.ndarray:
        """Pictures with adapters (style, content) merged by a rule of `lowrank.combine.rules`."""
        merging = Merging(RULES[rule], RuleOptions(steps=20))
        attached = Mixture(adapters, (), merging).attach(self.models.denoiser)
        try:
            if RULES[rule].learned:
                attached.learn(self.models.denoiser, [self._calls(a, prompts[:1], seed) for a in adapters])
            attached.set(weights)
            return self.draw(prompts, seed)
        finally:
            attached.restore()

    def _calls(self, adapter: Adapter, prompts: Sequence[str], seed: int) -> list[Call]:
        """The denoiser's calls while one adapter draws."""
        attached = Mixture([adapter]).attach(self.models.denoiser)
        attached.set([1.0])
        try:
            with recorded(self.models.denoiser) as calls:
                self.draw(prompts, seed)
        finally:
            attached.restore()
        return list(calls)
