#!/usr/bin/env bash
# DRRho-CLIP on your own data, on the GPUs of this machine (on a machine without any: one CPU process).
# TRAIN_DATA='./shards/{00000..00099}.tar' SAMPLES=1000000 bash scripts/single_node.sh [FURTHER FLAGS]
# RECIPE=NAME trains another recipe than drrho_clip: a name in recipes/, or the path of a YAML file of flags.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

train_data=${TRAIN_DATA:?webdataset shards; the json of each sample carries its row in \`key\`}
samples=${SAMPLES:?how many samples an epoch sees: the size of the set}
data_size=${DATA_SIZE:-$samples} # above the largest \`key\`: more than SAMPLES where some could not be downloaded
restarts=${RESTARTS:-0}          # how often torchrun starts all ranks again, from the last checkpoint, where one died
visible_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    awk -v RS='[,\n]' '$1 == "-1" { exit } NF { n++ } END { print n + 0 }' <<<"$CUDA_VISIBLE_DEVICES"
  else
    nvidia-smi --list-gpus 2>/dev/null | grep -c GPU || true
  fi
}
ranks=${RANKS:-$(visible_gpus)}

. scripts/lib/recipe.sh
recipe=$(recipe_file "${RECIPE:-drrho_clip}" "$@")

# Where they are set, these win over the recipe. REFERENCE_WEIGHTS: a tag of open_clip, or a file.
own=(
  ${MODEL:+--model "$MODEL"}
  ${REFERENCE:+--ref_model "$REFERENCE"}
  ${REFERENCE_WEIGHTS:+--ref_model_pretrained "$REFERENCE_WEIGHTS"}
  ${NAME:+--name "$NAME"}
  ${LOGS:+--logs "$LOGS"}
)
if [ -n "${EPOCHS:-}" ]; then
  # The authors' advice: gamma = min(1, 4.177 E^-0.7265) for E epochs, reached at the end.
  gamma=$(awk -v epochs="$EPOCHS" 'BEGIN { g = 4.177 * epochs ^ -0.7265; printf "%.4f", g < 1 ? g : 1 }')
  own+=(--epochs "$EPOCHS" --gamma "$gamma" --gamma_decay_epochs "$EPOCHS")
fi

if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

# The lone -- keeps torchrun's own parser away from --logs.
torchrun --standalone --nproc_per_node="$((ranks > 0 ? ranks : 1))" --max-restarts="$restarts" -m training.main -- \
    --config_file "$recipe" --train-data "$train_data" --train-num-samples "$samples" --data_size "$data_size" \
    "${own[@]}" "$@"
