"""Files and folders that are written have the permissions that the user's umask gives."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from lowrank.files import atomic, atomic_folder


def test_written_files_have_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "state") as part:
            save_file({"a": torch.ones(2)}, part / "a.safetensors")
            (part / "a.safetensors").chmod(0o600)  # as safetensors 0.8 leaves it
            (part / "b.json").write_text("{}")
        with atomic(tmp_path / "a.safetensors") as part:
            save_file({"a": torch.ones(2)}, part)
            Path(part).chmod(0o600)
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {file.name for file in files} == {"a.safetensors", "b.json"} and len(files) == 3
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}
