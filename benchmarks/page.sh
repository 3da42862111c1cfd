#!/usr/bin/env bash
# Measures the tables of the documentation on a CPU that does nothing else, in about half an hour.
#
#     benchmarks/page.sh
#
# Needs torch and timm beside this package, and for AutoAttack the official code (see
# official_autoattack.py).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} results=benchmarks/results

"$python" benchmarks/step.py --objectives at,trades,mart,pgd --dtypes float32,bfloat16 \
  --repetitions 3 --out $results/step_cpu4.json
"$python" benchmarks/step.py --objectives at+masked --keep 0.1 --against eager --repetitions 3 --cold \
  --out $results/step_cpu4_keep.json
"$python" benchmarks/official_autoattack.py --images=256 --batch=64 \
  --out $results/autoattack_cpu2.json
"$python" benchmarks/scaling.py --attack_steps 3 --devices 1,2,4 --batches 16,64,128 \
  --patches 8,2 --depths 3,24 --out $results/scaling_cpu2.json
"$python" benchmarks/costs.py --out $results/costs_cpu4.json
"$python" benchmarks/tables.py
