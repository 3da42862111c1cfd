#!/usr/bin/env bash
# One piece of the measurements on one GPU, in under ten minutes; JSON files go to OUT_DIR.
#
#     launch/gpu_benchmark.sh PIECE OUT_DIR [--smoke]
#
#     tiny small base   a training step beside eager and compiled PyTorch: deit_tiny 32/4 at batch
#                       64 and 1024, deit_small 224/16 at 128, vit_base 224/16 at 64
#     trace             the time of each kernel of a step
#     attention flags   variants of our step: cuDNN's attention or the formula; options of XLA
#     evaluation        the same options for PGD-10 in float32: its time, and that of the first run
#     precision         presets of float32 products: accuracy and time
#     autoattack        the standard attacks on 1 000 CIFAR-10 images and a packaged model
#     train             the CIFAR-10 recipe, natural training first, then AT, plain and with ARD and
#                       PRM; the same command goes on
#
# Needs this package, torch and timm for the first three, and DATA_DIR (a TFDS directory with
# cifar10) for the last three. launch/gpu_pack.sh packs what a machine without an index lacks.
# LIMIT: seconds for the piece (default 570). --smoke: tiny sizes, to try it on a CPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
if [ $# -lt 2 ]; then
  echo "usage: launch/gpu_benchmark.sh tiny|small|base|trace|attention|flags|evaluation|precision|autoattack|train OUT_DIR [--smoke]" >&2
  exit 2
fi
piece=$1 out=$2 smoke=${3:-}
export PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
deadline=$((SECONDS + ${LIMIT:-570}))
failed=0
mkdir -p "$out"

# Runs a command for at most SECONDS; one that fails must not cost those after it.
limited() {
  local seconds=$1 name=$2
  shift 2
  local left=$((deadline - SECONDS))
  if [ "$left" -gt 0 ]; then
    timeout "$((seconds < left ? seconds : left))" "$@" 2>&1 | tee "$out/$name.txt" && return
  fi
  echo "$name: ended with an error, or at its time limit" | tee -a "$out/$name.txt" >&2
  failed=1
}
benchmark() {
  local seconds=$1 name=$2 script=$3
  shift 3
  limited "$seconds" "$name" "$python" "benchmarks/$script" "$@" --out "$out/$name.json"
}

tiny=deit_tiny_patch16_224@32/4 small=deit_small_patch16_224@224/16 base=vit_base_patch16_224@224/16
batches=(64 1024 128 64) size=() few=() presets=() against=() traced=() fields=()
if [ "$smoke" ]; then
  tiny=deit_tiny_patch16_224@32/8 small=$tiny base=$tiny batches=(4 8 4 4)
  size=(--attack_steps 1 --depth 2 --repetitions 3 --seconds 1) against=(--against eager)
  traced=(--attack_steps 1 --depth 2 --steps 2)
  few=(--num_examples=4 --batch_size=4)
  presets=(--emulate --images 8 --steps 1)
  fields=(--config.data.train_split='train[:1088]' --config.data.validation_examples=64
    --config.model.depth=1 --config.batch_size=64 --config.epochs=1 --config.masking.warmup_epochs=0.5
    --config.optimizer.warmup_epochs=0.2 --config.eval.num_examples=32 --config.eval.attacks="clean,pgd-2")
fi
step=(--dtypes "bfloat16,float32" --seconds 20 "${size[@]}" "${against[@]}")
case $piece in
  precision|autoattack|train) data_dir=${DATA_DIR:?"is to name a TFDS directory with cifar10"} ;;
esac
case $piece in
  tiny)
    benchmark 250 step_tiny_small_batch step.py --models $tiny --batch "${batches[0]}" "${step[@]}"
    benchmark 320 step_tiny step.py --models $tiny --batch "${batches[1]}" "${step[@]}" ;;
  small) benchmark 570 step_small step.py --models $small --batch "${batches[2]}" "${step[@]}" ;;
  base) benchmark 570 step_base step.py --models $base --batch "${batches[3]}" "${step[@]}" ;;
  trace)
    benchmark 280 trace_tiny traced.py --model $tiny --batch "${batches[1]}" "${traced[@]}"
    benchmark 280 trace_base traced.py --model $base --batch "${batches[3]}" "${traced[@]}" ;;
  attention)
    benchmark 280 attention_tiny variants.py attention --models $tiny --batch "${batches[1]}" "${size[@]}"
    benchmark 280 attention_base variants.py attention --models $base --batch "${batches[3]}" "${size[@]}" ;;
  flags)
    benchmark 570 flags variants.py flags --models $tiny --batch "${batches[1]}" "${size[@]}" ;;
  evaluation)
    benchmark 570 evaluation variants.py flags --objective pgd --dtype float32 --models $tiny \
      --batch "${batches[1]}" "${size[@]}" ;;
  precision)
    benchmark 570 precision precision.py --data_dir "$data_dir" --images 1024 "${presets[@]}" ;;
  autoattack)
    limited 570 autoattack "$python" -m vit_at evaluate cifar10_convit_128x5_conv --attacks=autoattack \
      --num_examples=1000 --batch_size=512 --data_dir="$data_dir" --workdir=runs/gpu_autoattack \
      "${few[@]}"
    cp runs/gpu_autoattack/results.json "$out/autoattack.json" || failed=1 ;;
  train)
    LIMIT=$((deadline - SECONDS)) NATURAL="${NATURAL:-} ${fields[*]}" \
      launch/gpu_cifar10.sh "$data_dir" "$out" "${fields[@]}" || failed=1 ;;
  *) echo "the piece is '$piece'; choose one of tiny, small, base, trace, attention, flags, evaluation, precision, autoattack, train" >&2; exit 2 ;;
esac
exit "$failed"
