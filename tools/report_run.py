"""Write the report of one or several runs as one HTML file, without network access.

python tools/report_run.py out/cat
python tools/report_run.py out/cat out/cat-lower-rate --output both.html --open
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lowrank.cli.run import run

if __name__ == "__main__":
    run("report")
