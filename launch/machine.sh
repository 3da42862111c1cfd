#!/usr/bin/env bash
# Makes an empty machine ready for a run: Python, this project and what launch/lock.txt names, by
# uv, then the data.
#
#     EXTRAS=tpu,hub,gcs [DATA=PLACE] [DATA_TO=DIR] launch/machine.sh VENV
#
# VENV: the environment to make, which several machines may share. EXTRAS: of setup.cfg. DATA: a TFDS
# directory to copy, in a bucket (gs://BUCKET/tfds) or on a disk (/mnt/tfds, ./tfds or ~/tfds), or a
# set that TFDS can download, such as cifar10 or imagenette/full-size. DATA_TO: where to, below the
# home if relative; by default tensorflow_datasets, where runs look. What is there is kept, so each
# start of a run may call this.
set -euo pipefail
if [ $# != 1 ] || [ -z "${EXTRAS:-}" ]; then sed -n '2,11s/^# \{0,1\}//p' "$0" && exit 2; fi
venv=$(realpath -m "$1") data=${DATA:-} to=${DATA_TO:-tensorflow_datasets} extras=$EXTRAS
case $data in \~ | \~/*) data=$HOME${data#\~} ;; .*) data=$(realpath -m "$data") ;; esac
cd "$(dirname "$0")/.."
case $to in /*) ;; *) to=$HOME/$to ;; esac
case $data in '' | gs://* | /*) ;; *) extras=$extras,prepare ;; esac

mkdir -p "$(dirname "$venv")"
exec 9> "$venv.lock"
flock 9 # of several processes or machines, one installs
wanted="$extras $(cat setup.cfg launch/lock.txt | cksum)"
if [ "$(cat "$venv/ready" 2> /dev/null)" != "$wanted" ]; then
  uv=$(command -v uv || echo "$HOME/.local/bin/uv")
  [ -x "$uv" ] || curl -LsSf https://astral.sh/uv/install.sh | sh
  "$uv" venv -q --clear --python 3.12 "$venv"
  "$uv" pip install -q --python "$venv/bin/python" -c launch/lock.txt -e ".[$extras]"
  echo "$wanted" > "$venv/ready"
fi
flock -u 9

mkdir -p "$to"
case $data in # copies are parallel or resumed, and sizes are compared
  '') ;;
  gs://*) gcloud storage rsync -q -r "$data" "$to" ;;
  /*)
    if ! command -v rsync > /dev/null; then
      echo "DATA is '$data', a directory, which rsync copies: install rsync" >&2 && exit 1
    fi
    rsync -a --partial "$data/" "$to" ;;
  *) "$venv/bin/vit-at" prepare "$data" --data_dir="$to" ;;
esac
