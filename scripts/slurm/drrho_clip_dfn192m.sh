#!/usr/bin/env bash
#SBATCH --job-name=drrho_clip
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
# DRRho-CLIP: ViT-B/16 on DFN-192M under OpenAI's ViT-B/32, as published (2 nodes with 4 GPUs each; 2 days on H100).
# From the repository's root: sbatch scripts/slurm/drrho_clip_dfn192m.sh [FURTHER FLAGS]
set -euo pipefail

# Shards whose json carries its sample's row, 0 to 255,019,999, in `key`; about 192 million could be downloaded.
train_data=${TRAIN_DATA:-'./datasets/dfn2b/large/shards/000{00000..19245}.tar::./datasets/dfn2b/large_disjoint/shards/000{19246..29794}.tar'}

. scripts/lib/slurm.sh

srun --kill-on-bad-exit=1 python -u src/training/main.py \
    --save-frequency 1 --save_every_minutes 30 --requeue_on_preempt \
    --train-data "$train_data" \
    --train-num-samples 192160462 --data_size 255020000 \
    --warmup 500 \
    --batch-size 640 \
    --epochs 7 \
    --workers 6 \
    --model ViT-B-16 \
    --name drrho_clip \
    --seed 2025 \
    --wd 0.2 \
    --local-loss \
    --fastclip --multiply_tau --temperature_scheme global_constant --temperature 0.01 \
    --lr 3.125e-4 --lr_tau 0.0 --lr_tau_scheduler const --rho 11.0 --fastclip_eps 1e-4 \
    --gamma 1.0 --gamma_schedule cosine --gamma_decay_epochs 7 \
    --ref_model ViT-B-32 --ref_model_pretrained openai \
    --precision amp_bf16 \
    "$@"
