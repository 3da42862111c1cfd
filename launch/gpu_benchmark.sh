#!/usr/bin/env bash
# Every benchmark at sizes for one GPU, in under ten minutes; JSON files go to OUT_DIR.
#
#     launch/gpu_benchmark.sh OUT_DIR
#
# Needs this package, torch and timm in one environment; no internet. TOY=1 runs the same path with
# tiny sizes, to try it on a CPU. LIMIT: seconds for all of it (default 560).
set -uo pipefail
cd "$(dirname "$0")/.." || exit
out=$1
mkdir -p "$out"
python=${PYTHON:-python3}
deadline=$((SECONDS + ${LIMIT:-560}))

# A part that fails or runs out of time must not cost the parts after it.
part() {
  local seconds=$1 name=$2 script=$3
  shift 3
  local left=$((deadline - SECONDS))
  if [ "$left" -lt 15 ]; then echo "$name: left out, no time"; return; fi
  timeout $((seconds < left ? seconds : left)) "$python" -u "benchmarks/$script" "$@" \
    --out "$out/$name.json" 2>&1 | tee "$out/$name.txt" || echo "$name: ended with an error"
}

if [ -n "${TOY:-}" ]; then
  few=(--attack_steps 1 --repetitions 3 --seconds 1)
  part 500 at step.py --models deit_tiny_patch16_224@32/8 --batch 4 --cold "${few[@]}"
  part 500 others step.py --models deit_tiny_patch16_224@32/8 --batch 4 --pgd_steps 1 \
    --objectives trades,mart+masked,pgd "${few[@]}"
  part 500 scaling scaling.py --model deit_tiny_patch16_224@32/8 --attack_steps 1 --batch 4 \
    --batches 4 --patches 8 --depths 3 --devices 1
  exit
fi

both=(--dtypes "bfloat16,float32" --repetitions 5)
part 110 deit_tiny_32 step.py --models deit_tiny_patch16_224@32/4 --batch 1024 --cold \
  --objectives at "${both[@]}" --seconds 10
part 70 vit_base_224 step.py --models vit_base_patch16_224@224/16 --batch 128 --dtypes bfloat16 \
  --repetitions 3 --seconds 15
part 80 deit_small_32 step.py --models deit_small_patch16_224@32/4 --batch 64,512 "${both[@]}" --seconds 8
part 60 objectives step.py --models deit_tiny_patch16_224@32/4 --batch 1024 --dtypes bfloat16 \
  --objectives trades,mart,at+masked,pgd --against eager --repetitions 3 --seconds 6
part 70 deit_small_224 step.py --models deit_small_patch16_224@224/16 --batch 128 \
  --dtypes bfloat16 --repetitions 3 --seconds 8
part 80 swin_tiny_224 step.py --models swin_tiny_patch4_window7_224@224/4 --batch 64 \
  --dtypes bfloat16 --repetitions 3 --seconds 8
part 90 scaling scaling.py --model deit_tiny_patch16_224@32/4 --dtype bfloat16 \
  --batches 64,256,1024,4096 --patches "" --depths ""
