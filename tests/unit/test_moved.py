"""Import paths of the previous release: each still gives the object, and warns where it is imported."""

from __future__ import annotations

import importlib

import pytest

OLD = {
    "lowrank.adapters.kohya.bind": "lowrank.adapters.network_module.bind",
    "lowrank.adapters.plain.FACTOR": "lowrank.adapters.method.LORA_FACTOR",
    "lowrank.weights.timestep_ranks.timestep_ranks": "lowrank.combine.pipeline.timestep_ranks",
    "lowrank.weights.timestep_ranks.TimestepRanks": "lowrank.combine.pipeline.TimestepRanks",
}


def attribute(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("old, new", OLD.items())
def test_an_old_import_path_works_and_warns(old, new):
    module, _, name = old.rpartition(".")
    with pytest.warns(DeprecationWarning, match=new.replace(".", r"\.")) as caught:
        exec(compile(f"from {module} import {name} as found", "user.py", "exec"), space := {})
    assert space["found"] is attribute(new)
    assert [str(warning.filename) for warning in caught] == ["user.py"], "the warning names the user's line"


def test_an_unknown_name_of_an_old_path_is_an_import_error():
    with pytest.raises(ImportError, match="nothing_like_it"):
        exec("from lowrank.adapters.kohya import nothing_like_it", {})
