#!/usr/bin/env bash
# Evaluate a checkpoint without training: zero-shot accuracy on ImageNet, retrieval, or both.
#   IMAGENET=./datasets/imagenet/val bash scripts/evaluate.sh logs/drrho_clip/checkpoints/epoch_7.pt ViT-B-16 [FLAGS]
#   bash scripts/evaluate.sh logs/mine/checkpoints/epoch_3.pt my-model.json --val-data 'shards/{00000..00003}.tar'
# IMAGENET: an image folder, or a set of the DataComp benchmark in its webdataset layout, wds_TASK_test/ (default:
# ./datasets/imagenet/val, where it is there). LOGS, WORKERS: where results go, loader processes. Paths are relative
# to where you are.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

checkpoint=${1:?a checkpoint, LOGS/NAME/checkpoints/epoch_N.pt}
model=${2:?its model: a name of open_clip, or the path of a model config}
shift 2
imagenet=${IMAGENET-}
if [ -z "$imagenet" ] && [ -e ./datasets/imagenet/val ]; then imagenet=./datasets/imagenet/val; fi
sets=()
if [ -n "$imagenet" ]; then sets=(--imagenet-val "$imagenet" --zeroshot-frequency 1); fi
name=eval_$(basename "$(dirname "$(dirname "$checkpoint")")")_$(basename "$checkpoint" .pt)
cores=$(nproc)

if [ -f "$repository/.venv/bin/activate" ]; then . "$repository/.venv/bin/activate"; fi

python "$repository/src/training/main.py" \
    --resume "$checkpoint" \
    "${sets[@]}" \
    --batch-size 512 \
    --epochs 0 \
    --workers "${WORKERS:-$((cores < 6 ? cores : 6))}" \
    --model "$model" \
    --name "$name" \
    --logs "${LOGS:-./logs}" \
    "$@"
