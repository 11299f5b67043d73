"""The configurations of published models, from configs/models/*.json: sizes without a download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lowrank
from lowrank.files import atomic, cache_folder, read_json

# file in configs/models by hub id
KINDS = {
    "black-forest-labs/FLUX.1-dev": "flux1-dev",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1-base": "sd2",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}


def configurations(kind: str) -> dict[str, dict[str, Any]]:
    """The configuration of each component of a published model: "sd15", "sd2", "sdxl" or "flux1-dev"."""
    path = Path(lowrank.__file__).resolve().parents[1] / "configs" / "models" / f"{kind}.json"
    return read_json(path, "the model configuration", way_out="install the program again")


def folder(repository: str) -> Path:
    """The configurations of a hub model of `KINDS` as a diffusers folder without weights, in the cache."""
    kind = KINDS[repository]
    root = cache_folder("configurations") / kind
    for component, facts in configurations(kind).items():
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        (root / component).mkdir(parents=True, exist_ok=True)
        with atomic(root / component / name) as part:
            part.write_text(json.dumps(facts), encoding="utf-8")
    return root
