#!/usr/bin/env bash
#SBATCH --job-name=large_fastclipv3
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=6
#SBATCH --mem=120G
#SBATCH --time=2-00:00:00
#SBATCH --output=%x_%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@120
# FastCLIP-v3: ViT-B/32 on CC12M, as published (2 nodes with 4 GPUs each).
# From the repository's root: sbatch scripts/slurm/fastclip_v3_cc12m.sh [FURTHER FLAGS]
set -euo pipefail

# Shards whose json carries its sample's row, 0 to 12,423,373, in `key`; 9.2 million could be downloaded.
train_data=${TRAIN_DATA:-'./datasets/cc12m_webdataset/cc12m/{00000..01242}.tar'}

. scripts/lib/slurm.sh

srun --kill-on-bad-exit=1 python -u src/training/main.py \
    --save-frequency 1 --save_every_minutes 30 --requeue_on_preempt \
    --train-data "$train_data" \
    --train-num-samples 9187328 --data_size 12423374 \
    --warmup 10000 \
    --batch-size 256 \
    --epochs 33 \
    --workers 6 \
    --model ViT-B-32 \
    --name large_fastclipv3 \
    --seed 2024 \
    --wd 0.1 \
    --local-loss \
    --fastclip --multiply_tau --temperature_scheme global_learnable \
    --lr 4e-4 --lr_tau 1e-4 --lr_tau_scheduler step_thresh --rho 8.5 \
    --gamma 0.2 --gamma_schedule cosine --gamma_decay_epochs 16 \
    --precision amp_bf16 \
    "$@"
