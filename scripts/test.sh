#!/usr/bin/env bash
# The whole test suite, on a bare machine too: installs what it needs into .venv, lints, checks types, runs pytest.
# Usage: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/lib/venv.sh
use_venv requirements-training.txt 'pytest>=8.0' 'pytest-xdist>=3.6' 'ruff>=0.6' 'hypothesis>=6.100' 'mypy>=1.11' \
  'pandas>=2.0' 'pyarrow>=15.0' 'scikit-learn>=1.2' # the extra [test] of pyproject.toml
# Idle threads sleep: spinning ones take the cores from other ranks' work.
export OMP_WAIT_POLICY=PASSIVE
ruff check .
ruff format --check .
mypy
# One file of tests more than there are cores at a time, at most four: many tests wait more than they compute.
cores=$(nproc)
processes=$((cores < 3 ? cores + 1 : 4))
python -m pytest -q --numprocesses "$processes" --dist loadfile "$@"
