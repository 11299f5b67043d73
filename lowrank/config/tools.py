"""The command lines of the scripts that do not train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lowrank.config.command_line import CommandLine, Parsed
from lowrank.config.flag import option, path
from lowrank.errors import Refused
from lowrank.naming.keys import IMPORTED
from lowrank.naming.places import FAMILIES


@dataclass(frozen=True)
class Residual:
    """Residual file"""

    model_path: str = path("", "folder of a diffusers FLUX, or its hub id", required=True)
    output_dir: str = path("", "folder of flux_residual_weights.safetensors", required=True)
    rank: int = option(64, "rank of the adapters that the residual file is for", low=1)
    dtype: str = option("fp16", "precision of the residual", choices=("fp32", "fp16", "bf16"))
    device: str | None = option(None, "device for computing the bases (unset: the GPU if there is one)")
    basis_cache_dir: str | None = path(None, "folder that caches the QR bases")


@dataclass(frozen=True)
class Similarity:
    """Adapters to compare"""

    lora1_path: str = path("", "first adapter file", required=True)
    lora2_path: str = path("", "second adapter file", required=True)
    lora1_name: str = option("style", "name of the first adapter in plots and summary")
    lora2_name: str = option("content", "name of the second adapter in plots and summary")
    output_dir: str = path("deltaR_similarity_analysis", "folder for plots, JSON and summary")
    fixed_scale: bool = option(False, "no effect: plots of fixed and of automatic scale are both written")


@dataclass(frozen=True)
class UniversalBasis:
    """Basis of a collection"""

    lora_dir: tuple[str, ...] = path(
        (), "folders of LoRA files, read with everything below them, or single files", required=True
    )
    output: str = path("", "basis file to write; it ends in .safetensors", required=True)
    report: str | None = path(None, "JSON file for the printed table and all counts")
    rank: int = option(16, "largest number of directions for each layer", low=1)
    tau: float = option(
        0.9, "share of each side's energy to keep, by the fewest directions that reach it", above=0, high=1
    )
    center: bool = option(False, "subtract the mean LoRA first, so that it is not one of the directions")
    normalize: bool = option(False, "give every LoRA equal weight, whatever its strength")
    sketch: int | None = option(
        None,
        "columns kept for each layer and side when twice as many have been collected (unset: 4 × --rank)",
        low=1,
    )


class RankChoice(NamedTuple):
    """Ranks of a written adapter: `most`, or those that `method` finds with `target`, `most` at most."""

    method: str
    target: float
    most: int | None


_AUTO = ("sv_ratio", "sv_fro", "sv_cumulative")  # as in kohya's resize_lora.py


def rank_choice(text: str) -> RankChoice:
    """`8` as the rank 8; `auto:sv_fro=0.9,max=32` as the ranks that keep 90 % of each ‖ΔW‖, 32 at most."""
    parts = (word.partition("=") for word in text.removeprefix("auto:").split(","))
    words = {name: value for name, _, value in parts}
    try:
        if not text.startswith("auto:"):
            choice = RankChoice("fixed", 0.0, int(text))
        else:
            most = int(words.pop("max")) if "max" in words else None
            ((method, target),) = words.items()
            choice = RankChoice(method, float(target), most)
    except ValueError as error:
        raise Refused(
            f"{text!r} is no rank; give a whole number, or e.g. auto:sv_fro=0.9, auto:sv_ratio=20, "
            "auto:sv_cumulative=0.9,max=32"
        ) from error
    if choice.method not in ("fixed", *_AUTO):
        raise Refused(f"{text!r} names {choice.method}; give one of {', '.join(_AUTO)}")
    return choice


_PRECISIONS = ("fp32", "fp16", "bf16")
FORMATS = ("kohya", "diffusers", "peft", "lycoris", "qrlora", "lycoris-tlora", "merged")


@dataclass(frozen=True)
class Export:
    """Adapter to export"""

    source: str = path("", "adapter file of any method and of any program", required=True)
    target: str = path(
        "",
        "file to write; a folder for --to peft, and for --to merged where the base is a folder",
        required=True,
    )
    to: str = option("kohya", "format of the file that is written", choices=FORMATS)
    model: str | None = path(None, "base model: folder of a diffusers model, or one checkpoint file")
    dtype: str | None = option(
        None, "precision of the written file (unset: as in the source)", choices=_PRECISIONS
    )
    rank: tuple[str, float, int | None] | None = option(
        None,
        "reduce every layer by SVD and print what is lost: a largest rank, or ranks by singular values as "
        "kohya's resize_lora.py has them (auto:sv_ratio=20, auto:sv_fro=0.9, auto:sv_cumulative=0.9; with "
        ",max=32 a largest rank too). LoKr, LoHa and other kinds become the nearest LoRA",
        convert=rank_choice,
    )
    parts: str = option("all", "layers to export", choices=("all", "unet", "text"))
    family: str | None = option(
        None, "kind of model, if the layers of the file fit several", choices=FAMILIES, aliases=("--base",)
    )
    strict: bool = option(False, "refuse a file with tensors that are not used, instead of listing them")
    dora_norm: str = option(
        "merged",
        "what a DoRA's reader divides by: row norms of W + ΔW (merged: LyCORIS), or of W (base: ComfyUI)",
        choices=("merged", "base"),
    )
    at_timestep: float | None = option(
        None,
        "timestep at which a T-LoRA becomes a plain LoRA, 0 (picture) to 1000 (noise)",
        aliases=("--at-timestep",),
    )
    calibrate: str | None = path(
        None,
        "file of prompts (.txt, .toml, .json) for an adapter with several experts: --model draws them, "
        "the LoRA nearest to the adapter over all steps is exported, and its error is printed",
    )
    strength: float = option(1.0, "factor of the ΔW that --to merged adds to the weights")
    verify: str = option(
        "auto",
        "read the file back by the program it is for: layer by layer, or one forward of the model (auto: "
        "forward where --model is given, except for --to merged)",
        choices=("auto", "layers", "forward", "off"),
    )


@dataclass(frozen=True)
class ExtractAdapter:
    """Adapter to extract"""

    model: str = path(
        "", "base: folder of a diffusers model, or one checkpoint file in safetensors", required=True
    )
    tuned: str = path("", "fine-tuned checkpoint of the same model, folder or file", required=True)
    target: str = path("", "file to write; a folder for --to peft", required=True)
    to: str = option(
        "kohya", "format of the file that is written", choices=("kohya", "diffusers", "peft", "lycoris")
    )
    rank: tuple[str, float, int | None] | None = option(
        None,
        "rank of each layer (unset: 64): a number, or by singular values as kohya's resize_lora.py has them "
        "(auto:sv_fro=0.9 keeps 90 % of each ‖ΔW‖; also sv_ratio, sv_cumulative; ,max=32: at most 32)",
        convert=rank_choice,
    )
    min_change: float = option(
        0.0, "leave out layers whose ‖ΔW‖ is at most this share of the weight's ‖W‖", low=0
    )
    parts: str = option("all", "components to compare", choices=("all", "unet", "text"))
    dtype: str | None = option(None, "precision of the written file (unset: fp32)", choices=_PRECISIONS)
    base: str | None = option(None, "kind of model, if the names of the layers fit several", choices=FAMILIES)
    strict: bool = option(False, "refuse checkpoints that differ in norm layers, biases or embeddings too")


@dataclass(frozen=True)
class ImportAdapter:
    """Adapter to import"""

    source: str = path(
        "",
        "LoRA or DoRA of kohya, diffusers, PEFT (its folder) or LyCORIS; official QR-LoRA",
        required=True,
    )
    target: str = path("", "native .safetensors file to write", required=True)
    method: str = option(
        "auto",
        "method of the native file (auto: the method that the tensors of the source show)",
        choices=("auto", *IMPORTED, "tlora"),
    )
    tlora_min_rank: int | None = option(
        None, "number of ranks that a T-LoRA opens at pure noise, if the file does not state it", low=1
    )
    tlora_alpha: float | None = option(
        None, "exponent of the schedule of --tlora_min_rank (unset: 1)", above=0
    )
    model: str | None = path(
        None, "base model; needed for a basis, an official QR-LoRA file, and a DoRA without row lengths"
    )
    rank: int | None = option(None, "rank of the basis (unset: the rank of the adapter)", low=1)
    basis_dtype: str | None = option(
        None,
        "precision the base is trained in, which a basis depends on (unset: as it is stored)",
        choices=_PRECISIONS,
    )
    basis_cache_dir: str | None = path(None, "folder that caches the QR bases")
    dtype: str | None = option(
        None, "precision of the written file (unset: as in the source)", choices=_PRECISIONS
    )
    family: str | None = option(
        None, "kind of model, if the layers of the file fit several", choices=FAMILIES, aliases=("--base",)
    )
    strict: bool = option(False, "refuse a file with tensors that are not used, instead of listing them")


@dataclass(frozen=True)
class Inspect:
    """Files to inspect"""

    files: tuple[str, ...] = path((), "adapter files of any program, or folders of PEFT", required=True)
    model: str | None = path(
        None, "base model, to measure the ΔW of OFT, GLoRA, IA3 and LoKr with DoRA, which depends on it"
    )
    json: bool = option(False, "print everything as one JSON document")
    layers: bool = option(False, "print a line for each layer instead of each block")
    metadata: bool = option(False, "print the file's metadata verbatim")
    strict: bool = option(False, "refuse files with tensors that no tool of this program uses")


def check_basis(parsed: Parsed[UniversalBasis]) -> Iterator[str]:
    """Refuse a file name that networks cannot open, and a sketch smaller than the rank."""
    basis = parsed.options
    if basis.output and not basis.output.endswith(".safetensors"):
        raise Refused(f"--output {basis.output} does not end in .safetensors; give such a name")
    if basis.sketch and basis.sketch < basis.rank:
        raise Refused(
            f"--sketch {basis.sketch} is below --rank {basis.rank}; give {4 * basis.rank} or leave it out"
        )
    yield from ()


def check_rank(parsed: Parsed[Export] | Parsed[ExtractAdapter]) -> Iterator[str]:
    """Refuse a rank below 1, and a target outside of its method's limits."""
    if parsed.options.rank is None:
        return
    method, target, most = parsed.options.rank
    if most is not None and most < 1:
        raise Refused(f"--rank {most} is below 1; give 1 or more")
    if method == "sv_ratio" and target <= 1:
        raise Refused(f"--rank auto:sv_ratio={target:g} is not above 1; give e.g. 20")
    if method in _AUTO[1:] and not 0 < target <= 1:
        raise Refused(f"--rank auto:{method}={target:g} is not above 0 and at most 1; give e.g. 0.9")
    yield from ()


SAVE_RESIDUAL = CommandLine(
    "save_flux_residual.py",
    "Write W − QR of every adapted layer of FLUX, for programs based on the published QR-LoRA code.",
    Residual,
)

VISUALIZE_SIMILARITY = CommandLine(
    "visualize_similarity.py",
    "Compare two adapters layer by layer: plots, JSON and a text summary.",
    Similarity,
)

EXTRACT_BASIS = CommandLine(
    "tools/extract_universal_basis.py",
    "Find the directions that a collection of LoRAs shares, for networks that train inside a basis.",
    UniversalBasis,
    ignored=("device", "vram_fraction", "num_workers", "chunk_size"),
    check=check_basis,
)

EXPORT = CommandLine(
    "tools/export_lora.py",
    "Write an adapter as a file of another program, and read it back.",
    Export,
    positional=("source", "target"),
    check=check_rank,
)

EXTRACT_LORA = CommandLine(
    "tools/extract_lora.py",
    "Write the adapter that is nearest to the difference of two checkpoints.",
    ExtractAdapter,
    positional=("model", "tuned", "target"),
    check=check_rank,
)

IMPORT = CommandLine(
    "tools/import_lora.py",
    "Write another program's adapter as a native file.",
    ImportAdapter,
    positional=("source", "target"),
)

INSPECT = CommandLine(
    "tools/inspect_lora.py",
    "Print what adapter files contain, and what differs between two files.",
    Inspect,
    positional=("files",),
)
