#!/usr/bin/env bash
# Runs 'vit-at train' on one worker of a slice, detached: it outlives the connection that started it.
#
#     launch/on_worker.sh start LOGS ARGS...   # nothing if it runs already; LOGS: a bucket's directory
#     launch/on_worker.sh status               # the log's last line, and 'exit status N' at the end
#
# Its log is copied to LOGS/HOST.log every minute. PYTHON: default ../venv/bin/python. If the cloud
# says that it is about to stop the machine, the run gets SIGTERM, saves and ends.
set -euo pipefail
cd "$(dirname "$0")/.."
state=${STATE:-$HOME/.vit_at_run} python=${PYTHON:-../venv/bin/python}
mkdir -p "$state"

running() { [ -e "$state/pid" ] && kill -0 "$(cat "$state/pid")" 2>/dev/null; }

case ${1:-} in
  start)
    logs=$2
    shift 2
    if running; then exit; fi
    rm -f "$state/exit"
    # shellcheck disable=SC2016  # expanded by the detached shell
    setsid nohup bash -c '
      state=$1 logs=$2 python=$3; shift 3
      copy() { gcloud storage cp -q "$state/log" "$logs/$(hostname).log"; }
      while sleep "${EVERY:-60}"; do copy; done > /dev/null 2>&1 &
      copier=$!
      "$python" -m vit_at.main "$@" > "$state/log" 2>&1 &
      run=$!
      # It answers when the event changes: NONE, TERMINATE_ON_HOST_MAINTENANCE or MIGRATE_....
      event=http://metadata.google.internal/computeMetadata/v1/instance/maintenance-event
      while sleep "${EVERY:-5}"; do
        case $(curl -sf -H "Metadata-Flavor: Google" "$event?wait_for_change=true&timeout_sec=60") in
          *MAINTENANCE*) kill -TERM "$run" && break ;;
        esac
      done > /dev/null 2>&1 &
      watcher=$! status=0
      wait "$run" || status=$?
      kill "$copier" "$watcher"
      copy > /dev/null 2>&1
      echo "$status" > "$state/exit"
    ' on_worker "$state" "$logs" "$python" "$@" > /dev/null 2>&1 < /dev/null &
    echo $! > "$state/pid" ;;
  status)
    tail -n 1 "$state/log" 2>/dev/null || true
    if [ -e "$state/exit" ]; then echo "exit status $(cat "$state/exit")"
    elif running; then echo "running"
    else echo "exit status 75"; fi ;;
  *) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
