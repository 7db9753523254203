#!/usr/bin/env bash
# From a bare machine to a table and a report: what a reference does for a CLIP model, in minutes on two CPU cores.
#
# A reference is trained on the icons of 52 sets; then the same target three times on those of 52 others, with the
# same budget, sample order and initial weights: as OpenCLIP, as FastCLIP-v3, and as DRRho-CLIP, which is FastCLIP-v3
# under that reference. All are tested on 21 sets that none has seen. See docs/demo.md.
#
# Usage: bash scripts/demo.sh [SEED]     What is there already, complete and made by the same flags, is not made again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/lib/venv.sh
use_venv requirements-training.txt "resvg-py>=0.5"

seed=${1:-0}
data=data/icons
logs=logs/demo/seed_$seed
model=assets/models/icons-small.json
part=43008 # pictures: half of those for targets, the unit of all budgets
target_parts=3
reference_parts=6

# The loader's process shares the cores with the threads of the model: one that waits must not keep its core busy.
export OMP_WAIT_POLICY=PASSIVE
# Else glibc hands the large blocks of a step back to the kernel, which clears their pages for the next one.
export MALLOC_TRIM_THRESHOLD_=$((1 << 30)) MALLOC_MMAP_THRESHOLD_=$((1 << 30))

python scripts/icons.py --out $data

# number HALF FIELD: a number out of a set's description.
number() { python -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$data/$1/set.json" "$2"; }

# train NAME HALF PARTS FLAGS...: one run of the trainer, unless it is there: done, with these flags and on these data.
train() {
  local name=$1 half=$2 parts=$3 folder=$logs/$1 flags inputs made_by start
  shift 3
  flags=(
    --train-data "$data/$half/{00000..$(printf %05d $(($(number "$half" shards) - 1)))}.tar"
    --data_size "$(number "$half" samples)" --train-num-samples $part --epochs "$parts"
    --model $model --batch-size 128 --workers 1 --precision fp32 --seed "$seed"
    --lr 3e-3 --beta2 0.98 --wd 0.1 --warmup 100
    --eval_data_dir $data --eval_tasks wds_icons_test,retrieval_test --zeroshot-frequency $((parts > 3 ? parts / 3 : 1))
    --save-frequency 0 --log-every-n-steps 84 --logs "$logs" --name "$name" "$@"
  )
  inputs=("$data/recipe.json")
  if [[ " $* " == *" --ref_model_checkpoint "* ]]; then inputs+=("$logs/reference/made_by"); fi
  made_by=$(printf '%s\n' "${flags[@]}" && cat "${inputs[@]}")
  if [ -e "$folder/job.done" ] && [ "$(cat "$folder/made_by" 2>/dev/null)" = "$made_by" ]; then
    echo "$folder: there already, trained in $(cat "$folder/seconds") s"
    return
  fi
  echo "training $name"
  rm -rf "$folder"
  start=$SECONDS
  python -m training.main "${flags[@]}"
  echo $((SECONDS - start)) >"$folder/seconds"
  printf '%s\n' "$made_by" >"$folder/made_by"
}

fastclip=(
  --fastclip --multiply_tau --temperature_scheme global_learnable --rho 6.5 --lr_tau 1e-3
  --lr_tau_scheduler step_thresh --gamma 0.8 --gamma_schedule cosine --gamma_decay_epochs 2
)

train reference a $reference_parts
train openclip b $target_parts
train fastclip_v3 b $target_parts "${fastclip[@]}"
train drrho_clip b $target_parts "${fastclip[@]}" \
  --ref_model $model --ref_model_checkpoint "$logs/reference/checkpoints/epoch_$reference_parts.pt"

# The page says what the last of its runs has right and the first has wrong.
python -m training.report "$logs"/{fastclip_v3,openclip,reference,drrho_clip} --out "$logs/report.html"
cp "$logs/report_png/summary.png" "$logs/report.png"
python scripts/demo/table.py "$logs"
