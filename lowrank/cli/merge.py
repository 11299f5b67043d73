"""Style × content from the command line: a grid of pictures, an XY sheet, a merged adapter."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from lowrank.adapter_file import check_base
from lowrank.adapters.targets import find
from lowrank.cli.base_model import base, model_family, own_side
from lowrank.combine.columns import recorded
from lowrank.combine.mixture import AttachedMixture, Entry, Mixture, read_mixture, shares
from lowrank.combine.rules import RULES, SUM, Merging, RuleOptions
from lowrank.config.command_line import Parsed
from lowrank.config.merge import INFERENCE_MERGE, Merge
from lowrank.data import images
from lowrank.errors import Refused
from lowrank.files import writable_folder
from lowrank.formats.base_checkpoint import BaseCheckpoint
from lowrank.formats.read import refuse_masked
from lowrank.formats.residual import check_residual, residual_file
from lowrank.models.contact_sheet import sheet
from lowrank.models.family import Family, Models
from lowrank.models.flux import FLUX, FluxOptions
from lowrank.models.sd import SdOptions
from lowrank.models.single import SUFFIXES
from lowrank.naming.places import places
from lowrank.train.preview import save_png
from lowrank.train.text_conditions import TextConditions

logger = logging.getLogger(__name__)

_CFG = 7.5  # strength of the prompt for SD, as in the stock pipeline
_ONLY_SD = ("negative_prompt", "sample_sampler", "clip_skip", "tokenizer_cache_dir")
_ONLY_FLUX = ("max_sequence_length", "residual_path")


def main(argv: list[str] | None = None) -> int:
    """Draw every (α, β), write the sheet, save what was asked for. Raises `Refused`."""
    parsed = INFERENCE_MERGE.parse(argv)
    options = parsed.options
    logging.basicConfig(level="INFO", format="%(message)s")
    names = _names(options)
    source = base(options.model_path, options.dtype, options.device, options.tokenizer_cache_dir)
    if options.residual_path:
        residual_file(options.residual_path)
    references = {
        what: images.read_image(picture, way_out=f"give another --{what}_reference, or leave it out")
        for what in ("style", "content")
        if (picture := getattr(options, f"{what}_reference"))
    }
    folder = writable_folder(options.output_dir)
    mixture = _read(options, source)
    if options.strict:
        for adapter in mixture.adapters:
            adapter.refuse_unused()
    if options.save_merged:
        refuse_masked(mixture.adapters)
    extra = [strength for _, strength in _more(options.more_loras)]
    family = model_family(source)
    switches = _switches(parsed, family)
    print(mixture.describe())
    models = family.load(source, ())
    _check_sides(options, family.bucket_step(models))
    _check_base(mixture, family, models)
    # text first, and gone before the denoiser comes: the peak is the denoiser, not the sum
    studio = None
    if not options.skip_images or mixture.rule.learned:
        studio = Studio(options, family, models, switches, mixture.adapts_text)
    if options.residual_path:
        _check_residual(options.residual_path, mixture, family, models)
    if studio is not None:
        attached = studio.attach(mixture)
        if mixture.rule.learned:
            _learn(options, attached, studio)
        if not options.skip_images:
            _draw(options, mixture, attached, studio, folder, names, references)
    if options.save_merged:
        for pair, name in names.items():
            path = folder / f"merged_{name}.safetensors"
            mixture.save(path, (*pair, *extra), {"lowrank.command": parsed.command})
            print(path)
    print(mixture.usage())
    return 0


def _read(options: Any, source: Any) -> Mixture:
    """The adapters, held against the layers of the model where its files are on this machine."""
    stored = functools.cache(lambda: BaseCheckpoint(options.model_path))
    local = Path(options.model_path).is_dir() or Path(options.model_path).suffix in SUFFIXES
    return read_mixture(
        _parts(options),
        options.at_timestep,
        # as LyCORIS would find it
        lambda module: stored().stored(places(module, stored().per_block)[0][0], source.dtype),
        stored().places() if local else (),
        _merging(options),
    )


def _merging(options: Merge) -> Merging:
    """The rule of --merge with its numbers."""
    numbers = RuleOptions(
        rank=options.merge_rank,
        density=options.merge_density,
        sign=options.merge_sign,
        seed=options.merge_seed,
        projection=options.merge_projection,
        top=options.merge_top,
        alpha=options.merge_alpha,
        beta=options.merge_beta,
        steps=options.merge_steps,
        rate=options.merge_lr,
        penalty=options.merge_overlap,
    )
    return Merging(RULES[options.merge], numbers)


def _names(options: Any) -> dict[tuple[float, float], str]:
    """Every pair of strengths and the part of file names that tells it from the others."""
    grid = [(a, b) for a in options.style_weights for b in options.content_weights]
    if len(set(grid)) < len(grid):
        raise Refused(
            "a pair of strengths is listed twice; give each once in --style_weights, --content_weights"
        )
    # two decimals where they do, else as many as are needed; 17 digits tell any two numbers apart
    for spec in [*(f".{decimals}f" for decimals in range(2, 17)), ".17g"]:
        names = [f"s{a:{spec}}_c{b:{spec}}" for a, b in grid]
        if len(set(names)) == len(grid):
            break
    return dict(zip(grid, names, strict=True))


def _more(given: tuple[str, ...]) -> list[tuple[Path, float]]:
    """--more_loras as files and strengths; without a strength it is 1."""
    adapters = []
    for text in given:
        path, equals, strength = text.rpartition("=")
        try:
            adapters.append((Path(path), float(strength)) if equals else (Path(text), 1.0))
        except ValueError as error:
            raise Refused(
                f"--more_loras {text!r} does not end in a number; write FILE=0.7, "
                "or FILE=1 for a file name with ="
            ) from error
    return adapters


def _parts(options: Any) -> list[Entry]:
    """The adapters: style, content, and the others."""
    return [
        Entry(Path(options.style_lora_path), shares(options.style_blocks)),
        Entry(Path(options.content_lora_path), shares(options.content_blocks)),
        *(Entry(path) for path, _ in _more(options.more_loras)),
    ]


def _check_sides(options: Any, step: int) -> None:
    for side in ("height", "width"):
        if (getattr(options, side) or 0) % step:
            raise Refused(f"--{side} {getattr(options, side)} is not a multiple of {step}; give one that is")


def _check_residual(path: str, mixture: Mixture, family: Family, models: Models) -> None:
    family.add(models, ("denoiser",))
    hosts = {t.native.removeprefix("transformer."): t.module for t in find("unet", models.denoiser)}
    checked = [
        check_residual(path, {a.name(p): roles for p, roles in a.raw.items()}, a.metadata, hosts)
        for a in mixture.adapters
    ]
    print("\n".join(dict.fromkeys(checked)))


def _switches(parsed: Parsed[Merge], family: Family) -> Any:
    """The family's options; a flag that is another family's is refused."""
    options = parsed.options
    foreign = _ONLY_SD if family is FLUX else _ONLY_FLUX
    for name in foreign:
        if parsed.value(name) is not None:
            raise Refused(f"{parsed.flag(name)} is not for {family.name}; leave it out")
    if family is not FLUX:
        return SdOptions(clip_skip=options.clip_skip)
    strength: dict[str, Any] = (
        {} if options.guidance_scale is None else {"guidance_scale": options.guidance_scale}
    )
    return FluxOptions(t5xxl_max_token_length=options.max_sequence_length, **strength)


class Studio:
    """A model that draws pictures with the adapters of a mixture."""

    def __init__(
        self, options: Merge, family: Family, models: Models, switches: Any, adapts_text: bool
    ) -> None:
        self.options, self.family, self.models, self.switches = options, family, models, switches
        self.negative = None if family is FLUX else options.negative_prompt or ""
        prompts = (options.prompt, self.negative, options.style_prompt, options.content_prompt)
        captions = [prompt for prompt in prompts if prompt is not None]
        self._text = TextConditions(family, models, switches, captions, adapts_text)

    def attach(self, mixture: Mixture) -> AttachedMixture:
        """Load the other parts of the model, and attach the adapters at strength 0."""
        models = self.models
        self.family.add(models, ("denoiser",))
        attached = mixture.attach(models.denoiser, models.text_encoders, models.source.dtype)
        self.family.add(models, ("vae",))
        native = own_side(models)
        self.height, self.width = self.options.height or native, self.options.width or native
        return attached

    def draw(self, prompt: str, seed: int) -> Image.Image:
        """One picture of a prompt, at the strengths that are set."""
        options = self.options
        strength = _CFG if options.guidance_scale is None else options.guidance_scale
        with torch.no_grad():
            positive = self._text([prompt])
            negative = None if self.negative is None else self._text([self.negative])
        return self.family.sample(
            self.models,
            positive,
            self.switches,
            height=self.height,
            width=self.width,
            steps=options.num_inference_steps,
            generator=torch.Generator().manual_seed(seed),
            negative=negative,
            scale=1.0 if negative is None else strength,
            sampler=options.sample_sampler,
        )[0]


def _learn(options: Merge, attached: AttachedMixture, studio: Studio) -> None:
    """Train ZipLoRA's coefficients on what each adapter alone makes of its own prompt."""
    denoiser, calls = studio.models.denoiser, []
    for position, prompt in enumerate((options.style_prompt, options.content_prompt)):
        assert prompt is not None  # the command line needs both
        attached.set([float(i == position) for i in range(2)])
        with recorded(denoiser) as answers:
            studio.draw(prompt, options.seed)
        calls.append(answers)
    losses = attached.learn(denoiser, calls)
    print(f"ziplora: {len(losses)} steps, loss {losses[0]:.4g} at the first and {losses[-1]:.4g} at the last")


def _draw(
    options: Merge,
    mixture: Mixture,
    attached: AttachedMixture,
    studio: Studio,
    folder: Path,
    names: dict[tuple[float, float], str],
    references: dict[str, Image.Image],
) -> None:
    assert options.prompt is not None  # the command line needs it for pictures
    cells: dict[tuple[float, float], Image.Image] = {}
    for pair, name in tqdm(names.items(), desc="images"):
        attached.set((*pair, *(strength for _, strength in _more(options.more_loras))))
        for copy in range(options.num_images):
            seed = options.seed + copy
            image = studio.draw(options.prompt, seed)
            path = folder / (f"inference_{name}.png" if copy == 0 else f"inference_{name}_{copy}.png")
            save_png(path, image, _settings(mixture, pair, seed, studio))
            cells.setdefault(pair, image)
    path = folder / "sheet.png"
    title = f"{options.prompt}    (seed {options.seed}, {options.num_inference_steps} steps)"
    save_png(
        path,
        sheet(cells, title, references),
        f"{options.prompt}\nrows: style {options.style_weights}, columns: content {options.content_weights}",
    )
    print(f"{len(cells)} pairs of strengths; the sheet of all is {path}")


def _check_base(mixture: Mixture, family: Family, models: Models) -> None:
    """Refuse adapters with a basis of another base; warn of others that were made on another base."""
    for adapter in mixture.adapters:
        check_base(
            adapter.source,
            adapter.metadata,
            lambda: family.model_hash(models, "denoiser"),
            "give the model it was trained on with --model_path",
        )


def _settings(mixture: Mixture, pair: tuple[float, float], seed: int, studio: Studio) -> str:
    options, switches = studio.options, studio.switches
    style, content, *more = (adapter.path for adapter in mixture.adapters)
    strengths = [strength for _, strength in _more(options.more_loras)]
    also = "".join(f"Adapter: {p.name} × {w:g}, " for p, w in zip(more, strengths, strict=True))
    if isinstance(switches, FluxOptions):
        strength = f"Guidance: {switches.guidance_scale:g}"
    else:
        scale = _CFG if options.guidance_scale is None else options.guidance_scale
        strength = f"Sampler: {options.sample_sampler or 'ddim'}, CFG scale: {scale:g}"
    against = f"\nNegative prompt: {options.negative_prompt}" if options.negative_prompt else ""
    rule = "" if mixture.rule is SUM else f"Merge: {mixture.rule.name}, "
    return (
        f"{options.prompt}{against}\nSteps: {options.num_inference_steps}, {strength}, "
        f"Seed: {seed}, Size: {studio.width}x{studio.height}, Style: {style.parent.name}/{style.name} × "
        f"{pair[0]:g}, Content: {content.parent.name}/{content.name} × {pair[1]:g}, {also}{rule}"
        f"Precision: {options.dtype}, Model: {options.model_path}"
    )
