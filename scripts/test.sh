#!/usr/bin/env bash
# The whole test suite, on a bare machine too: installs what it needs into .venv, lints, checks types, runs pytest.
# Usage: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/lib/venv.sh
use_venv requirements-training.txt 'pytest>=8.0' 'pytest-xdist>=3.6' 'ruff>=0.6' 'hypothesis>=6.100' 'mypy>=1.11'
# Idle threads sleep: spinning ones take the cores from other ranks' work.
export OMP_WAIT_POLICY=PASSIVE
ruff check .
ruff format --check .
mypy
# Two to four files of tests at a time: most tests wait more than they compute.
python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
