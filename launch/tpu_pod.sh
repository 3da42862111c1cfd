#!/usr/bin/env bash
# One run on a Cloud TPU pod slice: created, set up, run, resumed after preemption, torn down.
#
#     launch/tpu_pod.sh [--dry_run] create | setup | run ARGS... | delete
#     launch/tpu_pod.sh [--dry_run] all ARGS...       # these in turn, until the run has ended
#
# ARGS are those of 'vit-at train'; --workdir must be a bucket (gs://...), as the disks are deleted
# with the slice. Settings from the environment, and their defaults:
#     NAME=vit-at ZONE=us-west4-a ACCELERATOR=v5litepod-64 VERSION=v2-alpha-tpuv5-lite SPOT=1
#     DATA_BUCKET=          a bucket to be mounted on all workers as ~/data, read-only (by gcsfuse)
# (v6e: ACCELERATOR=v6e-64 VERSION=v2-alpha-tpuv6e). The gcloud command line must be logged in.
set -euo pipefail
cd "$(dirname "$0")/.."

name=${NAME:-vit-at} zone=${ZONE:-us-west4-a}
accelerator=${ACCELERATOR:-v5litepod-64} version=${VERSION:-v2-alpha-tpuv5-lite}
said=$(mktemp)
trap 'rm -f "$said"' EXIT
dry_run=
if [ "${1:-}" = --dry_run ]; then dry_run=1 && shift; fi

do_it() { # runs a command, or prints it
  if [ -n "$dry_run" ]; then printf '%q ' "$@" && echo; else "$@"; fi
}
queued() { do_it gcloud compute tpus queued-resources "$1" "$name" --zone="$zone" "${@:2}"; }
on_all() { do_it gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }
state() {
  gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)'
}

create() {
  local spot=()
  if [ "${SPOT:-1}" = 1 ]; then spot=(--spot); fi
  queued create --node-id="$name" --accelerator-type="$accelerator" --runtime-version="$version" \
    "${spot[@]}" || return 1
  if [ -n "$dry_run" ]; then return; fi
  until [ "$(state)" = ACTIVE ]; do
    case $(state) in FAILED | SUSPENDED) echo "the request has failed" >&2 && return 1 ;; esac
    sleep 30
  done
}

setup() { # the tree as committed, in an environment of its own, on every worker
  do_it git archive --format=tar.gz --output=/tmp/vit_at.tar.gz HEAD &&
    do_it gcloud compute tpus tpu-vm scp /tmp/vit_at.tar.gz "$name": --zone="$zone" --worker=all &&
    on_all "mkdir -p vit_at && tar xzf vit_at.tar.gz -C vit_at && python3 -m venv venv &&
    venv/bin/pip install -q 'jax[tpu]' -e './vit_at[hub,gcs]'" &&
    if [ -n "${DATA_BUCKET:-}" ]; then
      on_all "mkdir -p data && gcsfuse --implicit-dirs -o ro $DATA_BUCKET data"
    fi
}

run() { # the exit status of the run, as its process 0 gives it
  local words
  words=$(printf '%q ' "$@")
  on_all "cd vit_at && ../venv/bin/python -m vit_at.main $words; echo \"exit status \$?\"" |
    tee "$said"
  if [ -n "$dry_run" ]; then return; fi
  return "$(sed -n 's/^exit status //p' "$said" | sort -n | tail -1 | grep . || echo 75)"
}

delete() { queued delete --force --quiet; }

all() {
  local status
  while :; do
    status=0
    create && setup || status=75 # lost before it began
    if [ "$status" = 0 ]; then run "$@" || status=$?; fi
    delete
    # 0: done; 1 to 3: an error that a restart would only repeat; others: interrupted.
    case $status in 0 | 1 | 2 | 3) return "$status" ;; esac
    echo "status $status: again on a new slice, from the last checkpoint" >&2
  done
}

case ${1:-} in
  create | setup | delete) "$1" ;;
  run | all) "$@" ;;
  *) sed -n '2,12s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
