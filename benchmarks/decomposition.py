"""What the top-64 basis of FLUX-shaped layers costs: block Krylov against the official full SVD + full QR.

    python benchmarks/decomposition.py            full table, about 5 minutes on 2 cores
    python benchmarks/decomposition.py --quick    smaller layers, half a minute, nothing written

Every measurement has a fresh process. CPU-seconds are the process's time summed over threads (OpenMP waits
passively, so waiting costs nothing); extra memory is the highest resident size while decomposing, less the
size before, when W was in memory. The matrices have sigma_i = i^-0.5 and known singular vectors: W = P S V'
with P and V products of random signs and random orthogonal circulants, dense and applied by FFT, so that no
SVD is needed to know the answer.

Targets: >= 10 times less CPU time (must: 6), sin_max <= 1e-4, extra memory <= 1.0 times W.
Writes benchmarks/results/decomposition.json and prints the table. Exit code 1 when a must is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()
RESULTS = HERE.parent / "results" / "decomposition.json"
RANK, POWER = 64, 0.5
SHAPES = ((3072, 3072), (3072, 12288), (12288, 3072))
QUICK = ((1280, 1280), (1280, 3840), (3840, 1280))
REPEATS = {"krylov": 5, "official": 2}
MUST = {"cpu_ratio": 6.0, "sin_max": 1e-4, "memory": 1.0}


# ------------------------------------------------------------------ in the measured processes


def orthogonal(n: int, generator):
    """A random n x n orthogonal matrix as a function on columns: signs, circulant, signs, circulant."""
    import torch

    signs, phases = [], []
    for _ in range(2):
        signs.append(torch.randint(0, 2, (n, 1), generator=generator).double() * 2 - 1)
        angle = torch.rand(n // 2 + 1, 1, generator=generator, dtype=torch.float64) * 2 * torch.pi
        angle[0] = angle[-1] = 0  # the two real frequencies of an even n
        phases.append(torch.polar(torch.ones_like(angle), angle))

    def apply(x):
        for sign, phase in zip(signs, phases, strict=True):
            x = torch.fft.irfft(torch.fft.rfft(sign * x, dim=0) * phase, n=n, dim=0)
        return x

    return apply


def make(o: int, i: int, folder: Path) -> None:
    """Write W (O, I) as fp32 and its first singular vectors on the left as float64."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = orthogonal(o, generator), orthogonal(i, generator)
    k = min(o, i)
    sigma = torch.arange(1, k + 1, dtype=torch.float64) ** -POWER
    weight = torch.zeros(o, i, dtype=torch.float64)
    weight[range(k), range(k)] = sigma
    weight = left(right(weight.mT).mT)
    weight.float().numpy().tofile(folder / "weight")
    left(torch.eye(o, RANK, dtype=torch.float64)).numpy().tofile(folder / "left")


def official(weight, rank: int):
    """The released code's way: all singular triplets, the dense core, QR of all of it, then the first r."""
    import torch

    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    core = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
    del u, s, vh
    q, r = torch.linalg.qr(core)
    return q[:, :rank], r[:rank]


def krylov(weight, rank: int):
    from lowrank.bases.qr_basis import decompose

    return decompose(weight, rank)


def resident(reset: bool = False) -> int:
    """The most bytes that were resident since the last reset; elsewhere than on Linux since the start."""
    if not Path("/proc/self/clear_refs").exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measure(method: str, o: int, i: int, repeats: int, folder: Path) -> dict:
    """Time and memory of one method on one matrix, and how good its Q is."""
    sys.path.insert(0, str(HERE.parents[1]))
    import numpy as np
    import torch

    decompose = {"krylov": krylov, "official": official}[method]
    small = torch.randn(96, 96, generator=torch.Generator().manual_seed(0))
    decompose(small, 8)  # libraries are loaded and threads run
    weight = torch.from_numpy(np.fromfile(folder / "weight", dtype=np.float32)).view(o, i)
    before, cpu, wall, extra = resident(reset=True), [], [], 0
    for repeat in range(repeats):
        clocks = time.process_time(), time.perf_counter()
        q, _ = decompose(weight, RANK)
        cpu.append(time.process_time() - clocks[0])
        wall.append(time.perf_counter() - clocks[1])
        if repeat == 0:
            extra = resident() - before
    truth = torch.from_numpy(np.fromfile(folder / "left", dtype=np.float64)).view(o, RANK)
    span = torch.linalg.qr(q.double())[0]
    caught = sum((span.mT @ part.double()).square().sum().item() for part in weight.split(512, dim=1))
    best = sum(k ** -(2 * POWER) for k in range(1, RANK + 1))
    return {
        "method": method,
        "shape": [o, i],
        "cpu_s": cpu,
        "wall_s": wall,
        "sin_max": torch.linalg.svdvals(span - truth @ (truth.mT @ span)).max().item(),
        "energy_loss": 1 - caught / best,
        "memory": extra / (4 * o * i),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


# ------------------------------------------------------------------ in the process that starts them


def child(*arguments) -> str:
    """Run this file in a fresh process and return what it prints."""
    passive = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
    environment = {"OMP_NUM_THREADS": "2", **os.environ, **passive}
    command = [sys.executable, str(HERE), "--child", *map(str, arguments)]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def table(rows: list[dict]) -> str:
    lines = [
        "| W | method | CPU-s, median (range) | wall s | less CPU | sin_max | energy loss | extra memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = f"{row['cpu_ratio']:.1f}×" if "cpu_ratio" in row else ""
        shape, wall = "×".join(map(str, row["shape"])), statistics.median(row["wall_s"])
        lines.append(
            f"| {shape} | {row['method']} | {spread(row['cpu_s'])} | {wall:.2f} | {ratio} | "
            f"{row['sin_max']:.1e} | {row['energy_loss']:.0e} | {row['memory']:.2f} W |"
        )
    return "\n".join(lines)


def run(shapes: tuple[tuple[int, int], ...]) -> list[dict]:
    """Two rows per shape; the ratio of median CPU-seconds is in the first."""
    rows = []
    for o, i in shapes:
        with tempfile.TemporaryDirectory() as folder:
            child("make", o, i, folder)
            pair = [
                json.loads(child("measure", *case, folder))
                for case in (("krylov", o, i, REPEATS["krylov"]), ("official", o, i, REPEATS["official"]))
            ]
        medians = [statistics.median(row["cpu_s"]) for row in pair]
        pair[0]["cpu_ratio"] = medians[1] / medians[0]
        rows += pair
        print(f"{o}×{i}: {medians[0]:.2f} against {medians[1]:.2f} CPU-s", file=sys.stderr)
    return rows


def missed(rows: list[dict], quick: bool) -> list[str]:
    """Which musts the Krylov rows miss; the small shapes promise accuracy only."""
    found = []
    for row in (row for row in rows if row["method"] == "krylov"):
        where = "×".join(map(str, row["shape"]))
        if row["sin_max"] > MUST["sin_max"]:
            found.append(f"{where}: sin_max {row['sin_max']:.1e} > {MUST['sin_max']:.0e}")
        if not quick and row["memory"] > MUST["memory"]:
            found.append(f"{where}: extra memory {row['memory']:.2f} > {MUST['memory']} W")
        if not quick and row["cpu_ratio"] < MUST["cpu_ratio"]:
            found.append(f"{where}: {row['cpu_ratio']:.1f} times less CPU time < {MUST['cpu_ratio']}")
    return found


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        task, *rest = sys.argv[2:]
        if task == "make":
            make(int(rest[0]), int(rest[1]), Path(rest[2]))
        else:
            print(json.dumps(measure(rest[0], *map(int, rest[1:4]), Path(rest[4]))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small layers, nothing written")
    quick = parser.parse_args().quick
    rows = run(QUICK if quick else SHAPES)
    print(table(rows))
    problems = missed(rows, quick)
    print("\n".join(problems) or "all musts are met")
    if not quick:
        RESULTS.parent.mkdir(exist_ok=True)
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        result = {"rank": RANK, "power": POWER, "machine": machine, "rows": rows}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
