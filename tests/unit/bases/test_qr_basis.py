"""The basis of a layer and its cache: right, repeatable, shared by processes, whole or computed again."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from repository import ROOT
from safetensors.torch import load_file, save_file

from lowrank.bases import qr_basis
from lowrank.bases.qr_basis import QrBasis, bases, basis_hash, decompose, start_basis, weight_key
from lowrank.errors import Refused
from lowrank.files import cache_folder

R = 6


def power(o: int, i: int, p: float = 0.5, seed: int = 0) -> torch.Tensor:
    """W (O, I) in fp32 with singular values i^-p."""
    generator = torch.Generator().manual_seed(seed)
    k = min(o, i)
    u, v = (torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0] for n in (o, i))
    return (u * torch.arange(1, k + 1, dtype=torch.float64) ** -p @ v.mT).float()


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """Three layers small enough to be solved exactly."""
    return {f"blocks.{n}.to_q": power(20 + n, 30 - n, seed=n) for n in range(3)}


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """The names of the layers that are computed from here on."""
    names: list[str] = []

    def counted(*arguments, name, **options):
        names.append(name)
        return decompose(*arguments, name=name, **options)

    monkeypatch.setattr(qr_basis, "decompose", counted)
    return names


def same(a: dict[str, QrBasis], b: dict[str, QrBasis]) -> bool:
    return list(a) == list(b) and all(torch.equal(x, y) for n in a for x, y in zip(a[n], b[n], strict=True))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


# ------------------------------------------------------------------ decompose


@pytest.mark.parametrize("shape", [(600, 600), (600, 900), (900, 600), (40, 60)], ids=str)
def test_q_and_r_equal_official_ones(shape):
    """Full SVD, dense core, QR of all of it, cut: the released code, in float64."""
    weight = power(*shape)
    q, r = decompose(weight, R)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    whole_q, whole_r = torch.linalg.qr(u[:, :R] @ torch.diag(s[:R]) @ vh[:R])
    sign = whole_r.diagonal()[:R].sign()
    assert (q - whole_q[:, :R] * sign).abs().max() <= 1e-3
    assert (r - whole_r[:R] * sign[:, None]).norm() <= 1e-4 * r.norm()
    assert (r.diagonal() > 0).all() and (r.tril(-1) == 0).all()
    assert (q.mT @ q - torch.eye(R)).abs().max() <= 1e-5
    assert q.dtype == r.dtype == torch.float32


def test_seeds_and_threads():
    weight, before = power(600, 700), torch.get_num_threads()
    first = decompose(weight, R)
    assert all(torch.equal(x, y) for x, y in zip(first, decompose(weight, R), strict=True))
    others = [decompose(weight, R, seed=1)]
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            others.append(decompose(weight, R))
    finally:
        torch.set_num_threads(before)
    assert min(cosine(first.q, other.q) for other in others) >= 0.99999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_basis_is_fp32_without_shared_storage(dtype, tmp_path):
    weights = {"large": power(600, 700).to(dtype), "small": power(30, 20).to(dtype)}
    for found in (bases(weights, R, cache=tmp_path, progress=False), bases(weights, R, cache=tmp_path)):
        for name, (q, r) in found.items():
            assert (q.shape, r.shape) == ((len(weights[name]), R), (R, weights[name].shape[1]))
            for x in (q, r):
                assert x.dtype == torch.float32 and x.is_contiguous() and not x.requires_grad
                assert x.untyped_storage().nbytes() == 4 * x.numel()


def test_rank_deficient_weight_has_orthonormal_q():
    for weight in (torch.zeros(20, 30), power(20, 30)[:, :1] @ torch.ones(1, 30)):
        q, r = decompose(weight, R)
        assert (q.mT @ q - torch.eye(R)).abs().max() <= 1e-5 and torch.allclose(q @ r, weight, atol=1e-5)


def test_full_eigenvalue_problem_is_logged(caplog):
    with caplog.at_level(logging.INFO):
        decompose(torch.randn(600, 600, generator=torch.Generator().manual_seed(0)), 32, name="to_q")
    assert "to_q" in caplog.text and "eigenvalue problem" in caplog.text


# ------------------------------------------------------------------ keys


def test_cache_key(monkeypatch):
    weight = power(20, 30)
    key = weight_key(weight, R)
    changed = weight.clone()
    changed[19, 29] = changed[19, 29].nextafter(torch.tensor(9.0))
    others = [changed, weight.reshape(30, 20), weight.mT, weight.double(), weight.bfloat16()]
    others.append(others[-1].view(torch.float16))  # the same bytes as other numbers
    keys = {weight_key(other, R) for other in others} | {weight_key(weight, R + 1)}
    assert len(keys) == len(others) + 1 and key not in keys
    assert key == weight_key(torch.nn.Parameter(weight.mT.contiguous().mT), R)
    monkeypatch.setattr(qr_basis, "HASHED", 50)  # pieces of one row
    assert key == weight_key(weight, R)
    monkeypatch.setattr(qr_basis, "VERSION", "other")
    assert key != weight_key(weight, R)


def test_hash_of_all_bases(weights):
    names = list(weights)
    assert basis_hash(weights, R) == basis_hash(dict(reversed(weights.items())), R)
    swapped = {**weights, names[0]: weights[names[1]], names[1]: weights[names[0]]}
    assert len({basis_hash(weights, R), basis_hash(swapped, R), basis_hash(weights, R - 1)}) == 3


def test_start_basis_with_rank_per_layer(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "default"))
    ranks = dict(zip(weights, (2, 4, 6), strict=True))
    found, facts = start_basis(weights, ranks, None, progress=False)
    assert {name: q.shape[1] for name, (q, _) in found.items()} == ranks
    assert len(list((tmp_path / "default" / "basis").glob("*.safetensors"))) == 3
    _, uniform = start_basis(weights, dict.fromkeys(weights, R), tmp_path, progress=False)
    assert uniform["basis_hash"] == basis_hash(weights, R) != facts["basis_hash"]


def test_default_cache_folder(monkeypatch):
    monkeypatch.setenv("LOWRANK_CACHE", "/somewhere")
    assert cache_folder("basis") == Path("/somewhere/basis")
    monkeypatch.delenv("LOWRANK_CACHE")
    assert cache_folder("basis") == Path.home() / ".cache/lowrank/basis"


# ------------------------------------------------------------------ the cache


def test_second_run_reads_cache(weights, tmp_path, computed):
    first = bases(weights, R, cache=tmp_path / "a", progress=False)
    assert computed == list(weights)
    again = bases(weights, R, cache=str(tmp_path / "a"), progress=False)
    assert computed == list(weights) and same(first, again)
    assert same(first, bases(weights, R, cache=None, progress=False)) and len(computed) == 6
    bases(weights, R, cache=tmp_path / "b", progress=False)
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert not list(tmp_path.glob("*/.*.part"))


def test_equal_weights_are_computed_once(weights, tmp_path, computed):
    tied = {"a": weights["blocks.0.to_q"], "b": weights["blocks.0.to_q"].clone()}
    found = bases(tied, R, cache=tmp_path, progress=False)
    assert computed == ["a"] and torch.equal(found["a"].q, found["b"].q)


def test_progress_goes_to_stderr(weights, tmp_path, capsys):
    bases(weights, R, cache=tmp_path)
    out, err = capsys.readouterr()
    assert out == "" and "basis" in err and "3/3" in err
    bases(weights, R, cache=tmp_path)
    assert capsys.readouterr() == ("", "")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-4] ^= 1  # the lowest bit of the last number
    file.write_bytes(data)


def nan(file: Path) -> None:
    """Rightly described numbers that nobody wants."""
    own = QrBasis(**{name: value * math.nan for name, value in load_file(file).items()})
    facts = json.dumps({"key": file.stem, "sha256": qr_basis._checksum(own)})
    save_file(own._asdict(), file, {"lowrank.basis": facts})


def again(change, facts: dict[str, str] | None = None):
    """Write the tensors of a file anew, changed, and with these facts."""
    return lambda file: save_file(change(load_file(file)), file, facts)


DAMAGE = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-8]),
    "one bit": flip,
    "not safetensors": lambda file: file.write_bytes(b"x" * 2000),
    "no facts": again(dict),
    "facts not JSON": again(dict, {"lowrank.basis": "{"}),
    "no r": again(lambda own: {"q": own["q"]}),
    "wrong shape": again(lambda own: {k: v[:-1] for k, v in own.items()}),
    "wrong dtype": again(lambda own: {k: v.half() for k, v in own.items()}),
    "not finite": nan,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_file_is_recomputed_with_warning(damage, weights, tmp_path, computed, caplog):
    first = bases(weights, R, cache=tmp_path, progress=False)
    file = tmp_path / f"{weight_key(weights['blocks.1.to_q'], R)}.safetensors"
    whole = file.read_bytes()
    damage(file)
    computed.clear()
    assert same(first, bases(weights, R, cache=tmp_path, progress=False))
    assert computed == ["blocks.1.to_q"] and file.read_bytes() == whole
    assert caplog.text.count("computing it again") == 1 and str(file) in caplog.text


def test_file_of_another_weight_is_not_used(tmp_path, computed):
    weights = {"a": power(20, 30, seed=0), "b": power(20, 30, seed=1)}
    first = bases(weights, R, cache=tmp_path, progress=False)
    file_a, file_b = (tmp_path / f"{weight_key(weights[name], R)}.safetensors" for name in weights)
    file_b.write_bytes(file_a.read_bytes())
    assert same(first, bases(weights, R, cache=tmp_path, progress=False)) and computed == ["a", "b", "b"]


def test_bad_weight_is_named_and_others_are_kept(weights, tmp_path):
    weights["blocks.2.to_q"][3, 4] = math.nan
    with pytest.raises(Refused, match=r"blocks\.2\.to_q has NaN"):
        bases(weights, R, cache=tmp_path, progress=False)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_rank_above_layer_is_refused_before_computing(weights, tmp_path, computed):
    with pytest.raises(
        Refused, match=r"rank 21 is not between 1 and min\(out=20, in=30\) of blocks\.0\.to_q"
    ):
        bases(dict(reversed(weights.items())), 21, cache=tmp_path / "new", progress=False)
    assert not computed and not (tmp_path / "new").exists()


def test_cache_path_that_is_a_file_is_refused(weights, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match=r"cannot be locked .* --basis_cache_dir or LOWRANK_CACHE"):
        bases(weights, R, cache=tmp_path / "file", progress=False)


def test_failed_write_leaves_no_file(weights, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(qr_basis, "save_file", full)
    with pytest.raises(Refused, match="No space left"):
        bases(weights, R, cache=tmp_path, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


# ------------------------------------------------------------------ several processes


@pytest.fixture
def aside():
    """Call something in a thread and return a function that waits for its result."""
    threads = []

    def call(function, *arguments, **options):
        results = []
        thread = threading.Thread(target=lambda: results.append(function(*arguments, **options)), daemon=True)
        threads.append(thread)
        thread.start()

        def result():
            thread.join(timeout=60)
            assert results, "it is still waiting"
            return results[0]

        return result

    yield call
    for thread in threads:
        thread.join(timeout=1)


def test_complete_cache_is_read_without_lock(weights, tmp_path, aside):
    first = bases(weights, R, cache=tmp_path, progress=False)
    with open(tmp_path / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert same(first, aside(bases, weights, R, cache=tmp_path, progress=False)())


def test_waiting_for_lock_is_logged(weights, tmp_path, computed, caplog, aside):
    with open(tmp_path / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = aside(bases, weights, R, cache=tmp_path, progress=False)
        until(lambda: "another process computes bases" in caplog.text)
        assert not computed
        (tmp_path / ".left.safetensors.1.part").touch()  # what a killed holder leaves behind
    assert list(found()) == computed == list(weights) and not list(tmp_path.glob(".*.part"))


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


SLOW = """
import hashlib, logging, sys, time
from pathlib import Path
import torch
from lowrank.bases import qr_basis as basis

logging.basicConfig(stream=sys.stderr)
weights = {str(n): torch.randn(20, 30, generator=torch.Generator().manual_seed(n)) for n in range(8)}
quick, cache = basis.decompose, Path(sys.argv[1])

def slow(*arguments, name, **options):
    print("computed", name, flush=True)
    time.sleep(float(sys.argv[2]))
    return quick(*arguments, name=name, **options)

basis.decompose = slow
print("ready", flush=True)
while not (cache / "go").exists():
    time.sleep(0.005)
found = basis.bases(weights, 6, cache=cache, progress=False)
print("hash", hashlib.sha256(b"".join(x.numpy().tobytes() for b in found.values() for x in b)).hexdigest())
"""


@pytest.fixture
def slow_processes(tmp_path):
    """Start n processes that compute the same eight bases slowly; all are ended with the test."""
    started = []

    def start(n: int, seconds: float) -> list[subprocess.Popen]:
        for _ in range(n):
            command = [sys.executable, "-c", SLOW, str(tmp_path), str(seconds)]
            started.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        for process in started:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
        (tmp_path / "go").touch()
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_two_processes_compute_once(slow_processes, tmp_path):
    outputs = [process.communicate(timeout=60) for process in slow_processes(2, 0.1)]
    lines = [out.splitlines() for out, _ in outputs]
    assert sorted(len(own) for own in lines) == [1, 9]  # the other one prints its hash only
    assert lines[0][-1] == lines[1][-1] and lines[0][-1].startswith("hash")
    assert sum("waiting for it" in err for _, err in outputs) == 1


def test_killed_run_keeps_finished_layers(slow_processes, tmp_path, computed):
    (process,) = slow_processes(1, 0.05)
    until(lambda: len(list(tmp_path.glob("*.safetensors"))) >= 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    weights = {str(n): torch.randn(20, 30, generator=torch.Generator().manual_seed(n)) for n in range(8)}
    found = bases(weights, R, cache=tmp_path, progress=False)
    assert len(kept) >= 3 and len(computed) == 8 - len(kept) and len(found) == 8
    assert all((tmp_path / name).stat().st_mtime_ns == time_ns for name, time_ns in kept.items())
    assert same(found, bases(weights, R, cache=None, progress=False))
