#!/usr/bin/env bash
#SBATCH --job-name=medium_fastclipv1 --time=2-00:00:00
#SBATCH --nodes=2 --ntasks-per-node=4 --gres=gpu:4 --cpus-per-task=7 --mem=120G
#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=USR1@120
# recipes/fastclip_v1_cc3m.yaml on the published machines.
# From the repository's root: sbatch scripts/slurm/fastclip_v1_cc3m.sh [FURTHER FLAGS]
exec bash scripts/slurm/train.sh fastclip_v1_cc3m "$@"
