#!/usr/bin/env bash
# Create .venv in the repository root and install the tested versions into it, unless that is already done.
#     bash tools/setup_env.sh        what the toolkit needs
#     bash tools/setup_env.sh dev    also what the tests and checks need
# PYTHON=/path/to/python3.12 chooses the interpreter that creates .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/find_python.sh

kind="${1:-run}"
case $kind in
  run) requirements=requirements.txt ;;
  dev) requirements=requirements-dev.txt ;;
  *) echo "setup_env.sh: '$kind' is neither 'run' nor 'dev'; example: bash tools/setup_env.sh dev" >&2; exit 2 ;;
esac

fail() {
  echo "setup: $*" >&2
  exit 1
}

make_environment() {
  local base
  base="$(system_python)" || fail "no Python 3.10 or newer found (python3 is $(python3 -V 2>&1 || echo absent));" \
    "install one, or name it: PYTHON=/path/to/python3.12 bash run_demo.sh"
  echo "setup: making .venv with $("$base" -V 2>&1) ($base)"
  trap 'rm -rf .venv' EXIT  # the next run would take an incomplete .venv for a complete one
  "$base" -m venv .venv || fail "'$base -m venv .venv' failed (see above); on Debian or Ubuntu install the package" \
    "python3-venv, then run this command again"
  trap - EXIT
}

# fingerprint PYTHON: a hash of the interpreter's version and of the requirement files.
fingerprint() {
  "$1" -c '
import hashlib, sys
digest = hashlib.sha256(sys.version.encode())
for name in sys.argv[1:]:
    digest.update(open(name, "rb").read())
print(digest.hexdigest())' constraints.txt requirements.txt requirements-dev.txt
}

install() {
  local pip=("$1" -m pip install --disable-pip-version-check -c constraints.txt) torch
  [[ -t 1 ]] || pip+=(-q)
  torch="$(grep '^torch==' constraints.txt)"
  # torch first and with its exact version: otherwise another package could install a newer, untested build.
  echo "setup: installing $torch (with CUDA it is a download of several GB, once)"
  "${pip[@]}" "$torch" || return 1
  echo "setup: installing $requirements"
  "${pip[@]}" -r "$requirements" || return 1
  "$1" -c 'import torch' || return 1
}

[[ -e .venv ]] || make_environment
python="$(venv_python .venv)" && now="$(fingerprint "$python" 2>/dev/null)" \
  || fail ".venv is there but its python does not run (was it moved, or its Python removed?);" \
    "delete the folder .venv and run this command again"

# What 'dev' installs includes what 'run' needs.
for stamp in ".venv/installed-$kind" .venv/installed-dev; do
  if [[ -f $stamp && $(<"$stamp") == "$now" ]]; then
    exit 0
  fi
done

rm -f ".venv/installed-$kind"
install "$python" || fail "the installation failed (see above) and will be tried again next time;" \
  "check the connection and the free disk space ($(df -h . | awk 'NR == 2 {print $4}') free here)"
printf '%s\n' "$now" > ".venv/installed-$kind.part"
mv ".venv/installed-$kind.part" ".venv/installed-$kind"
echo "setup: done"
