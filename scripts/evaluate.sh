#!/usr/bin/env bash
# Evaluate a checkpoint on the DataComp benchmark's sets, and on further ones in the same folder:
#   bash scripts/evaluate.sh logs/drrho_clip [MODEL] [FLAGS of training.evaluate]
#   DATA_DIR=/data/evalsets bash scripts/evaluate.sh logs/mine/checkpoints/epoch_3.pt my-model.json --tasks imagenet1k
# The first word: a run's folder, a checkpoint, or open_clip's NAME:TAG. MODEL: where the checkpoint does not say it.
# DATA_DIR: the folder that holds the sets (default: ./datasets/datacomp). WORKERS: loader processes of each rank.
# GPUS: how many ranks (default: one). Paths are relative to where you are.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ -n "${IMAGENET-}" ] && [ -z "${DATA_DIR-}" ]; then
  echo "error: IMAGENET=$IMAGENET is not read any more: python -m training.main --epochs 0 --resume CHECKPOINT --model" \
    "MODEL --imagenet-val $IMAGENET evaluates on it; with DATA_DIR this script evaluates on the sets there" >&2
  exit 2
fi
checkpoint=${1:?a folder of a run, a checkpoint, or NAME:TAG}
shift
model=()
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
  model=(--model "$1")
  shift
fi
cores=$(nproc)
launch=(python)
if [ "${GPUS:-1}" -gt 1 ]; then launch=(torchrun --standalone --nproc_per_node="$GPUS"); fi

if [ -f "$repository/.venv/bin/activate" ]; then . "$repository/.venv/bin/activate"; fi

PYTHONPATH="$repository/src${PYTHONPATH:+:$PYTHONPATH}" "${launch[@]}" -m training.evaluate \
    --checkpoint "$checkpoint" \
    --data_dir "${DATA_DIR:-./datasets/datacomp}" \
    --workers "${WORKERS:-$((cores < 6 ? cores : 6))}" \
    "${model[@]}" \
    "$@"
