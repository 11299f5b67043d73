"""The folders that PEFT saves: one with `adapter_config.json`, or one for each model in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lowrank import peft_config
from lowrank.errors import Refused
from lowrank.tensors import read_tensors

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


class Contents(NamedTuple):
    """Tensors, metadata, source, configuration by component, and the factors before training."""

    state: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    source: str
    config: Mapping[str, Mapping[str, Any]]
    start: Mapping[str, Tensor]


def read_folder(folder: Path, alone: bool = False) -> Contents:
    """A folder that PEFT saved, or one folder for each model in it; `alone`: this folder itself."""
    components = [name for name in COMPONENTS if (folder / name / CONFIG).is_file() and not alone]
    if not components and (folder / CONFIG).is_file():
        components = [""]
    if not components:
        raise Refused(
            f"{folder} has no {CONFIG}, in it or in a folder named {', '.join(COMPONENTS)}; give "
            "an adapter that PEFT saved, or a file"
        )
    state: dict[str, Tensor] = {}
    start: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    config: dict[str, Mapping[str, Any]] = {}
    for name in components:
        component = name or (folder.name if folder.name in COMPONENTS else "")
        settings = peft_config.read_config(folder / name / CONFIG)
        if "lora_alpha" not in settings:
            raise Refused(f"the alpha of {folder / name} cannot be read: its {CONFIG} has no lora_alpha")
        config[component] = settings
        tensors, header = _tensors(folder / name, component)
        state |= tensors
        metadata |= header
        initial = None
        if peft_config.subtracts_start(settings.get("init_lora_weights")):
            initial = next(iter(sorted((folder / name).glob(f"*init*/{CONFIG}"))), None)
        peft_config.check_config(settings, str(folder / name), start=initial is not None)
        if initial is not None:
            start |= _tensors(initial.parent, component)[0]
    return Contents(state, metadata, str(folder), config, start)


def _tensors(folder: Path, component: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a PEFT folder under keys that begin with the component, and the file's metadata."""
    path = folder / FILE
    if not path.is_file() and path.with_suffix(".bin").is_file():
        path = path.with_suffix(".bin")
    tensors, header = read_tensors(path)
    prefix = f"{component}." if component else ""
    return {prefix + key.removeprefix("base_model.model."): value for key, value in tensors.items()}, header
