"""The two nodes: an adapter file with a strength, and a style with a content adapter.

Each node is declared once and offered in both of ComfyUI's interfaces: classes with INPUT_TYPES
(`NODE_CLASS_MAPPINGS`), and the schema of `comfy_api` (`comfy_entrypoint`), which newer versions prefer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import folder_paths

from lowrank.combine.rules import RULES, SUM, Merging, RuleOptions

from .adapters import apply_adapter, merge_adapters, read_adapter

_STRENGTH = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}
FILE = "FILE"  # an input that is one of the files in models/loras


def files() -> list[str]:
    """The adapter files that ComfyUI knows."""
    return folder_paths.get_filename_list("loras")


def _path(name: str) -> str:
    return folder_paths.get_full_path_or_raise("loras", name)


class Input(NamedTuple):
    """An input of a node: its type in ComfyUI or the words to choose from, its tooltip, and its limits."""

    name: str
    kind: str | tuple[str, ...]
    tooltip: str
    limits: Mapping[str, Any] = {}
    optional: bool = False


class Node(NamedTuple):
    """A node: names, inputs, and the function that gives model and CLIP."""

    name: str
    title: str
    description: str
    inputs: tuple[Input, ...]
    run: Callable[..., tuple[Any, Any]]


def load(
    model: Any,
    lora_name: str,
    strength_model: float,
    clip: Any = None,
    strength_clip: float = 1.0,
    min_rank: int = 0,
    schedule_alpha: float = 0.0,
    strict: bool = False,
) -> tuple[Any, Any]:
    """Model and CLIP with an adapter file."""
    config = {"min_rank": min_rank, "alpha": schedule_alpha}
    given = {name: value for name, value in config.items() if value}
    adapter = read_adapter(_path(lora_name), given or None, strict)
    return apply_adapter(model, clip, adapter, strength_model, strength_clip)


def merge(
    model: Any,
    style_name: str,
    content_name: str,
    alpha: float,
    beta: float,
    clip: Any = None,
    rule: str = SUM.name,
    rank: int = 0,
    density: float = 0.5,
    strict: bool = False,
) -> tuple[Any, Any]:
    """Model and CLIP with alpha · style and beta · content, merged by a rule."""
    style, content = (read_adapter(_path(name), strict=strict) for name in (style_name, content_name))
    merging = Merging(RULES[rule], RuleOptions(rank=rank or None, density=density))
    return merge_adapters(model, clip, (style, content), (alpha, beta), merging)


_MODEL = Input("model", "MODEL", "Model that the adapter was trained on, or one like it. It is not changed.")
_CLIP = Input(
    "clip",
    "CLIP",
    "Text encoders. Without them the adapter's text-encoder layers are left out.",
    optional=True,
)
_STRICT = Input(
    "strict",
    "BOOLEAN",
    "Refuse a file with tensors that are not used, instead of a line in the console.",
    {"default": False},
    optional=True,
)
NODES = (
    Node(
        "LowrankLoader",
        "Load adapter (lowrank)",
        "Adds an adapter to a model. T-LoRA opens its ranks by the noise of each step; min_rank and "
        "schedule_alpha are for files without a schedule, 0 keeps the file's.",
        (
            _MODEL,
            Input("lora_name", FILE, "Adapter file in models/loras, of any method and any program."),
            Input("strength_model", "FLOAT", "Factor of the denoiser's change; 0 is the model.", _STRENGTH),
            _CLIP,
            Input("strength_clip", "FLOAT", "Factor of the change of the text encoders.", _STRENGTH, True),
            Input(
                "min_rank",
                "INT",
                "T-LoRA without a schedule in its file: ranks open at pure noise. 0: as in the file.",
                {"default": 0, "min": 0, "max": 4096},
                True,
            ),
            Input(
                "schedule_alpha",
                "FLOAT",
                "T-LoRA without a schedule in its file: exponent of the schedule. 0: as in the file.",
                {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.05},
                True,
            ),
            _STRICT,
        ),
        load,
    ),
    Node(
        "LowrankMerge",
        "Merge style × content (lowrank)",
        "Adds alpha × style and beta × content, each measured from the model that comes in. On one basis the "
        "sum keeps the rank of one adapter.",
        (
            _MODEL,
            Input("style_name", FILE, "Adapter file of the style, in models/loras."),
            Input("content_name", FILE, "Adapter file of the content, in models/loras."),
            Input("alpha", "FLOAT", "Factor of the style's change.", _STRENGTH),
            Input("beta", "FLOAT", "Factor of the content's change.", _STRENGTH),
            _CLIP,
            Input(
                "rule",
                tuple(name for name, rule in RULES.items() if not rule.learned),
                "How the two changes become one; the rules are in docs/merging.md.",
                {"default": SUM.name},
                True,
            ),
            Input(
                "rank",
                "INT",
                "Rank after svd, ties, dare and magnitude_prune. 0: the larger rank of the two.",
                {"default": 0, "min": 0, "max": 4096},
                True,
            ),
            Input(
                "density",
                "FLOAT",
                "Share of the elements that ties, dare and magnitude_prune keep.",
                {"default": 0.5, "min": 0.01, "max": 1.0, "step": 0.01},
                True,
            ),
            _STRICT,
        ),
        merge,
    ),
)


# ---------- classes with INPUT_TYPES


def _input_types(node: Node) -> dict[str, Any]:
    types: dict[str, Any] = {"required": {}, "optional": {}}
    for entry in node.inputs:
        kind = files() if entry.kind == FILE else entry.kind
        kind = list(kind) if isinstance(kind, tuple) else kind
        options = {**entry.limits, "tooltip": entry.tooltip}
        types["optional" if entry.optional else "required"][entry.name] = (kind, options)
    return types


def _class(node: Node) -> type:
    """The node in the interface of ComfyUI's `nodes.py`."""
    return type(
        node.name,
        (),
        {
            "__doc__": node.description,
            "RETURN_TYPES": ("MODEL", "CLIP"),
            "OUTPUT_TOOLTIPS": ("Model with the adapter.", "Text encoders with the adapter."),
            "FUNCTION": "run",
            "CATEGORY": "loaders/lowrank",
            "DESCRIPTION": node.description,
            "INPUT_TYPES": classmethod(lambda cls: _input_types(node)),
            "run": staticmethod(node.run),
        },
    )


CLASSES = {node.name: _class(node) for node in NODES}
NAMES = {node.name: node.title for node in NODES}


# ---------- the schema of comfy_api


def schema_nodes(io: Any) -> list[type]:
    """The nodes in the interface of `comfy_api.latest.io`."""
    return [_schema_class(io, node) for node in NODES]


def _schema_class(io: Any, node: Node) -> type:
    types = {"MODEL": io.Model, "CLIP": io.Clip, "FLOAT": io.Float, "INT": io.Int, "BOOLEAN": io.Boolean}

    def made(entry: Input) -> Any:
        facts = {**entry.limits, "tooltip": entry.tooltip, "optional": entry.optional}
        if entry.kind == FILE or isinstance(entry.kind, tuple):
            words = files() if entry.kind == FILE else list(entry.kind)
            return io.Combo.Input(entry.name, options=words, **facts)
        return types[entry.kind].Input(entry.name, **facts)

    def define_schema(cls: type) -> Any:
        return io.Schema(
            node_id=node.name,
            display_name=node.title,
            category="loaders/lowrank",
            description=node.description,
            inputs=[made(entry) for entry in node.inputs],
            outputs=[io.Model.Output(), io.Clip.Output()],
        )

    def execute(cls: type, **inputs: Any) -> Any:
        return io.NodeOutput(*node.run(**inputs))

    methods = {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
    return type(node.name, (io.ComfyNode,), methods)
