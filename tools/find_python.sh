# Functions that find a Python interpreter, for run_demo.sh, run_tests.sh, tools/setup_env.sh and flux_dir/common.sh.

# venv_python DIR: the interpreter of the virtual environment DIR (bin/, on Windows Scripts/); fails when there is none.
venv_python() {
  local file
  for file in "$1/bin/python" "$1/Scripts/python.exe"; do
    if [[ -x $file ]]; then
      printf '%s\n' "$file"
      return 0
    fi
  done
  return 1
}

# system_python: a python of at least 3.10 to make an environment with ($PYTHON if set); fails when there is none.
system_python() {
  local name
  for name in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10 python; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
      command -v "$name"
      return 0
    fi
  done
  return 1
}

# ready_python ROOT: the first interpreter that can import accelerate: $PYTHON alone if set, else the active
# virtual or conda environment, else ROOT/.venv, else the one on PATH; fails when none can.
ready_python() {
  local candidate candidates=()
  if [[ -n ${PYTHON:-} ]]; then
    candidates=("$PYTHON")
  else
    candidates=(
      "$(venv_python "${VIRTUAL_ENV:-/nonexistent}" || true)"
      "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}"
      "$(venv_python "$1/.venv" || true)"
      python3 python
    )
  fi
  for candidate in "${candidates[@]}"; do
    if [[ -n $candidate ]] && "$candidate" -c '
import importlib.util, sys
sys.exit(importlib.util.find_spec("accelerate") is None)' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return 0
    fi
  done
  return 1
}
