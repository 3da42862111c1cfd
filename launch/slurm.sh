#!/usr/bin/env bash
# A Slurm job: one run, or with --array the runs of a sweep, one in each task of the array.
#
#     launch/slurm.sh [--dry_run] --config=configs/imagenet_vit_b.py --workdir=DIR ...
#     SBATCH="--array=0-8" launch/slurm.sh [--dry_run] configs/digits_sgd.py [-- FLAGS...]
#
# Submits itself. SBATCH: more flags of sbatch, such as "--nodes=4 --ntasks-per-node=8
# --gpus-per-node=8 --cpus-per-task=12 --time=8:00:00": one process a GPU, which JAX arranges from
# Slurm's variables, and cores for each to decode images.
# On an empty machine, EXTRAS=cuda12,hub makes the environment (in VENV, default ~/.vit_at/venv, once
# for all nodes that share it), and DATA=cifar10 or DATA=/mnt/tfds the data on each node's disk, in
# DATA_TO (launch/machine.sh). Otherwise PYTHON, by default python3, has this project.
# An interrupted job (preempted, out of time, a node lost) is queued again and goes on from its last
# checkpoint.
#SBATCH --job-name=vit_at
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
  cd "$(dirname "$0")/.."
  submit=()
  if [ "${1:-}" = --dry_run ]; then submit=(echo) && shift; fi
  # shellcheck disable=SC2086 # SBATCH holds several words
  exec "${submit[@]}" sbatch ${SBATCH:-} launch/slurm.sh "$@"
fi

cd "$SLURM_SUBMIT_DIR"
# srun no longer takes it from the job by itself (Slurm 22.05).
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
python=${PYTHON:-python3} status=0
if [ -n "${EXTRAS:-}" ]; then
  venv=${VENV:-$HOME/.vit_at/venv} python=$venv/bin/python
  srun --kill-on-bad-exit=1 --ntasks="${SLURM_JOB_NUM_NODES:-1}" --ntasks-per-node=1 \
    launch/machine.sh "$venv" || exit 1
fi
run="srun --kill-on-bad-exit=1 $python -m vit_at.main"
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  words=("$python" -m vit_at sweep "$1" --index="$SLURM_ARRAY_TASK_ID" --launcher="$run" "${@:2}")
else
  read -ra words <<<"$run" && words+=("$@")
fi
"${words[@]}" || status=$?
# 0: done; 1 to 3: an error that a restart would only repeat; others: interrupted.
case $status in 0 | 1 | 2 | 3) exit "$status" ;; esac
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
scontrol requeue "${job:-$SLURM_JOB_ID}"
