"""Files of a state folder that are damaged or hold code are one sentence, and the code is not run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_files import Code

from lowrank.errors import Refused
from lowrank.train.checkpoints import Checkpoint, reading_state


@pytest.mark.parametrize("content", ["code", "garbage", "cut"])
def test_damaged_state_is_one_sentence(content, tmp_path, capsys):
    path = tmp_path / "optimizer.bin"
    torch.save({"state": {}, "x": Code() if content == "code" else torch.ones(8)}, path)
    if content != "code":
        path.write_bytes(path.read_bytes()[:-100] if content == "cut" else b"no state")
    checkpoint = Checkpoint(Path("checkpoint-2"), {}, 2, 0, 0)
    words = r"a file in checkpoint-2 is damaged, or holds more"
    with pytest.raises(Refused, match=words) as refused, reading_state(checkpoint):
        torch.load(path, weights_only=True)
    assert "\n" not in str(refused.value) and "weights_only" not in str(refused.value)
    assert "run" not in capsys.readouterr().out.split()


def test_out_of_memory_while_a_state_is_read_is_no_damage():
    with pytest.raises(torch.OutOfMemoryError), reading_state(Checkpoint(Path("x"), {}, 2, 0, 0)):
        raise torch.OutOfMemoryError("CUDA out of memory")
