#!/usr/bin/env bash
# DRRho-CLIP on your own data, on the GPUs of this machine (on a machine without any: one CPU process).
# TRAIN_DATA='./shards/{00000..00099}.tar' SAMPLES=1000000 bash scripts/single_node.sh [FURTHER FLAGS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

train_data=${TRAIN_DATA:?webdataset shards; the json of each sample carries its row in \`key\`}
samples=${SAMPLES:?how many samples an epoch sees: the size of the set}
data_size=${DATA_SIZE:-$samples} # above the largest \`key\`: more than SAMPLES where some could not be downloaded
model=${MODEL:-ViT-B-16}
reference=${REFERENCE:-ViT-B-32}
reference_weights=${REFERENCE_WEIGHTS:-openai} # a tag of open_clip, or a file
epochs=${EPOCHS:-10}
logs=${LOGS:-./logs}
name=${NAME:-drrho_clip}
restarts=${RESTARTS:-0} # how often torchrun starts all ranks again, from the last checkpoint, where one died
ranks=${RANKS:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c GPU || true)}

if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

# The authors' advice: gamma = min(1, 4.177 E^-0.7265) for E epochs, reached at the end.
gamma=$(awk -v epochs="$epochs" 'BEGIN { g = 4.177 * epochs ^ -0.7265; printf "%.4f", g < 1 ? g : 1 }')

# The lone -- keeps torchrun's own parser away from --logs.
torchrun --standalone --nproc_per_node="$((ranks > 0 ? ranks : 1))" --max-restarts="$restarts" -m training.main -- \
    --train-data "$train_data" \
    --train-num-samples "$samples" --data_size "$data_size" \
    --warmup 500 \
    --batch-size 640 \
    --epochs "$epochs" \
    --workers 6 \
    --model "$model" \
    --name "$name" \
    --seed 2025 \
    --wd 0.2 \
    --fastclip --multiply_tau --temperature_scheme global_constant --temperature 0.01 \
    --lr 3.125e-4 --lr_tau 0.0 --lr_tau_scheduler const --rho 11.0 --fastclip_eps 1e-4 \
    --gamma "$gamma" --gamma_schedule cosine --gamma_decay_epochs "$epochs" \
    --ref_model "$reference" --ref_model_pretrained "$reference_weights" \
    --precision amp_bf16 \
    --logs "$logs" \
    "$@"
