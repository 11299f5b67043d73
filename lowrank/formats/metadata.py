"""What interfaces read of a file's metadata: kohya's `ss_*` and Stability's modelspec; what the training
wrote stays."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from lowrank.formats.read import Adapter
from lowrank.naming import keys

_KINDS = {  # what interfaces read off metadata: ss_base_model_version, modelspec.architecture, implementation
    "sd15": ("sd_v1", "stable-diffusion-v1", "https://github.com/Stability-AI/generative-models"),
    "sdxl": (
        "sdxl_base_v1-0",
        "stable-diffusion-xl-v1-base",
        "https://github.com/Stability-AI/generative-models",
    ),
    "flux": ("flux1", "flux-1-dev", "https://github.com/black-forest-labs/flux"),
}


def kohya_facts(adapter: Adapter, state: Mapping[str, Tensor]) -> dict[str, str]:
    """What A1111, Forge, ComfyUI and Civitai read of a LoRA: kohya's ss_* and Stability's modelspec.

    What the training wrote stays; the network is told as the one that reads the file.
    """
    kept = kept_facts(adapter)
    version, architecture, implementation = _KINDS[adapter.family]
    ranks = Counter(v.shape[0] for k, v in state.items() if k.endswith(keys.KOHYA["down"]))
    alphas = Counter(float(v) for k, v in state.items() if k.endswith(".alpha"))
    module = "networks.lora_flux" if adapter.family == "flux" else "networks.lora"
    dora = any(layer.magnitude is not None for layer in adapter.layers.values())
    kept.setdefault("ss_base_model_version", version)
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": adapter.metadata.get("ss_output_name", "LoRA"),
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": implementation,
        **kept,
        "ss_v2": kept.get("ss_v2", "False"),
        "ss_network_module": "lycoris.kohya" if dora else module,
        "ss_network_dim": str(ranks.most_common(1)[0][0]),
        "ss_network_alpha": str(alphas.most_common(1)[0][0]),
        "ss_network_args": json.dumps({"algo": keys.LORA, "dora_wd": "True"} if dora else {}),
    }


def kept_facts(adapter: Adapter) -> dict[str, str]:
    """The training's own metadata, and where the file came from."""
    kept = {
        key: value
        for key, value in adapter.metadata.items()
        if key.startswith(
            ("ss_", "modelspec.", "tlora_", "lowrank.base", "lowrank.command", "lowrank.unrouted")
        )
    }
    gated = adapter.fact("gated_by")  # whoever loads the file must not take it for a LoRA
    return {
        **kept,
        **({"lowrank.method": gated} if gated else {}),
        "lowrank.exported_from": adapter.fact("exported_from") or adapter.fact("method") or keys.LORA,
    }
