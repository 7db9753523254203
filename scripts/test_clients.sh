#!/usr/bin/env bash
# The tests marked `client`: what other programs make of our files, and whether clip_benchmark finds the same figures.
# Their packages go into a virtual environment of their own, .venv-clients: clip_benchmark needs an older NumPy.
# Usage: bash scripts/test_clients.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/lib/venv.sh
use_test_venv
folder=.venv-clients
packages=(-r requirements-eval.txt 'onnx>=1.16' 'onnxscript>=0.2' onnxruntime)
wanted=$(cat requirements-eval.txt .venv/.installed; printf '%s\n' "${packages[@]}")
if [ "$(cat "$folder/.installed" 2>/dev/null)" != "$wanted" ]; then
  echo "installing ${packages[*]} into $folder"
  rm -rf "$folder"
  python -m venv --without-pip "$folder"
  site='import sysconfig; print(sysconfig.get_path("purelib"))'
  # Behind its own packages come those of .venv, so that torch, open_clip and pip itself are not installed twice.
  python -c "$site" >"$("$folder/bin/python" -c "$site")/behind.pth"
  "$folder/bin/python" -m pip install --quiet --no-compile "${packages[@]}"
  printf '%s\n' "$wanted" >"$folder/.installed"
fi
export OMP_WAIT_POLICY=PASSIVE PYTHONPATH="$PWD/src"
"$folder/bin/python" -m pytest -q -m client --numprocesses 2 --dist loadfile tests/evaluation tests/exporting "$@"
