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

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: E402

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
