#!/usr/bin/env bash
# The CIFAR-10 recipe on one machine without published weights: natural training of a model, and from
# there AT, plain and with ARD+PRM.
#
#     [MODEL=NAME] [NATURAL="--config.FIELD=VALUE ..."] \
#         launch/gpu_cifar10.sh DATA_DIR OUT_DIR [--config.FIELD=VALUE ...]
#
# DATA_DIR: a TFDS data directory with cifar10 in array_record format (python -m vit_at.prepare
# cifar10). The fields are those of the two adversarial runs, NATURAL has those of the natural one;
# MODEL is deit_tiny_patch16_224 by default. The records and the best weights of each run, as an
# export, go to OUT_DIR. Set LIMIT (seconds) where the machine is lent for a time only: the run at
# hand is then saved, and the same command goes on with it.
set -euo pipefail
cd "$(dirname "$0")/.."
data_dir=$1 out_dir=$2 model=${MODEL:-deit_tiny_patch16_224}
shift 2
python=${PYTHON:-python3}
deadline=$((SECONDS + ${LIMIT:-1000000}))

# Trains in runs/RUN by a recipe, and brings what came of it to OUT_DIR.
train() {
  local run=$1 recipe=$2 status=0
  shift 2
  local left=$((deadline > SECONDS ? deadline - SECONDS : 1))
  timeout --signal=TERM "$left" "$python" -m vit_at.main --config="configs/$recipe" \
    --config.data.dir="$data_dir" --workdir="runs/$run" "$@" || status=$?
  mkdir -p "$out_dir/$run"
  for file in config.json metrics.jsonl results.json per_example.npz; do
    if [ -f "runs/$run/$file" ]; then cp "runs/$run/$file" "$out_dir/$run/"; fi
  done
  if [ -f "runs/$run/config.json" ]; then
    "$python" -m vit_at.export "runs/$run" --output="$out_dir/$run/export" || status=$((status ? status : 1))
  fi
  if [ "$status" -ne 0 ]; then exit "$status"; fi
}

natural="cifar10_pretrain-$model"
# shellcheck disable=SC2086  # NATURAL is a list of words
train "$natural" "cifar10_pretrain.py:model=$model" ${NATURAL:-}
for variant in "" ",ard_prm"; do
  train "cifar10_sgd-$model${variant/,/-}" "cifar10_sgd.py:model=$model$variant" \
    --config.model.pretrained="runs/$natural" "$@"
done
