#!/usr/bin/env bash
#SBATCH --job-name=train --time=2-00:00:00
#SBATCH --nodes=2 --ntasks-per-node=4 --gres=gpu:4 --cpus-per-task=7 --mem=120G
#SBATCH --output=%x_%j.log --open-mode=append --requeue --signal=USR1@120
# Trains a recipe: a name in recipes/, or the path of a YAML file of flags.
# From the repository's root: sbatch [OPTIONS] scripts/slurm/train.sh RECIPE [FURTHER FLAGS]
# Further flags win over TRAIN_DATA=SHARDS in the environment, and that wins over the recipe.
# sbatch reads #SBATCH lines only in the script that it is given, so the scripts of the published runs have their own.
set -euo pipefail

. scripts/lib/recipe.sh
recipe=$(recipe_file "$@")
shift

. scripts/lib/slurm.sh

# --requeue_on_preempt belongs to --requeue and --signal above.
flags=(--config_file "$recipe" --requeue_on_preempt ${TRAIN_DATA:+--train-data "$TRAIN_DATA"} "$@")
python scripts/lib/check_flags.py "${flags[@]}"
srun --kill-on-bad-exit=1 bash scripts/lib/task.sh python -u src/training/main.py "${flags[@]}"
