"""The two nodes: an adapter file with a strength, and a style with a content adapter.

Interfaces: ComfyUI's nodes.py (INPUT_TYPES, RETURN_TYPES, FUNCTION, CATEGORY) and folder_paths.
"""

from __future__ import annotations

from typing import Any

import folder_paths

from .adapters import apply_adapter, merge_adapters, read_adapter

_STRENGTH = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}


def _files() -> list[str]:
    return folder_paths.get_filename_list("loras")


def _path(name: str) -> str:
    return folder_paths.get_full_path_or_raise("loras", name)


class LowrankLoader:
    """An adapter of any method of this repository, or a T-LoRA of LyCORIS or its authors."""

    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "load"
    CATEGORY = "loaders/lowrank"
    DESCRIPTION = (
        "Adds an adapter to a model. T-LoRA opens its ranks by the noise of each step; min_rank and "
        "schedule_alpha are for files without a schedule, 0 keeps the file's."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "lora_name": (_files(),),
                "strength_model": ("FLOAT", _STRENGTH),
            },
            "optional": {
                "clip": ("CLIP",),
                "strength_clip": ("FLOAT", _STRENGTH),
                "min_rank": ("INT", {"default": 0, "min": 0, "max": 4096}),
                "schedule_alpha": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.05}),
            },
        }

    def load(
        self,
        model: Any,
        lora_name: str,
        strength_model: float,
        clip: Any = None,
        strength_clip: float = 1.0,
        min_rank: int = 0,
        schedule_alpha: float = 0.0,
    ) -> tuple[Any, Any]:
        config = {"min_rank": min_rank, "alpha": schedule_alpha}
        given = {name: value for name, value in config.items() if value}
        return apply_adapter(
            model, clip, read_adapter(_path(lora_name), given or None), strength_model, strength_clip
        )


class LowrankMerge:
    """A style and a content adapter of one base: ΔW = α·ΔW_style + β·ΔW_content."""

    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "merge"
    CATEGORY = "loaders/lowrank"
    DESCRIPTION = "Adds α × style and β × content. On one basis the sum keeps the rank of one adapter."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "style_name": (_files(),),
                "content_name": (_files(),),
                "alpha": ("FLOAT", _STRENGTH),
                "beta": ("FLOAT", _STRENGTH),
            },
            "optional": {"clip": ("CLIP",)},
        }

    def merge(
        self, model: Any, style_name: str, content_name: str, alpha: float, beta: float, clip: Any = None
    ) -> tuple[Any, Any]:
        style, content = read_adapter(_path(style_name)), read_adapter(_path(content_name))
        return merge_adapters(model, clip, (style, content), (alpha, beta))


NODE_CLASS_MAPPINGS = {"LowrankLoader": LowrankLoader, "LowrankMerge": LowrankMerge}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LowrankLoader": "Load adapter (lowrank)",
    "LowrankMerge": "Merge style × content (lowrank)",
}
