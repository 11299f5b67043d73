#!/usr/bin/env bash
# The whole test suite in the environment of this repository: no GPU, no network once installed.
#     bash run_tests.sh                         everything
#     bash run_tests.sh tests/contract/test_tree.py -x   what pytest is told
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

bash tools/setup_env.sh dev
source tools/find_python.sh

# The tests' matrices are tiny: more threads only make them wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export MPLBACKEND=Agg TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# A file's tests stay in one process, because they share what is slow to make.
exec "$(venv_python .venv)" -m pytest -q -n "${TEST_PROCESSES:-2}" --dist loadfile "$@"
