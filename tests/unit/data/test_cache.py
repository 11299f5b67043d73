"""The tensor cache: equal in memory and on disk, and never trusting a file by its name."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

from lowrank.data.cache import Cache, key
from lowrank.errors import Refused


@pytest.fixture(params=["memory", "disk"])
def cache(request, tmp_path):
    return Cache(None if request.param == "memory" else tmp_path / "cache")


def test_keys_depend_on_every_part():
    made = [key("a", "bc"), key("ab", "c"), key("a", "b", "c"), key("a", "b"), key("a", "bc", "")]
    assert len(set(made)) == 5
    assert key("text", "a cat", 3) == key("text", "a cat", "3")
    assert key("text", "x").startswith("text-")


def test_entries_come_back_bit_for_bit(cache):
    entry = {
        "a": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)),
        "b": torch.arange(5).bfloat16(),
        "c": torch.tensor(2.5),
        "d": torch.zeros(0, 4),
        "e": torch.tensor([True, False]),
    }
    cache.put("x-1", entry)
    found = cache.get("x-1")
    assert found.keys() == entry.keys()
    assert all(
        torch.equal(found[name], entry[name]) and found[name].dtype == entry[name].dtype for name in entry
    )
    assert cache.missing(["x-1", "x-2"]) == ["x-2"]
    with pytest.raises(Refused, match="x-2"):
        cache.get("x-2")


def test_conditions_of_two_text_encoders_notice_a_change_of_either(cache):
    """What SDXL keeps for a caption: both encoders' hidden states and the pooled one, in half precision."""
    calls = []

    def fill(captions, models):
        def encode(texts):
            calls.extend(texts)
            return [
                {
                    "one": torch.ones(77, 8).half(),
                    "two": torch.ones(77, 12).bfloat16(),
                    "pooled": torch.ones(12),
                }
                for _ in texts
            ]

        return cache.fill({key("text", text, models): text for text in captions}, encode, batch_size=2)

    assert fill(["a cat", ""], "te1 te2") == 2
    assert fill(["a cat", ""], "te1 te2") == 0
    assert fill(["a cat", "a dog"], "te1 te2") == 1 and calls[-1] == "a dog"  # one caption was rewritten
    assert fill(["a cat"], "te1 other") == 1
    assert fill(["a cat"], "other te2") == 1
    entry = cache.get(key("text", "a cat", "te1 te2"))
    assert {name: (value.shape[-1], value.dtype) for name, value in entry.items()} == {
        "one": (8, torch.float16),
        "two": (12, torch.bfloat16),
        "pooled": (12, torch.float32),
    }


def test_fill_computes_only_what_is_missing_in_batches(cache):
    calls = []

    def compute(items):
        calls.append(items)
        return [{"t": torch.full((2,), float(item))} for item in items]

    assert cache.fill({f"x-{i}": i for i in range(3)}, compute, batch_size=2) == 3
    assert cache.fill({f"x-{i}": i for i in range(5)}, compute, batch_size=2) == 2
    assert calls == [[0, 1], [2], [3, 4]]
    assert cache.get("x-4")["t"].tolist() == [4, 4]
    with pytest.raises(ValueError):
        cache.fill({"y-0": 0, "y-1": 1}, lambda items: [{}], batch_size=2)


def test_a_row_does_not_keep_its_batch_alive():
    cache = Cache()
    cache.put("x", {"t": torch.zeros(100, 4)[3]})
    assert cache.get("x")["t"].untyped_storage().nbytes() == 16


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "bit", "foreign", "plain"])
def test_a_damaged_or_foreign_file_is_made_again_and_said(tmp_path, caplog, damage):
    cache = Cache(tmp_path)
    cache.put("x-1", {"t": torch.arange(64.0)}), cache.put("x-2", {"t": torch.zeros(3)})
    file = tmp_path / "x-1.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-7])
    elif damage == "garbage":
        file.write_bytes(b"\xff" * 100)
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "bit":
        content[-9] ^= 1
        file.write_bytes(content)
    elif damage == "foreign":
        shutil.copy(tmp_path / "x-2.safetensors", file)
    else:
        save_file({"t": torch.zeros(3)}, file)
    assert cache.missing(["x-1", "x-2"]) == ["x-1"]
    assert "x-1.safetensors" in caplog.text and "made again" in caplog.text
    assert cache.fill({"x-1": 1}, lambda items: [{"t": torch.arange(64.0)}]) == 1
    assert cache.get("x-1")["t"].tolist() == list(range(64))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-1.safetensors", "x-2.safetensors"]
