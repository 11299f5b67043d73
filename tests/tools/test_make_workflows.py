"""The example workflows of the ComfyUI nodes against the nodes' own declaration."""

from __future__ import annotations

import json

import pytest

from tools import make_workflows

OURS = make_workflows.our_nodes()


def test_files_are_those_of_the_generator():
    for path, text in make_workflows.files().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python tools/make_workflows.py"
    assert {path for path in make_workflows.FOLDER.iterdir()} == set(make_workflows.files())


@pytest.mark.parametrize("name", make_workflows.EXAMPLES)
def test_links_join_equal_types_and_widgets_fit_the_inputs(name):
    graph = json.loads((make_workflows.FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    nodes = {node["id"]: node for node in graph["nodes"]}
    for number, source, output, target, slot, wire in graph["links"]:
        given, taken = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert given["type"] == taken["type"] == wire
        assert number in given["links"] and taken["link"] == number
    assert graph["last_link_id"] == len(graph["links"]) and graph["last_node_id"] == len(nodes)
    (ours,) = (node for node in nodes.values() if node["type"] in OURS)
    declared = OURS[ours["type"]].inputs
    assert [entry["name"] for entry in ours["inputs"]] == ["model", "clip"]
    widgets = [entry for entry in declared if entry.kind not in make_workflows.WIRES]
    for entry, value in zip(widgets, ours["widgets_values"], strict=True):
        if isinstance(entry.kind, tuple):
            assert value in entry.kind
        elif entry.kind == "BOOLEAN":
            assert isinstance(value, bool)
        elif entry.kind in ("INT", "FLOAT"):
            assert entry.limits["min"] <= value <= entry.limits["max"]
        else:
            assert value.endswith(".safetensors")
