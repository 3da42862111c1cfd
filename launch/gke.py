#!/usr/bin/env python3
"""Fills in a JobSet manifest for GKE and hands it to kubectl; needs JobSet 0.6 in the cluster.

    launch/gke.py tpu --image=IMAGE --hosts=16 --topology=8x8 [--dry_run] -- ARGS
    launch/gke.py gpu --image=IMAGE --hosts=4 [--data=BUCKET] [--dry_run] -- ARGS
    kubectl delete jobset vit-at                                # to tear down

ARGS are those of 'vit-at train'; --workdir must be a bucket or a volume that all pods share. The
image holds this project with JAX for the accelerator (launch/Dockerfile). On TPUs a host has four
chips and JAX finds the other hosts; on GPUs, flags name the coordinator. --data mounts a bucket,
read-only, at /data (--config.data.dir=/data): gcsfuse, whose file cache keeps what has been read,
with the options of MaxText; the cluster needs the Cloud Storage FUSE driver.
"""

import argparse
import json
import pathlib
import shutil
import string
import subprocess
import sys

# Names, sizes and files do not change, so all of them stay in gcsfuse's caches.
MOUNT_OPTIONS = (
    "implicit-dirs,metadata-cache:ttl-secs:-1,metadata-cache:stat-cache-max-size-mb:-1,"
    "metadata-cache:type-cache-max-size-mb:-1,file-cache:max-size-mb:-1,"
    "file-cache:enable-parallel-downloads:true"
)
HERE = pathlib.Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    manifest = render(options)
    if options.dry_run:
        print(manifest, end="")
        return 0
    if not shutil.which("kubectl"):
        print("error: kubectl is not installed; --dry_run prints the manifest", file=sys.stderr)
        return 2
    return subprocess.run(["kubectl", "apply", "-f", "-"], input=manifest, text=True).returncode


def render(options: argparse.Namespace) -> str:
    """The manifest as text."""
    command = ["python3", "-m", "vit_at.main", *options.arguments]
    if options.kind == "gpu":
        command += [
            f"--coordinator={options.name}-workers-0-0.{options.name}:1234",
            f"--num_processes={options.hosts}",
            "--process_id=$(JOB_COMPLETION_INDEX)",
        ]
    template = string.Template((HERE / f"gke_{options.kind}.yaml").read_text())
    values = {"name": options.name, "image": options.image, "hosts": options.hosts}
    values |= {"topology": options.topology, "accelerator": options.accelerator}
    values |= {name: json.dumps(value) for name, value in _storage(options.data).items()}
    return template.substitute(values, command=json.dumps(command))


def _storage(bucket: str) -> dict[str, object]:
    """Annotations, volumes and mounts: shared memory for NCCL and data, and the bucket."""
    volumes = {"shm": {"emptyDir": {"medium": "Memory"}}}
    mounts = {"shm": {"mountPath": "/dev/shm"}}
    annotations = {}
    if bucket:
        attributes = {"bucketName": bucket, "mountOptions": MOUNT_OPTIONS}
        driver = {"driver": "gcsfuse.csi.storage.gke.io", "readOnly": True}
        volumes["data"] = {"csi": driver | {"volumeAttributes": attributes}}
        mounts["data"] = {"mountPath": "/data", "readOnly": True}
        annotations["gke-gcsfuse/volumes"] = "true"
    return {
        "annotations": annotations,
        "volumes": [{"name": name} | volume for name, volume in volumes.items()],
        "mounts": [{"name": name} | mount for name, mount in mounts.items()],
    }


def _parse(arguments: list[str]) -> argparse.Namespace:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="launch/gke.py", description="A run as a JobSet on GKE.", allow_abbrev=False
    )
    add = parser.add_argument
    add("kind", choices=("tpu", "gpu"))
    add("--image", required=True)
    add("--hosts", type=int, required=True, help="processes: chips / 4 on TPU, nodes on GPU")
    add("--topology", default="8x8", help="of the TPU slice")
    add("--accelerator", default="tpu-v5-lite-podslice", help="or tpu-v6e-slice")
    add("--name", default="vit-at")
    add("--data", default="", metavar="BUCKET", help="mounted at /data; '': none")
    add("--dry_run", action="store_true", help="print the manifest and apply nothing")
    options = parser.parse_args(arguments[:cut])
    options.arguments = arguments[cut + 1 :]
    return options


if __name__ == "__main__":
    sys.exit(main())
