#!/usr/bin/env bash
# The whole test suite, on a bare machine too: installs what it needs into .venv, lints, checks types, runs pytest.
# Usage: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/lib/venv.sh
use_test_venv
# Idle threads sleep: spinning ones take the cores from other ranks' work.
export OMP_WAIT_POLICY=PASSIVE
# Tests start programs by the hundred, which read their bytecode instead of making it.
unset PYTHONDONTWRITEBYTECODE
ruff check .
ruff format --check .
mypy
# One file of tests more than there are cores at a time, at most four: many tests wait more than they compute.
cores=$(nproc)
processes=$((cores < 3 ? cores + 1 : 4))
# In the order of tests/conftest.py, which has the longest files first.
python -m pytest -q --numprocesses "$processes" --dist loadfile --no-loadscope-reorder "$@"
