"""ComfyUI nodes for the adapters of this repository; installation and what they do: docs/comfyui.md.

ComfyUI imports this folder as a package of custom nodes. It needs torch, safetensors and `lowrank`, found
beside this folder (also through a link) or installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT not in sys.path:
    sys.path.append(_ROOT)  # last, so that nothing of ComfyUI's own is hidden

from .nodes import CLASSES, NAMES, schema_nodes  # noqa: E402

try:
    from comfy_api.latest import ComfyExtension, io  # pyright: ignore[reportMissingImports]
except ImportError:  # before ComfyUI 0.3.48
    NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = CLASSES, NAMES
else:
    # ComfyUI prefers the older interface where both are there
    NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = None, None

    class Lowrank(ComfyExtension):
        """The nodes of this folder."""

        async def get_node_list(self) -> list[type]:
            return schema_nodes(io)

    async def comfy_entrypoint() -> Lowrank:
        """What ComfyUI calls to find the nodes."""
        return Lowrank()


__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
