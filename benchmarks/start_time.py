"""How long scripts take to print their help, and to refuse a command line that flags alone decide.

    python benchmarks/start_time.py            each script, three times
    python benchmarks/start_time.py --times 9

Prints the least wall time and the CPU time of that call. Expected on a quiet core: below 1.5 s each (8.3 s
while scripts imported torch before they parsed). tests/unit/config/test_lazy_imports.py tests the reason, the
imported modules, which does not depend on the machine.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train_network_ABM.py", "sdxl_train_network_ABM.py", "flux_train_qrlora.py")
CALLS = {"help": ["--help"], "unknown flag": ["--no_such_flag"], "no source": ["--output_dir", "o"]}


def seconds(script: str, arguments: list[str]) -> tuple[float, float]:
    """Wall and CPU time of one call."""
    cpu, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, ROOT / script, *arguments], cwd=ROOT, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
    return time.perf_counter() - start, used


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--times", type=int, default=3, help="calls of each kind, of which the fastest counts"
    )
    times = parser.parse_args().times
    for script in SCRIPTS:
        for name, arguments in CALLS.items():
            wall, cpu = min(seconds(script, arguments) for _ in range(times))
            print(f"{script:28} {name:14} {wall:5.2f} s, {cpu:5.2f} CPU-seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
