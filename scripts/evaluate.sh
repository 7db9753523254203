#!/usr/bin/env bash
# Zero-shot accuracy of a checkpoint on ImageNet, without training.
# IMAGENET=./datasets/imagenet/val bash scripts/evaluate.sh logs/drrho_clip/checkpoints/epoch_7.pt ViT-B-16 [FURTHER FLAGS]
# Further flags: --val-data SHARDS for retrieval, --imagenet-v2 FOLDER. Sets of the DataComp benchmark in their
# webdataset layout, wds_TASK_test/, can stand in place of ImageNet's folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

checkpoint=${1:?a checkpoint, LOGS/NAME/checkpoints/epoch_N.pt}
model=${2:?its model: a name of open_clip, or the path of a model config}
shift 2
imagenet=${IMAGENET:-./datasets/imagenet/val}
logs=${LOGS:-./logs}
name=eval_$(basename "$(dirname "$(dirname "$checkpoint")")")_$(basename "$checkpoint" .pt)

if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi

python src/training/main.py \
    --resume "$checkpoint" \
    --zeroshot-frequency 1 \
    --imagenet-val "$imagenet" \
    --batch-size 512 \
    --epochs 0 \
    --workers 6 \
    --model "$model" \
    --name "$name" \
    --logs "$logs" \
    "$@"
