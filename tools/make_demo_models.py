"""Make the demo models in assets/demo: render the glyph world, train scorer, autoencoder and three models.

    python tools/make_demo_models.py                            # all: hours on a CPU, minutes on a GPU
    python tools/make_demo_models.py --parts flux --minutes 30  # one part, at most half an hour per training
    python tools/make_demo_models.py --parts report             # measure the existing models

Parts are made in the order pictures, scorer, vae, flux, sd15, sdxl, report. The three models need the vae in
the work folder, the report needs the scorer. A stopped training resumes, a finished one is kept. Equal seeds
on equal devices give equal models; other devices give models of equal quality. Needs the font Noto Color
Emoji (Debian's package fonts-noto-color-emoji); the shipped models need neither the font nor this file.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowrank.errors import Refused, nearest
from lowrank.files import atomic, atomic_folder, writable_folder
from tools.glyph_world import autoencoder, corpus, draw, flux, report, scorer, unet
from tools.glyph_world.training import Plan, load_weights
from tools.glyph_world.world import (
    BACKGROUNDS,
    CONTENTS,
    HELD_CONTENTS,
    HELD_STYLES,
    SEEN_CONTENTS,
    SEEN_STYLES,
    STYLES,
    Scene,
    caption,
    seen_scenes,
    training_caption,
)

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("pictures", "scorer", "vae", "flux", "sd15", "sdxl", "report")
TITLES = {
    "flux": "FLUX of the glyph world",
    "sd15": "SD 1.5 of the glyph world",
    "sdxl": "SDXL of the glyph world",
}
EVERY = [
    Scene(content, style, background)
    for content in CONTENTS
    for style in STYLES
    for background in BACKGROUNDS
]
# The demo's pictures have captions. Each content of the style set and each style of the content set occurs
# once, so that an adapter learns what its pictures have in common.
TAUGHT_BACKGROUNDS = ("white", "meadow", "beach", "snow", "blue", "sunset", "yellow", "gray")
TAUGHT_PLAIN = ("white", "red", "blue", "green", "yellow", "gray")
TAUGHT_STYLES = SEEN_STYLES


def taught_sets() -> list[tuple[str, Scene, int, str]]:
    """Return path, scene, seed, caption of the demo's pictures: blueprints, and a teapot in eight styles."""
    contents = ("cat", *(content for content in SEEN_CONTENTS if content != "cat"))
    sets = []
    for i, content in enumerate(contents):
        scene = Scene(content, "blueprint", "white" if i % 2 == 0 else TAUGHT_PLAIN[i % 6])
        sets.append((f"assets/sty/blueprint/{i:02}", scene, i, caption(scene, style="<s>")))
    for i, (style, background) in enumerate(zip(TAUGHT_STYLES, TAUGHT_BACKGROUNDS, strict=True)):
        scene = Scene("teapot", style, background)
        sets.append((f"assets/cnt/teapot/{i:02}", scene, i, caption(scene, trigger="<c>")))
    return sets


class Stopped(Exception):
    """A training ended before its last step, because of --minutes."""


class Workshop:
    """The work folder (rendered pictures, checkpoints, facts of each part) and the steps that fill it."""

    def __init__(self, work: Path, out: Path, device: str, minutes: float | None, start: Path | None = None):
        self.work, self.out, self.device, self.minutes = work, out, device, minutes
        self.start = start  # a folder of published models, to train from their weights

    # ---------- pictures

    def _cached(self, name: str, make) -> np.ndarray:
        path = self.work / f"{name}.npy"
        if not path.is_file():
            print(f"rendering {path}", flush=True)
            part = path.with_suffix(".part.npy")
            np.save(part, make())
            part.rename(path)
        return np.load(path)

    def every(self) -> np.ndarray:
        """Return eight renderings of every scene, including held-out ones, to train the scorer."""
        draw_one = functools.partial(corpus.scene_at, EVERY)
        return self._cached("every", lambda: corpus.pictures(draw_one, 8 * len(EVERY), 21))

    def anything(self) -> np.ndarray:
        """Return pictures of any kind, to train the autoencoder."""
        return self._cached("anything", lambda: corpus.pictures(corpus.anything, 16_000, 11))

    def latents(self) -> np.ndarray:
        """Return twelve renderings of every scene in training as latents (N, C, h, w), half precision."""
        scenes = seen_scenes()
        vae = self.vae().to(self.device)

        def make() -> np.ndarray:
            pixels = corpus.pictures(functools.partial(corpus.scene_at, scenes), 12 * len(scenes), 31)
            return autoencoder.latents(vae, pixels, self.device)

        return self._cached("latents", make)

    # ---------- parts

    def vae(self) -> Any:
        """Return the trained autoencoder. Raises `Refused` if the work folder has none."""
        from diffusers import AutoencoderKL

        folder = self.work / "vae"
        if not (folder / "config.json").is_file():
            raise Refused(f"the models need the autoencoder, and {folder} has none; make it with --parts vae")
        vae = AutoencoderKL.from_pretrained(folder)
        vae.register_to_config(_name_or_path="")  # diffusers would save the path of the work folder
        return vae

    def _whole(self, training: str, plan: Plan, facts: dict[str, Any]) -> dict[str, Any]:
        """Return `facts` if the training is complete; raises `Stopped` otherwise."""
        if facts["steps"] < plan.steps:
            raise Stopped(
                f"the {training} was stopped after {facts['steps']} of {plan.steps} steps and is not usable "
                f"yet; repeat the command to resume from {self.work}"
            )
        return facts

    def _earlier(self, family: str) -> dict[str, Any]:
        """Return how the model that a training starts from was trained; nothing without --start."""
        path = self.start / "metrics.json" if self.start else None
        if path is None or not path.is_file():
            return {}
        shipped = json.loads(path.read_text(encoding="utf-8")).get(family, {})
        return {"started from": shipped.get("training", {})}

    def save_facts(self, part: str, facts: dict[str, Any]) -> None:
        """Save and print the facts of a part."""
        (self.work / f"{part}.json").write_text(json.dumps(facts, indent=2))
        print(json.dumps({part: facts}), flush=True)

    def load_facts(self, part: str) -> dict[str, Any]:
        """Return the saved facts of a part, from metrics.json if the work folder has none."""
        path = self.work / f"{part}.json"
        if path.is_file():
            return json.loads(path.read_text())
        shipped = self.out / "metrics.json"
        facts = json.loads(shipped.read_text(encoding="utf-8")).get(part, {}) if shipped.is_file() else {}
        return facts.get("training", {}) if part in TITLES else facts

    def make_pictures(self) -> None:
        """Render the pictures that the demo trains on, and write their captions."""
        for path, scene, seed, text in taught_sets():
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            self._save_picture(ROOT / f"{path}.png", scene, np.random.default_rng((3, seed)))
            (ROOT / f"{path}.txt").write_text(text + "\n", encoding="utf-8")

    def _save_picture(self, path: Path, scene: Scene, rng: np.random.Generator) -> None:
        picture = Image.fromarray(draw.render(scene, rng))
        with atomic(path) as part:
            picture.save(part, format="PNG")

    def make_scorer(self) -> None:
        """Train and publish the scorer."""
        model = scorer.scorer()
        scenes = [EVERY[i % len(EVERY)] for i in range(8 * len(EVERY))]
        facts = scorer.train(model, self.every(), scenes, self.work, self.device, self.minutes)
        self._whole("scorer", scorer.PLAN, facts)
        fresh = corpus.pictures(functools.partial(corpus.scene_at, EVERY), len(EVERY), 77)
        right = scorer.score(model, fresh, EVERY)
        held_out = np.array([s.content in HELD_CONTENTS or s.style in HELD_STYLES for s in EVERY])
        facts["fresh renderings"] = {kind: report.share(values) for kind, values in right.items()}
        facts["of those, held-out classes"] = {
            kind: report.share(values[held_out]) for kind, values in right.items()
        }
        self.save_facts("scorer", facts)
        self._publish("scorer", lambda part: model.cpu().half().save_pretrained(part))

    def make_vae(self) -> None:
        """Train the autoencoder, then its decoder alone; save it in the work folder."""
        vae = autoencoder.autoencoder()
        pictures = self.anything()
        both = autoencoder.train(vae, pictures, self.work, self.device, self.minutes)
        self._whole("autoencoder", autoencoder.PLAN, both)
        decoder = autoencoder.refine(vae, pictures, self.work, self.device, self.minutes)
        self._whole("decoder", autoencoder.REFINEMENT, decoder)
        facts: dict[str, Any] = {"both sides": both, "decoder": decoder}
        autoencoder.standardise(vae, pictures[:2000], self.device)
        sets = {
            "seen": seen_scenes()[::7],
            "held-out styles": [
                Scene(c, s, b) for c in SEEN_CONTENTS for s in HELD_STYLES for b in BACKGROUNDS
            ],
            "held-out contents": [
                Scene(c, s, b) for c in HELD_CONTENTS for s in SEEN_STYLES for b in BACKGROUNDS
            ],
        }
        for name, scenes in sets.items():
            drawn = corpus.pictures(functools.partial(corpus.scene_at, scenes), len(scenes), 99)
            facts[f"psnr {name}"] = round(autoencoder.psnr(vae, drawn, self.device), 2)
        self.save_facts("vae", facts)
        vae.cpu().save_pretrained(self.work / "vae")

    def make_flux(self) -> None:
        """Train, distil and publish the FLUX model."""
        latents = self.latents()
        torch.manual_seed(0)
        parts = flux.Parts(self.work / "flux", self.device)
        plan, distillation = flux.PLAN, flux.DISTILLATION
        if self.start:
            load_weights(parts.modules, self.start / "flux")
            plan, distillation = flux.FURTHER, flux.FURTHER_DISTILLATION
        first = flux.train(parts, plan, latents, words, self.work, self.minutes)
        self._whole("flux", plan, first)
        second = flux.distil(parts, distillation, latents, words, self.work, self.minutes)
        self._whole("distillation of flux", distillation, second)
        self.save_facts("flux", self._earlier("flux") | {"pretraining": first, "distillation": second})
        self._publish("flux", parts.pipeline(self.vae()).to("cpu", torch.float16).save_pretrained)

    def make_unet(self, kind: unet.Kind) -> None:
        """Train and publish the SD 1.5 or the SDXL model."""
        latents = self.latents()
        torch.manual_seed(0)
        parts = unet.Parts(kind, self.work / kind.name, self.device)
        plan = kind.plan
        if self.start:
            load_weights(parts.modules, self.start / kind.name)
            plan = kind.further
        facts = self._whole(kind.name, plan, unet.train(parts, plan, latents, words, self.work, self.minutes))
        self.save_facts(kind.name, self._earlier(kind.name) | {"pretraining": facts})
        self._publish(kind.name, parts.pipeline(self.vae()).to("cpu", torch.float16).save_pretrained)

    def make_report(self) -> None:
        """Measure all published models; write metrics.json and the model cards."""
        from diffusers import DiffusionPipeline

        families = [name for name in TITLES if (self.out / name / "model_index.json").is_file()]
        if not (self.out / "scorer" / "config.json").is_file():
            raise Refused(
                f"the report needs the scorer, and {self.out} has none; make it with --parts scorer"
            )
        if not families:
            raise Refused(f"there is no model to report on in {self.out}; make one with --parts flux")
        judge = scorer.load(self.out / "scorer").to(self.device)
        metrics = {"scorer": self.load_facts("scorer"), "vae": self.load_facts("vae")}
        psnr = ", ".join(
            f"{k.removeprefix('psnr ')} {v} dB" for k, v in metrics["vae"].items() if "psnr" in k
        )
        for family in families:
            pipe = DiffusionPipeline.from_pretrained(self.out / family, dtype=torch.float32)
            pipe.to(self.device)
            shares, drawn = report.measure(pipe, judge, report.CALL[family])
            metrics[family] = {"shares": shares, "training": self.load_facts(family), "psnr": psnr}
            Image.fromarray(report.sheet(drawn[:96])).save(self.work / f"{family}.png")
            card = report.card(family, TITLES[family], metrics[family])
            (self.out / family / "README.md").write_text(card, encoding="utf-8")
            print(family, json.dumps(shares), flush=True)
        (self.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")

    def _publish(self, name: str, save) -> None:
        with atomic_folder(self.out / name) as part:
            save(part)

    def make(self, part: str) -> None:
        """Make one of `PARTS`."""
        torch.manual_seed(0)
        if part in ("sd15", "sdxl"):
            self.make_unet({"sd15": unet.SD15, "sdxl": unet.SDXL}[part])
        else:
            getattr(self, f"make_{part}")()


def words(i: int, rng: np.random.Generator) -> str:
    """Return a training caption of latent number i."""
    scenes = seen_scenes()
    return training_caption(scenes[i % len(scenes)], rng)


def checked(options: argparse.Namespace) -> list[str]:
    """Return the parts to make, in order. Raises `Refused` for options that cannot work."""
    chosen = [part.strip() for part in options.parts.split(",")]
    for part in chosen:
        if part not in PARTS:
            raise Refused(
                f"--parts {part!r} is unknown{nearest(part, PARTS)}; choose from {', '.join(PARTS)}"
            )
    if options.minutes is not None and not options.minutes > 0:
        raise Refused(f"--minutes {options.minutes:g} leaves no time; give more than 0, or leave it out")
    try:
        torch.zeros(1, device=options.device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a missing device
        reason = str(error).splitlines()[0]
        raise Refused(f"--device {options.device} cannot be used ({reason}); try cpu") from error
    if not draw.FONT.is_file() and chosen != ["report"]:
        raise Refused(
            f"the font {draw.FONT} does not exist; install Noto Color Emoji (apt install "
            "fonts-noto-color-emoji) or set GLYPH_WORLD_FONT to its file"
        )
    writable_folder(options.work, "--work")
    writable_folder(options.out, "--out")
    return [part for part in PARTS if part in chosen]


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--parts", default=",".join(PARTS), help=f"parts to make, separated by commas: {', '.join(PARTS)}"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("demo_output/models"), help="folder of pictures and checkpoints"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "assets/demo", help="folder of the finished models"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--minutes",
        type=float,
        help="stop each training after this many minutes; repeat the command to resume",
    )
    parser.add_argument(
        "--start",
        type=Path,
        help="folder of finished models, such as assets/demo: train their weights further, with fewer steps",
    )
    options = parser.parse_args(argv)
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # warns of missing CPU kernels, which are not used here
    try:
        chosen = checked(options)
        shop = Workshop(options.work, options.out, options.device, options.minutes, options.start)
        for part in chosen:
            shop.make(part)
    except Stopped as stopped:
        sys.exit(str(stopped))
    except Refused as refused:
        sys.exit(f"error: {refused}")


if __name__ == "__main__":
    main()
