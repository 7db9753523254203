#!/usr/bin/env bash
# Is this machine sound, and what will it do? See gpu.py.
#   bash benchmarks/gpu.sh [--minutes 15] [--json FILE] [--cpu]
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu.py" "$@"
