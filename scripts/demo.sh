#!/usr/bin/env bash
# From a bare machine to a table: DRRho-CLIP beside FastCLIP and OpenCLIP, on real pictures, in minutes on a CPU.
#
# A reference is trained on Google's emoji; then the same target three times on Microsoft's (Fluent 3D), with the same
# budget, sample order and initial weights: as OpenCLIP, as FastCLIP-v3, and as DRRho-CLIP under that reference. All
# are tested on Twitter's emoji, a style that none has seen. See docs/demo.md.
#
# Usage: bash scripts/demo.sh     What is there already, complete and made by the same flags, is not made again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/lib/venv.sh
use_venv requirements-training.txt

sets=data/emoji
logs=logs/demo
target=assets/models/emoji-resnet10.json
reference=assets/models/emoji-resnet10.json
epochs=24
reference_epochs=36

# The loader's process shares the cores with the threads of the model: one that waits must not keep its core busy.
export OMP_WAIT_POLICY=PASSIVE

python scripts/emoji.py train --vendor google --out $sets/google-train
python scripts/emoji.py train --vendor fluent --out $sets/fluent-train
python scripts/emoji.py retrieval --vendor twitter --out $sets/twitter-test
python scripts/emoji.py classification --vendor twitter --out $sets/wds_emoji_test

# number SET FIELD: a number out of a set's description.
number() { python -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$sets/$1/set.json" "$2"; }

# train NAME SET FLAGS...: one run of the trainer, unless it is there: done, with these flags and on these shards.
train() {
  local name=$1 set=$2 folder=$logs/$1 shards pictures rows flags inputs made_by start
  shift 2
  shards=$(number "$set" shards) pictures=$(number "$set" pictures) rows=$(number "$set" samples)
  flags=(
    --train-data "$sets/$set/{00000..$(printf %05d $((shards - 1)))}.tar"
    --train-num-samples "$pictures" --data_size "$rows"
    --batch-size 128 --workers 1 --precision fp32 --seed 0
    --lr 1.5e-3 --beta2 0.98 --wd 0.1 --warmup 50 --aug-cfg "scale=(0.9,1.0)"
    --val-data "$sets/twitter-test/{00000..00003}.tar" --imagenet-val "$sets/wds_emoji_test"
    --val-frequency 6 --zeroshot-frequency 6 --save-frequency 0 --log-every-n-steps 1000
    --logs "$logs" --name "$name" "$@"
  )
  inputs=("$sets"/*/set.json)
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

fastclip=(--fastclip --multiply_tau --temperature_scheme global_learnable --rho 6.5 --lr_tau 1e-3 --lr_tau_scheduler step_thresh)

train reference google-train --model $reference --epochs $reference_epochs "${fastclip[@]}" \
  --gamma 0.8 --gamma_schedule cosine --gamma_decay_epochs $((reference_epochs / 2))

same=(--model $target --epochs $epochs)
gamma=(--gamma 0.8 --gamma_schedule cosine --gamma_decay_epochs $((epochs / 2)))
checkpoint=$logs/reference/checkpoints/epoch_$reference_epochs.pt

train openclip fluent-train "${same[@]}"
train fastclip_v3 fluent-train "${same[@]}" "${fastclip[@]}" "${gamma[@]}"
train drrho_clip fluent-train "${same[@]}" "${fastclip[@]}" "${gamma[@]}" \
  --ref_model $reference --ref_model_checkpoint "$checkpoint"

python scripts/demo/report.py --logs $logs --retrieval $sets/twitter-test --classification $sets/wds_emoji_test \
  --model $target --ref-model $reference
