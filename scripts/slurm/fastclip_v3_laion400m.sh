#!/usr/bin/env bash
#SBATCH --job-name=xlarge_fastclipv3 --time=2-00:00:00
#SBATCH --nodes=4 --ntasks-per-node=4 --gres=gpu:4 --cpus-per-task=7 --mem=120G
#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=USR1@120
# recipes/fastclip_v3_laion400m.yaml on the published machines, in parts that fit a queue's time limit:
#   sbatch scripts/slurm/fastclip_v3_laion400m.sh 3     epochs 1 to 3
#   sbatch scripts/slurm/fastclip_v3_laion400m.sh 6     goes on from there to 6, and so on until 30
# From the repository's root: sbatch scripts/slurm/fastclip_v3_laion400m.sh LAST_EPOCH [FURTHER FLAGS]
set -euo pipefail

last_epoch=${1:?which epoch this part ends with, for example 3}
shift
resume=()
if compgen -G 'logs/xlarge_fastclipv3/checkpoints/*.pt' >/dev/null; then resume=(--resume latest); fi

exec bash scripts/slurm/train.sh fastclip_v3_laion400m --stop_epochs "$last_epoch" "${resume[@]}" "$@"
