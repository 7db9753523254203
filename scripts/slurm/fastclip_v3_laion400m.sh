#!/usr/bin/env bash
#SBATCH --job-name=xlarge_fastclipv3
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=6
#SBATCH --mem=120G
#SBATCH --time=2-00:00:00
#SBATCH --output=%x_%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120
# FastCLIP-v3: ViT-B/16 on LAION400M, as published (4 nodes with 4 GPUs each), in parts that fit a queue's time limit:
#   sbatch scripts/slurm/fastclip_v3_laion400m.sh 3     epochs 1 to 3
#   sbatch scripts/slurm/fastclip_v3_laion400m.sh 6     goes on from there to 6, and so on until 30
# From the repository's root: sbatch scripts/slurm/fastclip_v3_laion400m.sh LAST_EPOCH [FURTHER FLAGS]
set -euo pipefail

# Shards whose json carries its sample's row, 0 to 414,079,999, in `key`; 316 million could be downloaded.
train_data=${TRAIN_DATA:-'./datasets/laion400m/laion400m-data/{00000..41407}.tar'}
name=xlarge_fastclipv3
last_epoch=${1:?which epoch this part ends with, for example 3}
shift

. scripts/lib/slurm.sh

resume=()
if compgen -G "logs/$name/checkpoints/*.pt" >/dev/null; then resume=(--resume latest); fi

srun --kill-on-bad-exit=1 python -u src/training/main.py \
    --save-frequency 1 --save_every_minutes 30 --requeue_on_preempt \
    --train-data "$train_data" \
    --train-num-samples 315658316 --data_size 414080000 \
    --warmup 13200 \
    --batch-size 320 \
    --epochs 30 --stop_epochs "$last_epoch" "${resume[@]}" \
    --workers 6 \
    --model ViT-B-16 \
    --name "$name" \
    --seed 2024 \
    --wd 0.2 \
    --local-loss \
    --fastclip --multiply_tau --temperature_scheme global_learnable \
    --lr 2e-4 --lr_min 4e-5 --lr_tau 5e-5 --lr_tau_scheduler step_thresh --rho 16.0 --fastclip_eps 1e-6 \
    --gamma 0.8 --gamma_schedule cosine --gamma_decay_epochs 10 \
    --precision amp_bf16 \
    "$@"
