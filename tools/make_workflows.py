"""Write the example workflows of the ComfyUI nodes: comfyui/example_workflows/*.json.

    python tools/make_workflows.py

ComfyUI shows the folder `example_workflows` of a package among its templates. The nodes of this package come
from their own declaration in comfyui/nodes.py, so that names, order and defaults of inputs agree with it.
File names of models and adapters are placeholders: choose your own in the nodes.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "comfyui" / "example_workflows"
# Inputs and outputs of ComfyUI's own nodes: (connections, outputs), by type (ComfyUI nodes.py).
STOCK: dict[str, tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]] = {
    "CheckpointLoaderSimple": ((), (("MODEL", "MODEL"), ("CLIP", "CLIP"), ("VAE", "VAE"))),
    "CLIPTextEncode": ((("clip", "CLIP"),), (("CONDITIONING", "CONDITIONING"),)),
    "EmptyLatentImage": ((), (("LATENT", "LATENT"),)),
    "KSampler": (
        (
            ("model", "MODEL"),
            ("positive", "CONDITIONING"),
            ("negative", "CONDITIONING"),
            ("latent_image", "LATENT"),
        ),
        (("LATENT", "LATENT"),),
    ),
    "VAEDecode": ((("samples", "LATENT"), ("vae", "VAE")), (("IMAGE", "IMAGE"),)),
    "SaveImage": ((("images", "IMAGE"),), ()),
}
WIRES = ("MODEL", "CLIP")  # inputs of our nodes that are connections; the others are widgets
EXAMPLES: dict[str, tuple[str, dict[str, Any], str]] = {
    "tlora": ("LowrankLoader", {"lora_name": "tlora.safetensors"}, "a photo of sks dog on a beach"),
    "style_and_content": (
        "LowrankMerge",
        {"style_name": "style.safetensors", "content_name": "content.safetensors", "rule": "klora"},
        "a <c> dog in <s> style",
    ),
    "routed_experts": (
        "LowrankLoader",
        {"lora_name": "effilora.safetensors"},
        "a photo of sks dog beside a sks2 cat",
    ),
}


def our_nodes() -> dict[str, Any]:
    """The declarations of comfyui/nodes.py by name, read without ComfyUI."""
    stubs: dict[str, types.ModuleType] = {name: types.ModuleType(name) for name in ("folder_paths",)}
    adapters: Any = types.ModuleType("comfyui.adapters")
    adapters.apply_adapter = adapters.merge_adapters = adapters.read_adapter = None
    package: Any = types.ModuleType("comfyui")
    package.__path__ = [str(ROOT / "comfyui")]
    stubs |= {"comfyui": package, "comfyui.adapters": adapters}
    before = {name: sys.modules.get(name) for name in (*stubs, "comfyui.nodes")}
    sys.modules.update(stubs)
    sys.modules.pop("comfyui.nodes", None)
    sys.path.insert(0, str(ROOT))
    try:
        from comfyui.nodes import NODES

        return {node.name: node for node in NODES}
    finally:
        sys.path.remove(str(ROOT))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


class Graph:
    """Nodes and links in the format that ComfyUI's interface saves (version 0.4)."""

    def __init__(self, ours: dict[str, Any]) -> None:
        self.ours, self.nodes, self.links = ours, [], []

    def add(self, kind: str, place: tuple[int, int], widgets: list[Any], **wires: tuple[int, int]) -> int:
        """Add a node whose connections come from (node, output); returns its number."""
        if kind in STOCK:
            inputs, outputs = STOCK[kind]
        else:
            inputs = tuple((e.name, e.kind) for e in self.ours[kind].inputs if e.kind in WIRES)
            outputs = (("MODEL", "MODEL"), ("CLIP", "CLIP"))
        number = len(self.nodes) + 1
        slots = []
        for slot, (name, wire) in enumerate(inputs):
            source, output = wires[name]
            link = len(self.links) + 1
            self.links.append([link, source, output, number, slot, wire])
            self.nodes[source - 1]["outputs"][output]["links"].append(link)
            slots.append({"name": name, "type": wire, "link": link})
        self.nodes.append(
            {
                "id": number,
                "type": kind,
                "pos": list(place),
                "size": [330, 90 + 26 * len(widgets)],
                "flags": {},
                "order": number - 1,
                "mode": 0,
                "inputs": slots,
                "outputs": [{"name": name, "type": wire, "links": []} for name, wire in outputs],
                "properties": {"Node name for S&R": kind},
                "widgets_values": widgets,
            }
        )
        return number

    def document(self) -> dict[str, Any]:
        """The workflow as it is saved."""
        return {
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }


def workflow(kind: str, given: dict[str, Any], prompt: str, ours: dict[str, Any]) -> dict[str, Any]:
    """SD 1.5 with one of our nodes between the checkpoint and the sampler."""
    graph = Graph(ours)
    base = graph.add("CheckpointLoaderSimple", (0, 0), ["v1-5-pruned-emaonly.safetensors"])
    widgets = [
        given.get(entry.name, entry.limits.get("default"))
        for entry in ours[kind].inputs
        if entry.kind not in WIRES
    ]
    adapter = graph.add(kind, (380, 0), widgets, model=(base, 0), clip=(base, 1))
    positive = graph.add("CLIPTextEncode", (760, 0), [prompt], clip=(adapter, 1))
    negative = graph.add("CLIPTextEncode", (760, 220), [""], clip=(adapter, 1))
    latent = graph.add("EmptyLatentImage", (760, 440), [512, 512, 1])
    sampler = graph.add(
        "KSampler",
        (1140, 0),
        [42, "fixed", 28, 7.0, "euler", "normal", 1.0],
        model=(adapter, 0),
        positive=(positive, 0),
        negative=(negative, 0),
        latent_image=(latent, 0),
    )
    decoded = graph.add("VAEDecode", (1520, 0), [], samples=(sampler, 0), vae=(base, 2))
    graph.add("SaveImage", (1520, 140), ["lowrank"], images=(decoded, 0))
    return graph.document()


def files() -> dict[Path, str]:
    """The text of each workflow by its path."""
    ours = our_nodes()
    return {
        FOLDER / f"{name}.json": json.dumps(workflow(*example, ours), indent=1, ensure_ascii=False) + "\n"
        for name, example in EXAMPLES.items()
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
