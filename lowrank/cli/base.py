"""The base model that a script works beside: where it is, in which precision, on which device."""

from __future__ import annotations

import torch

from lowrank.errors import Refused
from lowrank.models.family import DTYPES, Source
from lowrank.models.flux_single import is_file


def base(path: str, dtype: str, device: str | None) -> Source:
    """What --model_path, --dtype and --device name. Raises `Refused` before anything is loaded."""
    if is_file(path):
        raise Refused(
            f"--model_path {path} is a single file, and text encoders and VAE are needed beside the "
            "transformer; give the folder of a diffusers model"
        )
    return Source(path, dtype=DTYPES[dtype], device=_device(device))


def _device(asked: str | None) -> str:
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    known = ["cpu", *(["cuda", *gpus] if torch.cuda.is_available() else [])]
    known += ["mps"] if torch.backends.mps.is_available() else []
    device = asked or ("cuda" if "cuda" in known else "cpu")
    if device not in known:
        raise Refused(f"--device {device} is not on this machine; give one of {', '.join(known)}")
    return device
