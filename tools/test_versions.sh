#!/usr/bin/env bash
# The fast tests with the oldest versions that requirements.txt allows, in an environment of its own.
#     bash tools/test_versions.sh [FOLDER] [OPTIONS OF PYTEST]
# run_tests.sh (also in continuous integration) uses the newest tested versions, which constraints.txt pins.
# TORCH=2.6.0 chooses another torch than the pinned one: older builds with CUDA are a download of several GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/find_python.sh

folder="${1:-${TMPDIR:-/tmp}/lowrank-oldest}"
shift || true
base="$(system_python)" || { echo "test_versions: no Python 3.10 or newer found; set PYTHON" >&2; exit 1; }
[[ -x "$folder/bin/python" ]] || "$base" -m venv "$folder"
python="$(venv_python "$folder")"

# name>=1.2.3,<2 becomes name==1.2.3; style checkers are left out
sed -n -E 's/^([A-Za-z0-9_-]+)>=([0-9.]+).*/\1==\2/p' requirements.txt requirements-dev.txt \
  | grep -v -E '^(torch|ruff|pyright)==' > "$folder/oldest.txt"
torch="torch==${TORCH:-$(sed -n 's/^torch==//p' constraints.txt)}"
"$python" -m pip install -q --disable-pip-version-check "$torch"
"$python" -m pip install -q --disable-pip-version-check "$torch" -r "$folder/oldest.txt"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MPLBACKEND=Agg TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# Warnings are no errors here: old libraries warn about each other.
exec "$python" -m pytest -q -n "${TEST_PROCESSES:-2}" --dist worksteal -W default -m "not slow" \
  --ignore tests/contract/test_tree.py --ignore tests/contract/test_docs.py "$@"
