"""Cost of the top-64 basis of FLUX-shaped layers: block Krylov against the official full SVD + full QR.

    python benchmarks/decomposition.py            full table, about 5 minutes on 2 cores
    python benchmarks/decomposition.py --quick    smaller layers, half a minute, no file written

Every measurement runs in a new process. CPU-seconds are summed over threads (OpenMP waits passively, so
waiting costs nothing). Extra memory is the peak resident size during the decomposition minus the size before,
when W was in memory. The matrices have sigma_i = i^-0.5 and known singular vectors: W = P S V' with P and V
products of random signs and random orthogonal circulants, dense and applied by FFT, so the reference needs no
SVD.

Targets: >= 10 times less CPU time (required: 6), sin_max <= 1e-4, extra memory <= 1.0 times W. Writes
benchmarks/results/decomposition.json and prints the table. Exits with 1 if a requirement is missed.
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
REQUIRED = {"cpu_ratio": 6.0, "sin_max": 1e-4, "memory": 1.0}


# ------------------------------------------------------------------ in the child processes


def orthogonal(n: int, generator):
    """Return a random orthogonal n x n matrix as a function: signs, circulant, signs, circulant."""
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
    """Write W (O, I) as fp32 and its first left singular vectors as float64."""
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
    """Decompose like the released code: full SVD, dense core, full QR, then the first r columns and rows."""
    import torch

    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    core = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
    del u, s, vh
    q, r = torch.linalg.qr(core)
    return q[:, :rank], r[:rank]


def krylov(weight, rank: int):
    """Decompose with our block Krylov iteration."""
    from lowrank.bases.qr_basis import decompose

    return decompose(weight, rank)


def resident(reset: bool = False) -> int:
    """Return the peak resident bytes since the last reset, or outside of Linux since the start."""
    if not Path("/proc/self/clear_refs").exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measure(method: str, o: int, i: int, repeats: int, folder: Path) -> dict:
    """Measure time, memory and accuracy of one method on one matrix."""
    sys.path.insert(0, str(HERE.parents[1]))
    import numpy as np
    import torch

    decompose = {"krylov": krylov, "official": official}[method]
    small = torch.randn(96, 96, generator=torch.Generator().manual_seed(0))
    decompose(small, 8)  # loads libraries and starts threads
    weight = torch.from_numpy(np.fromfile(folder / "weight", dtype=np.float32)).view(o, i)
    baseline, cpu, wall, extra = resident(reset=True), [], [], 0
    for repeat in range(repeats):
        clocks = time.process_time(), time.perf_counter()
        q, _ = decompose(weight, RANK)
        cpu.append(time.process_time() - clocks[0])
        wall.append(time.perf_counter() - clocks[1])
        if repeat == 0:
            extra = resident() - baseline
    truth = torch.from_numpy(np.fromfile(folder / "left", dtype=np.float64)).view(o, RANK)
    span = torch.linalg.qr(q.double())[0]
    captured = sum((span.mT @ part.double()).square().sum().item() for part in weight.split(512, dim=1))
    best = sum(k ** -(2 * POWER) for k in range(1, RANK + 1))
    return {
        "method": method,
        "shape": [o, i],
        "cpu_s": cpu,
        "wall_s": wall,
        "sin_max": torch.linalg.svdvals(span - truth @ (truth.mT @ span)).max().item(),
        "energy_loss": 1 - captured / best,
        "memory": extra / (4 * o * i),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


# ------------------------------------------------------------------ in the parent process


def child(*arguments) -> str:
    """Run this file in a new process and return its output."""
    passive = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
    environment = {"OMP_NUM_THREADS": "2", **os.environ, **passive}
    command = [sys.executable, str(HERE), "--child", *map(str, arguments)]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def spread(values: list[float]) -> str:
    """Format the median and the range of `values`."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def table(rows: list[dict]) -> str:
    """Return the results as a Markdown table."""
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
    """Return two rows per shape; the first has the ratio of median CPU-seconds."""
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
    """Return the requirements that the Krylov rows miss; for quick shapes only accuracy is required."""
    problems = []
    for row in (row for row in rows if row["method"] == "krylov"):
        where = "×".join(map(str, row["shape"]))
        if row["sin_max"] > REQUIRED["sin_max"]:
            problems.append(f"{where}: sin_max {row['sin_max']:.1e} > {REQUIRED['sin_max']:.0e}")
        if not quick and row["memory"] > REQUIRED["memory"]:
            problems.append(f"{where}: extra memory {row['memory']:.2f} > {REQUIRED['memory']} W")
        if not quick and row["cpu_ratio"] < REQUIRED["cpu_ratio"]:
            problems.append(f"{where}: {row['cpu_ratio']:.1f} times less CPU time < {REQUIRED['cpu_ratio']}")
    return problems


def main() -> int:
    """Run the benchmark, or one task of a child process."""
    if sys.argv[1:2] == ["--child"]:
        task, *words = sys.argv[2:]
        if task == "make":
            make(int(words[0]), int(words[1]), Path(words[2]))
        else:
            print(json.dumps(measure(words[0], *map(int, words[1:4]), Path(words[4]))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small layers, no file written")
    quick = parser.parse_args().quick
    rows = run(QUICK if quick else SHAPES)
    print(table(rows))
    problems = missed(rows, quick)
    print("\n".join(problems) or "all requirements are met")
    if not quick:
        RESULTS.parent.mkdir(exist_ok=True)
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        result = {"rank": RANK, "power": POWER, "machine": machine, "rows": rows}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
