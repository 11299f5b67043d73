"""Memory and speed: how the frozen base is stored, and where it is."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.config.flag import option
from lowrank.errors import Refused

STORAGE = ("bf16", "fp8", "fp8_scaled", "int8", "nf4")


def gigabytes(text: str) -> str:
    """A number of GB as text, or "auto"."""
    try:
        sound = text == "auto" or 0 < float(text) < 10_000
    except ValueError:
        sound = False
    if not sound:
        raise Refused(f"{text!r} is not a number of GB; give e.g. 12, or auto")
    return text


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory"""

    base_storage: str | None = option(
        None,
        "how the weights of the U-Net's or transformer's blocks are stored (unset: in the precision of "
        "--mixed_precision): bf16 2 bytes per weight, fp8 1, fp8_scaled 1 and a scale per row, int8 1.03, "
        "nf4 0.52; they are widened while a layer computes",
        choices=STORAGE,
    )
    fp8_base: bool = option(
        False,
        "weights of the U-Net or transformer in fp8, as --base_storage fp8; needs --mixed_precision fp16 "
        "or bf16",
        metadata=True,
    )
    fp8_base_unet: bool = option(
        False, "weights of the U-Net or transformer in fp8; text encoders keep their precision", metadata=True
    )
    fp8_scaled: bool = option(
        False,
        "weights of the U-Net or transformer in fp8 with a scale per row, as --base_storage fp8_scaled; "
        "with or without --fp8_base, and with --mixed_precision fp16 or bf16",
    )
    blocks_to_swap: int = option(
        0,
        "number of blocks whose weights stay in host memory and are copied to the device ahead of each use; "
        "FLUX: half of them double blocks, and two single blocks for each other one, as in kohya's scripts",
        low=0,
    )

    text_encoders_on_cpu: bool = option(
        False, "encode captions on the CPU, which takes seconds per caption and no memory of the GPU"
    )
    vram: str | None = option(
        None,
        "memory of the GPU in GB, or auto to read what is free: sets those of --base_storage, "
        "--gradient_checkpointing, --blocks_to_swap and --text_encoders_on_cpu that are not given to the "
        "fastest values that are predicted to fit",
        convert=gigabytes,
        saved=False,
        essential=True,
    )

    @property
    def storage(self) -> str | None:
        """The kind in which the base is stored; None leaves it in the precision that computes."""
        if self.base_storage or not self.fp8_flag:
            return self.base_storage
        return "fp8_scaled" if self.fp8_scaled else "fp8"

    @property
    def fp8_flag(self) -> str | None:
        """The first of kohya's fp8 flags that is given."""
        names = ("fp8_base", "fp8_base_unet", "fp8_scaled")
        return next((name for name in names if getattr(self, name)), None)
