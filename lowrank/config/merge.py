"""The command line of the script that merges adapters and draws with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lowrank.config.command_line import CommandLine, Parsed
from lowrank.config.flag import comma_floats, comma_words, option, path
from lowrank.config.sd import SAMPLERS
from lowrank.errors import Refused

# The rules of --merge, and the flags that each of them uses.
RULES: Mapping[str, tuple[str, ...]] = {
    "sum": (),
    "delta_r": (),
    "concat": (),
    "svd": ("merge_rank",),
    "magnitude_prune": ("merge_rank", "merge_density"),
    "dare_linear": ("merge_rank", "merge_density", "merge_seed"),
    "ties": ("merge_rank", "merge_density", "merge_sign"),
    "dare_ties": ("merge_rank", "merge_density", "merge_sign", "merge_seed"),
    "orthogonal": ("merge_projection",),
    "blora": (),
    "klora": ("merge_top", "merge_alpha", "merge_beta"),
    "ziplora": (
        *("merge_steps", "merge_lr", "merge_overlap", "merge_seed"),
        *("style_prompt", "content_prompt"),
    ),
}
RULE_FLAGS = tuple(dict.fromkeys(flag for flags in RULES.values() for flag in flags))


@dataclass(frozen=True)
class Merge:
    """Merging and sampling"""

    model_path: str = path(
        "",
        "folder of a diffusers FLUX, SD or SDXL, its hub id, or an SD or SDXL checkpoint file",
        required=True,
    )
    style_lora_path: str = path("", "adapter of the style", required=True)
    content_lora_path: str = path("", "adapter of the content", required=True)
    residual_path: str | None = path(None, "residual file; not needed, but checked if given")
    output_dir: str = path("", "folder for images and merged adapters", required=True)
    prompt: str | None = option(None, "prompt of the pictures; needed unless --skip_images")
    style_weights: tuple[float, ...] = option(
        (1.0,), "comma list of style strengths", convert=comma_floats, low=-1e6, high=1e6
    )
    content_weights: tuple[float, ...] = option(
        (1.0,),
        "comma list of content strengths; every pair of both lists is drawn",
        convert=comma_floats,
        low=-1e6,
        high=1e6,
    )
    style_blocks: str | None = option(
        None, 'strengths of the style\'s layers by name: "up_blocks -> 0.5; mid_block -> 0", others 1'
    )
    content_blocks: str | None = option(
        None, 'strengths of the content\'s layers by name: "up_blocks -> 0.5; mid_block -> 0", others 1'
    )
    merge: str = option(
        "sum",
        "rule by which the changes of the adapters become one, see docs/merging.md",
        choices=tuple(RULES),
    )
    merge_rank: int | None = option(
        None, "rank of the merged layers after an SVD (unset: the largest rank of the adapters)", low=1
    )
    merge_density: float = option(
        0.5, "share of the elements of each change that ties, dare and magnitude_prune keep", above=0, high=1
    )
    merge_sign: str = option(
        "total",
        "how ties elects the sign of an element: by the total of its values, or by the frequency of signs",
        choices=("total", "frequency"),
    )
    merge_seed: int = option(0, "seed of the random choices of dare and ziplora", low=0, high=2**63 - 1)
    merge_projection: float = option(
        1.0, "share of the overlap with the style that orthogonal takes from the content", low=0, high=1
    )
    merge_top: int | None = option(
        None, "number of largest elements that klora sums (unset: the product of both ranks)", low=1
    )
    merge_alpha: float = option(1.5, "growth of the style's share over the steps, for klora", above=0)
    merge_beta: float = option(0.5, "the style's share at the first step, for klora", low=0)
    merge_steps: int = option(100, "training steps of ziplora's coefficients", low=1, high=100_000)
    merge_lr: float = option(0.01, "learning rate of ziplora's coefficients", above=0)
    merge_overlap: float = option(0.01, "weight of ziplora's term for columns that both adapters use", low=0)
    style_prompt: str | None = option(
        None, "prompt that the style adapter was trained with; needed for --merge ziplora"
    )
    content_prompt: str | None = option(
        None, "prompt that the content adapter was trained with; needed for --merge ziplora"
    )
    more_loras: tuple[str, ...] = option(
        (), "comma list of further adapters at fixed strengths: a.safetensors=0.7", convert=comma_words
    )
    negative_prompt: str | None = option(None, "prompt of what the pictures should not show; not for FLUX")
    num_inference_steps: int = option(50, "denoising steps", low=1, high=1000, aliases=("--num_steps",))
    guidance_scale: float | None = option(
        None,
        "strength of the prompt: distilled guidance for FLUX (unset: 3.5), CFG for SD (unset: 7.5)",
        low=0,
    )
    sample_sampler: str | None = option(
        None, "sampler of the pictures (unset: ddim); not for FLUX", choices=SAMPLERS
    )
    clip_skip: int | None = option(
        None,
        "condition on the text encoder's n-th last layer, as in training; for SD 1.x and 2.x",
        low=1,
        high=12,
    )
    tokenizer_cache_dir: str | None = path(
        None, "folder of tokenizers for a model in a single file, each in <folder>/<hub id with / as _>"
    )
    height: int | None = option(None, "height of the images (unset: the model's own)", unit="pixels", low=8)
    width: int | None = option(None, "width of the images (unset: the model's own)", unit="pixels", low=8)
    num_images: int = option(1, "images for each pair of strengths", low=1, high=10_000)
    max_sequence_length: int | None = option(
        None, "length of T5 prompts (unset: 512, schnell 256); for FLUX", low=1, high=512
    )
    seed: int = option(0, "seed of the first image of every pair of strengths", low=0, high=2**63 - 1)
    dtype: str = option("fp32", "precision of the model", choices=("fp32", "fp16", "bf16"))
    device: str | None = option(None, "device for drawing (unset: the GPU if there is one)")
    style_reference: str | None = path(
        None, "picture that the style was learned from, shown on the contact sheet"
    )
    content_reference: str | None = path(
        None, "picture that the content was learned from, shown on the contact sheet"
    )
    strict: bool = option(False, "refuse files with tensors that are not used, instead of listing them")
    save_merged: bool = option(False, "write the merged adapter of each pair too")
    at_timestep: float | None = option(
        None,
        "timestep at which T-LoRAs become plain LoRAs, 0 (picture) to 1000 (noise); needed to merge T-LoRAs",
        low=0,
        high=1000,
    )
    skip_images: bool = option(False, "draw no pictures, only write the adapters of --save_merged")


def check_merge(parsed: Parsed[Merge]) -> Iterator[str]:
    """Refuse a call without a prompt if images are drawn, and a call that writes nothing."""
    merge = parsed.options
    if merge.skip_images and not merge.save_merged:
        raise Refused("--skip_images without --save_merged leaves nothing to do; give --save_merged")
    if not merge.prompt and not merge.skip_images:
        raise Refused("no prompt; give --prompt TEXT, or --skip_images with --save_merged")
    idle = [name for name in RULE_FLAGS if name in parsed.given and name not in RULES[merge.merge]]
    if idle:
        flags = ", ".join(parsed.flag(name) for name in RULES[merge.merge]) or "no such flag"
        raise Refused(
            f"{parsed.flag(idle[0])} has no effect with --merge {merge.merge}, which uses {flags}; leave "
            "it out"
        )
    if merge.merge == "ziplora" and not (merge.style_prompt and merge.content_prompt):
        raise Refused("--merge ziplora needs --style_prompt and --content_prompt; give both")
    yield from ()


INFERENCE_MERGE = CommandLine(
    "inference_merge.py",
    "Draw a style and a content adapter together, in every pair of strengths.",
    Merge,
    check=check_merge,
)
