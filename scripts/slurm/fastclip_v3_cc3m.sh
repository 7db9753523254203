#!/usr/bin/env bash
#SBATCH --job-name=medium_fastclipv3
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
# FastCLIP-v3 (robust objective, learnable temperature): ResNet-50 on CC3M, as published (2 nodes with 4 GPUs each).
# From the repository's root: sbatch scripts/slurm/fastclip_v3_cc3m.sh [FURTHER FLAGS]
set -euo pipefail

# Shards whose json carries its sample's row, 0 to 3,318,332, in `key`; 2.7 million could be downloaded.
train_data=${TRAIN_DATA:-'./datasets/cc3m_webdataset/cc3m_train/{00000..00331}.tar'}

. scripts/lib/slurm.sh

srun --kill-on-bad-exit=1 python -u src/training/main.py \
    --save-frequency 1 --save_every_minutes 30 --requeue_on_preempt \
    --train-data "$train_data" \
    --train-num-samples 2723840 --data_size 3318333 \
    --warmup 10000 \
    --batch-size 128 \
    --epochs 37 \
    --workers 6 \
    --model RN50 \
    --name medium_fastclipv3 \
    --seed 2024 \
    --wd 0.1 \
    --local-loss \
    --fastclip --multiply_tau --temperature_scheme global_learnable \
    --lr 1e-3 --lr_tau 2e-4 --lr_tau_scheduler step_thresh --rho 6.5 \
    --gamma 0.2 --gamma_schedule cosine --gamma_decay_epochs 18 \
    --precision amp_bf16 \
    "$@"
