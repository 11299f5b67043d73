"""The layers of kohya sd-scripts' networks.lora_flux: which are adapted, with which rank and learning rate.

The argument names and rules are kohya's. kohya's FLUX has Black Forest Labs' layers, of which some are
several in diffusers: `img_attn.qkv` is to_q, to_k and to_v. Patterns are searched in kohya's names, as
`lora_unet_double_blocks_0_img_attn_qkv`, and all layers of one such name get the same rank and rate.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank.adapters.arguments import Chosen, CommonArguments
from lowrank.adapters.factor import kaiming
from lowrank.adapters.method import Start
from lowrank.adapters.rates import Speed
from lowrank.adapters.targets import SYNONYMS, Target, find, find_all
from lowrank.errors import Refused, nearest
from lowrank.naming import flux as flux_names
from lowrank.naming import places

logger = logging.getLogger(__name__)
Number = TypeVar("Number", int, float)

BLOCKS = {"double": "DoubleStreamBlock", "single": "SingleStreamBlock"}
T5_BLOCKS = ("T5Attention", "T5DenseGatedActDense")
# layers of a block in the order of Black Forest Labs' model, which is the order of their start values
ORDER = (
    *("img_mod.lin", "img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2"),
    *("txt_mod.lin", "txt_attn.qkv", "txt_attn.proj", "txt_mlp.0", "txt_mlp.2"),
    *("linear1", "linear2", "modulation.lin"),
)
INPUTS = ("img_in", "time_in", "vector_in", "guidance_in", "txt_in")  # the order of in_dims
# argument -> the words that kohya's name of a layer has
KINDS = {
    "img_attn_dim": ("img_attn",),
    "txt_attn_dim": ("txt_attn",),
    "img_mlp_dim": ("img_mlp",),
    "txt_mlp_dim": ("txt_mlp",),
    "img_mod_dim": ("img_mod",),
    "txt_mod_dim": ("txt_mod",),
    "single_dim": ("single_blocks", "linear"),
    "single_mod_dim": ("modulation",),
}


@dataclass(frozen=True)
class FluxLayers:
    """The arguments of kohya's networks.lora_flux that choose layers, ranks and learning rates."""

    train_blocks: str = "all"
    """blocks whose layers are adapted: all, double or single"""
    train_double_block_indices: str | None = None
    """double blocks that are adapted: all, none, or numbers and ranges such as 0,3-5"""
    train_single_block_indices: str | None = None
    """single blocks that are adapted: all, none, or numbers and ranges such as 0,3-5"""
    split_qkv: bool = False
    """separate D for q, k, v and the MLP of single blocks; files join them in a layer of 3 or 4 × the rank"""
    train_t5xxl: bool = False
    """adapt T5 too"""
    img_attn_dim: int | None = None
    """rank of img_attn in double blocks; 0 leaves it out"""
    txt_attn_dim: int | None = None
    """rank of txt_attn in double blocks; 0 leaves it out"""
    img_mlp_dim: int | None = None
    """rank of img_mlp in double blocks; 0 leaves it out"""
    txt_mlp_dim: int | None = None
    """rank of txt_mlp in double blocks; 0 leaves it out"""
    img_mod_dim: int | None = None
    """rank of img_mod in double blocks; 0 leaves it out"""
    txt_mod_dim: int | None = None
    """rank of txt_mod in double blocks; 0 leaves it out"""
    single_dim: int | None = None
    """rank of linear1 and linear2 in single blocks; 0 leaves them out"""
    single_mod_dim: int | None = None
    """rank of modulation in single blocks; 0 leaves it out"""
    in_dims: str | None = None
    """ranks of img_in, time_in, vector_in, guidance_in, txt_in, as [4,0,0,0,4] (unset: none is adapted)"""
    network_reg_dims: str | None = None
    """ranks by regular expressions, searched in kohya's layer names: REGEX=4,REGEX=8; the first applies"""
    network_reg_lrs: str | None = None
    """learning rates by regular expressions, searched in kohya's layer names: REGEX=1e-4,REGEX=1e-5"""
    ggpo_beta: float | None = None
    """refused together with ggpo_sigma, without effect alone, as in kohya's module"""
    ggpo_sigma: float | None = None
    """refused together with ggpo_beta, without effect alone, as in kohya's module"""
    verbose: bool = False
    """log the name of each adapted layer"""

    def __post_init__(self) -> None:
        check_choice("train_blocks", self.train_blocks, ("all", *BLOCKS))
        _ = self.inputs, self.dims, self.rates, self.blocks({})  # refuse before a model is loaded
        for name, value in self.kinds().items():
            if value < 0:
                raise Refused(f"network argument {name}={value} is below 0; give 0 or more")
        if self.ggpo_beta is not None and self.ggpo_sigma is not None:
            raise Refused(
                "network arguments ggpo_beta and ggpo_sigma switch GGPO on, which is not supported: it adds "
                "noise of the size of the whole weight to each layer at every step, scaled by norms of "
                "weights and gradients that only kohya's trainer collects; leave both out"
            )

    @property
    def inputs(self) -> dict[str, int]:
        """The ranks of `INPUTS`, 0 for layers that are not adapted."""
        return dict(zip(INPUTS, in_dims(self.in_dims), strict=True))

    @property
    def dims(self) -> dict[str, int]:
        """Ranks by pattern."""
        return reg_pairs("network_reg_dims", self.network_reg_dims, int)

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates by pattern."""
        return reg_pairs("network_reg_lrs", self.network_reg_lrs, float)

    def kinds(self) -> dict[str, int]:
        """The ranks that are given for kinds of layers, by argument."""
        values = vars(self)
        return {name: values[name] for name in KINDS if values[name] is not None}

    def blocks(self, counts: Mapping[str, int]) -> dict[str, set[int]]:
        """The numbers of the adapted blocks by kind, where they are given; `counts`: those of the model."""
        given = {"double": self.train_double_block_indices, "single": self.train_single_block_indices}
        return {
            kind: block_numbers(f"train_{kind}_block_indices", text, counts.get(kind, 0))
            for kind, text in given.items()
            if text is not None
        }

    def rank_of(self, name: str, blocks: Mapping[str, set[int]], rank: int) -> int:
        """Return the rank of a layer of kohya's `name`: by pattern, else by kind and block, else `rank`."""
        for pattern, value in self.dims.items():
            if re.search(pattern, name):
                return value
        for word, value in self.inputs.items():
            if name.startswith(f"lora_unet_{word}"):
                return value
        if not name.startswith("lora_unet_"):
            return rank
        for kind, numbers in blocks.items():
            match = re.match(rf"lora_unet_{kind}_blocks_(\d+)_", name)
            if match and int(match[1]) not in numbers:
                return 0
        ranks = (value for kind, value in self.kinds().items() if all(word in name for word in KINDS[kind]))
        return next(ranks, rank)


def joined_path(path: str) -> str:
    """Return Black Forest Labs' path of a layer; a path that is not of diffusers' FLUX stays."""
    piece = flux_names.joined_rows(path)
    return piece.module if piece else path


def kohya_name(target: Target) -> str:
    """Return kohya's name of a layer: `lora_unet_single_blocks_0_linear1`."""
    return target.name if target.part != "unet" else "lora_unet_" + joined_path(target.path).replace(".", "_")


def share(part: str, path: str, shape: tuple[int, ...]) -> tuple[str, str]:
    """Return the key of a layer's D: the parts of one joined layer have one."""
    return part, joined_path(path)


def choose_layers(
    options: FluxLayers, common: CommonArguments, text_encoder: Any, unet: nn.Module | None, rank: int
) -> Chosen:
    """Return the layers that kohya's module adapts, in its order.

    A `target` among the common arguments replaces kohya's choice of layers of the denoiser. Raises `Refused`
    for a denoiser without FLUX's blocks, and for blocks that it does not have.
    """
    encoders = list(text_encoder) if isinstance(text_encoder, (list, tuple)) else [text_encoder]
    t5 = [encoder for encoder in encoders if type(encoder).__name__ == "T5EncoderModel"]
    chosen = find_all([None if encoder in t5 else encoder for encoder in encoders], None)
    for encoder in t5 if options.train_t5xxl else ():
        chosen += find("te3", encoder, modules=T5_BLOCKS)
    chosen += [] if unet is None else _of_denoiser(options, common, unet)
    counts = {kind: _count(kind, chosen) for kind in BLOCKS}
    blocks, ranks, speeds = options.blocks(counts), {}, {}
    for target in chosen:
        name = kohya_name(target)
        ranks[target.name] = options.rank_of(name, blocks, rank)
        for index, (pattern, rate) in enumerate(options.rates.items()):
            if re.search(pattern, name):
                speeds[target.name] = Speed(f"reg_lr_{index}", rate=rate)
                break
    if options.verbose and not any(target.module.weight.is_meta for target in chosen):
        for name in dict.fromkeys(kohya_name(target) for target in chosen if ranks[target.name]):
            logger.info("\t%s", name)
    return Chosen(chosen, ranks, speeds)


def _of_denoiser(options: FluxLayers, common: CommonArguments, denoiser: nn.Module) -> list[Target]:
    classes = {type(module).__name__ for module in denoiser.modules()}
    known = {name for block in BLOCKS.values() for name in (block, *SYNONYMS[block])}
    if not classes & known:
        raise Refused(
            f"networks.lora_flux adapts the blocks of FLUX, and {type(denoiser).__name__} has none; choose "
            "networks.lora"
        )
    if options.split_qkv and classes & set(BLOCKS.values()):
        raise Refused(
            f"split_qkv=True needs separate layers of q, k and v, and {type(denoiser).__name__} joins them; "
            "leave it out, or train with flux_train_qrlora.py"
        )
    selection = common.selection
    if not selection:
        inputs = [name for name, rank in options.inputs.items() if rank]
        ours = [ours for ours, theirs in flux_names.TOP.items() if theirs.partition(".")[0] in inputs]
        words = "|".join((*map(re.escape, ours), *(rf"{name}\b.*" for name in inputs)))
        selection = {
            "modules": [block for kind, block in BLOCKS.items() if options.train_blocks in ("all", kind)],
            "names": [f"^(?:{words})$"] if inputs else [],
        }
    chosen: Any = selection
    targets = find("unet", denoiser, exclude=common.exclude, **chosen)
    if any(joined_path(target.path) == flux_names.SWAPPED for target in targets):
        raise Refused(
            "target matches norm_out.linear, whose rows have another order in kohya's FLUX; leave it out, or "
            "choose networks.lora"
        )
    return sorted(targets, key=lambda target: _position(target.path))


def _position(path: str) -> tuple[int, int, int, int]:
    """Return the place of a layer in kohya's order: double blocks, single blocks, inputs."""
    joined, piece = joined_path(path), flux_names.joined_rows(path)
    block = re.match(r"(double|single)_blocks\.(\d+)\.(.+)$", joined)
    start = piece.start if piece else 0
    if block is None:
        top = joined.partition(".")[0]
        return 2, INPUTS.index(top) if top in INPUTS else len(INPUTS), int(joined.endswith("out_layer")), 0
    return list(BLOCKS).index(block[1]), int(block[2]), ORDER.index(block[3]), start


def _count(kind: str, targets: Iterable[Target]) -> int:
    numbers = (re.match(rf"{kind}_blocks\.(\d+)\.", joined_path(target.path)) for target in targets)
    return max((int(match[1]) + 1 for match in numbers if match), default=0)


def block_numbers(argument: str, text: str, count: int) -> set[int]:
    """Return the blocks of `all`, `none` or `0,3-5`. Raises `Refused` for a number of `count` or more."""
    words = text.strip()
    if words in ("all", "none", ""):
        return set(range(count)) if words == "all" else set()
    numbers: set[int] = set()
    for part in words.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last:
            raise Refused(
                f"network argument {argument}={text!r} is not all, none, or numbers and ranges such as 0,3-5"
            )
        if count and last >= count:
            raise Refused(
                f"network argument {argument}={text!r} names block {last}, and the blocks that are trained "
                f"are 0 to {count - 1}; correct the number"
            )
        numbers |= set(range(first, last + 1))
    return numbers


def in_dims(text: str | None) -> tuple[int, ...]:
    """Return the ranks of img_in, time_in, vector_in, guidance_in and txt_in: `[4,0,0,0,4]`; 0 is none."""
    words = (text or "0,0,0,0,0").strip().removeprefix("[").removesuffix("]").split(",")
    if len(words) != len(INPUTS) or not all(word.strip().isdecimal() for word in words):
        raise Refused(
            f"network argument in_dims={text!r} is not five ranks, of {', '.join(INPUTS)}; write e.g. "
            "[4,0,0,0,4]"
        )
    return tuple(map(int, words))


def reg_pairs(argument: str, text: str | None, kind: Callable[[str], Number]) -> dict[str, Number]:
    """Return `REGEX=4,REGEX=8` as numbers by pattern. Raises `Refused` for a malformed pair."""
    numbers: dict[str, Number] = {}
    for pair in filter(None, (part.strip() for part in (text or "").split(","))):
        pattern, equals, value = pair.partition("=")
        try:
            re.compile(pattern.strip())
            number = kind(value)
            if not equals or not 0 <= number < float("inf"):
                raise ValueError("it is not a pattern with a number of 0 or more")
        except (re.error, ValueError) as error:
            raise Refused(
                f"network argument {argument} has {pair!r} ({error}); write REGEX=NUMBER, separated by commas"
            ) from error
        numbers[pattern.strip()] = number
    return numbers


def check_choice(argument: str, value: str, choices: Sequence[str]) -> None:
    """Raise `Refused` for a word that is not among the choices of a network argument."""
    if value not in choices:
        raise Refused(
            f"network argument {argument}={value} is not one of {', '.join(choices)}{nearest(value, choices)}"
        )


def start_values(weights: Mapping[str, Tensor], ranks: Mapping[str, int], split: bool) -> Start:
    """Return LoRA's start, drawn as kohya's module draws it: equal seeds give equal values.

    kohya makes two linear layers, whose constructors fill both factors, and then fills D again. The parts of
    a joined layer have the D of the first part, unless they are `split`.
    """
    values: dict[str, dict[str, Tensor]] = {}
    downs: dict[tuple[str, str], Tensor] = {}
    for name in weights:
        (outs, ins), rank = weights[name].shape, ranks[name]
        part, path = places.part_and_path(name)
        piece = flux_names.joined_rows(path) if part == "unet" else None
        key = share(part, path, (ins,))
        if key not in downs:
            for size in _constructed(outs, ins, piece, split):
                torch.empty(size * rank).uniform_()
        if split or key not in downs:
            downs[key] = kaiming(rank, (ins,))
        values[name] = {"down": downs[key], "up": torch.zeros(outs, rank)}
    return values, {}


def _constructed(outs: int, ins: int, piece: flux_names.Piece | None, split: bool) -> list[int]:
    """Return the sizes per rank of the tensors that kohya's constructors fill for a whole layer."""
    if piece is None or piece.total == 1:
        return [ins, outs]
    unit = outs // (piece.stop - piece.start)
    if not split:
        return [ins, unit * piece.total]
    shares = [other.stop - other.start for _, other in flux_names.modules(piece.module)]
    return [ins] * len(shares) + [unit * part for part in shares]
