#!/usr/bin/env bash
# The 40-epoch CIFAR-10 recipe from scratch with deit_tiny, plain and with ARD+PRM, on one machine.
#
#     launch/gpu_cifar10.sh DATA_DIR OUT_DIR [--config.FIELD=VALUE ...]
#
# DATA_DIR: a TFDS data directory with cifar10 in array_record format (python -m vit_at.prepare
# cifar10). The small files of each run are copied to OUT_DIR. Set LIMIT (seconds) where the machine
# is lent for a time only: the run at hand is then saved, and the same command goes on with it.
set -euo pipefail
cd "$(dirname "$0")/.."
data_dir=$1 out_dir=$2
shift 2
python=${PYTHON:-python3}
deadline=$((SECONDS + ${LIMIT:-1000000}))

for variant in "" ",ard_prm"; do
  run="cifar10_deit_tiny${variant/,/_}"
  status=0
  left=$((deadline > SECONDS ? deadline - SECONDS : 1))
  timeout --signal=TERM "$left" "$python" -m vit_at.main \
    --config="configs/cifar10_sgd.py:scratch,model=deit_tiny_patch16_224$variant" \
    --config.data.dir="$data_dir" --workdir="runs/$run" "$@" || status=$?
  mkdir -p "$out_dir/$run"
  for file in config.json metrics.jsonl results.json per_example.npz; do
    if [ -f "runs/$run/$file" ]; then cp "runs/$run/$file" "$out_dir/$run/"; fi
  done
  if [ "$status" -ne 0 ]; then exit "$status"; fi
done
