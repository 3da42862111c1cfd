#!/usr/bin/env bash
# One run on a Cloud TPU pod slice: created, set up, run, resumed after preemption, torn down.
#
#     launch/tpu_pod.sh [--dry_run] create | setup | run ARGS... | delete
#     launch/tpu_pod.sh [--dry_run] all ARGS...       # these in turn, until the run has ended
#
# ARGS are those of 'vit-at train'; --workdir must be a bucket (gs://...), as the disks are deleted
# with the slice. The run is detached on the workers, its logs are in WORKDIR/logs: this machine may
# close, and 'run' with the same ARGS watches it again. Settings and their defaults:
#     NAME=vit-at ZONE=us-west4-a ACCELERATOR=v5litepod-64 VERSION=v2-alpha-tpuv5-lite SPOT=1
#     DATA=                 a TFDS directory in a bucket, copied to all workers, or a set's name
#     DATA_TO=tensorflow_datasets   where to, in a worker's home, or /dev/shm/data for its memory
# (v6e: ACCELERATOR=v6e-64 VERSION=v2-alpha-tpuv6e). The gcloud command line must be logged in.
set -euo pipefail
cd "$(dirname "$0")/.."

name=${NAME:-vit-at} zone=${ZONE:-us-west4-a}
accelerator=${ACCELERATOR:-v5litepod-64} version=${VERSION:-v2-alpha-tpuv5-lite}
every=${EVERY:-30} # seconds between looks at a request or a run
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
    sleep "$every"
  done
}

setup() { # the tree as committed, in an environment of its own, on every worker; then the data
  do_it git archive --format=tar.gz --output=/tmp/vit_at.tar.gz HEAD &&
    do_it gcloud compute tpus tpu-vm scp /tmp/vit_at.tar.gz "$name": --zone="$zone" --worker=all &&
    on_all "set -e; mkdir -p vit_at; tar xzf vit_at.tar.gz -C vit_at
    EXTRAS=tpu,hub,gcs DATA=${DATA:-} DATA_TO=${DATA_TO:-} vit_at/launch/machine.sh venv"
}

value() { printf '%s\n' "${@:2}" | sed -n "s/^--$1=//p"; } # of a flag among ARGS
recipe() { # --config=RECIPE, or RECIPE alone
  value config "$@" | grep . || printf '%s\n' "$@" | sed -n '/^-/!{p;q}'
}

check() { # before anything is rented
  case $(value workdir "$@") in
    gs://*) ;;
    *) echo "--workdir is '$(value workdir "$@")'; it must be in a bucket: gs://BUCKET/run" >&2 && return 2 ;;
  esac
}

run() { # the exit status of the run, as its processes give it; 75: the slice was lost
  local words workdir lost=0
  check "$@" || return 2
  workdir=$(value workdir "$@")
  words=$(printf '%q ' "$workdir/logs" "$@")
  on_all "vit_at/launch/on_worker.sh start $words" || return 75
  if [ -n "$dry_run" ]; then return; fi
  while [ "$lost" -lt 5 ]; do
    sleep "$every"
    if on_all "vit_at/launch/on_worker.sh status" > "$said"; then
      lost=0
      { grep -v '^running$' "$said" || true; } | sort | uniq | tail -n 3
      if ! grep -q '^running$' "$said"; then
        return "$(sed -n 's/^exit status //p' "$said" | sort -n | tail -n 1 | grep . || echo 75)"
      fi
    else
      lost=$((lost + 1)) # a connection, or the slice
      if [ "$(state)" != ACTIVE ]; then return 75; fi
    fi
  done
  return 75
}

delete() { queued delete --force --quiet; }

cost() { # what is about to be rented, as far as this machine can tell
  local chip=v5e
  case $accelerator in v6e*) chip=v6e ;; esac
  echo "about to rent $accelerator in $zone (SPOT=${SPOT:-1}); by estimate:" >&2
  python3 launch/cost.py "$(recipe "$@")" --chip="$chip" >&2 2> "$said" ||
    echo "no estimate, as launch/cost.py ends with: $(tail -n 1 "$said")" >&2
}

all() {
  local status failed=0
  check "$@" || return 2
  cost "$@"
  while :; do
    status=0
    if create && setup; then
      failed=0
      run "$@" || status=$?
    else
      status=75 failed=$((failed + 1))
    fi
    delete
    # 0: done; 1 to 3: an error that a restart would only repeat; others: interrupted.
    case $status in 0 | 1 | 2 | 3) return "$status" ;; esac
    if [ "$failed" = 2 ]; then
      echo "the slice could not be created or set up, twice; it is deleted, nothing is rented" >&2
      return 1
    fi
    echo "status $status: again on a new slice, from the last checkpoint" >&2
  done
}

case ${1:-} in
  create | setup | delete) "$1" ;;
  run | all) "$@" ;;
  *) sed -n '2,13s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
