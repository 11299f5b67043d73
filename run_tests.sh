#!/usr/bin/env bash
# The test suite in the environment of this repository: no GPU, no network once installed.
#     bash run_tests.sh                                  everything
#     bash run_tests.sh --fast                           without the tests that are marked slow
#     bash run_tests.sh tests/contract/test_tree.py -x   any options and paths of pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

options=()
for option in "$@"; do
    if [[ $option == --fast ]]; then options+=(-m "not slow"); else options+=("$option"); fi
done

bash tools/setup_env.sh dev
source tools/find_python.sh

# One thread: the matrices of the tests are tiny, so more threads would wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export MPLBACKEND=Agg TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# Each process starts with contiguous tests, so that tests of one file share its fixtures. A process without tests takes
# over tests of another.
exec "$(venv_python .venv)" -m pytest -q -n "${TEST_PROCESSES:-2}" --dist worksteal ${options[@]+"${options[@]}"}
