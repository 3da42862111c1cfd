"""Launchers, as far as a machine without a cloud goes: what they would run, and that they lint."""

import configparser
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
INSTALLED = ["tpu", "cuda12", "hub", "gcs", "prepare"]  # the extras of lock.txt
RUN = ["--config=configs/imagenet_vit_b.py", "--workdir=gs://bucket/run"]


def said(*command, status=0, **environment) -> str:
    ended = subprocess.run(
        list(map(str, command)), env=os.environ | environment, capture_output=True, text=True
    )
    assert ended.returncode == status, ended.stderr
    return ended.stdout


def stand_in(folder, name, body, shell="/usr/bin/env bash"):
    """A command of this name in ``folder``."""
    (folder / name).write_text(f"#!{shell}\n{body}\n")
    (folder / name).chmod(0o755)


def test_shell_scripts_lint():
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:/usr/bin")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    said(shellcheck, *sorted(LAUNCH.glob("*.sh")))


def test_a_tpu_pod_is_created_set_up_run_and_deleted():
    lines = said(LAUNCH / "tpu_pod.sh", "--dry_run", "all", *RUN, ZONE="z", ACCELERATOR="v6e-64")
    steps = [line for line in lines.splitlines() if line.startswith("g")]
    heads = ["queued-resources create", "archive", "scp", "ssh", "ssh", "queued-resources delete"]
    for step, head in zip(steps, heads, strict=True):
        assert head in step
    assert "machine.sh" in steps[3]
    assert "--accelerator-type=v6e-64" in steps[0]
    assert "--spot" in steps[0]
    assert all("--worker=all" in step for step in steps[2:5])
    assert "on_worker.sh start gs://bucket/run/logs" in steps[4].replace("\\", "")
    assert all(word in steps[4] for word in RUN)


@pytest.mark.parametrize("recipe", ["imagenet_vit_b:smoke", "--config=imagenet_vit_b:smoke"])
def test_what_is_about_to_be_rented_is_estimated(recipe, tmp_path):
    """However the recipe is given; where there is no estimate, the reason is said."""
    words = [LAUNCH / "tpu_pod.sh", "--dry_run", "all", "--workdir=gs://b/r", recipe]
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for body, answer in (
        ('echo "it costs: $@"', "it costs: launch/cost.py imagenet_vit_b:smoke --chip=v5e"),
        ("echo error: why >&2; exit 2", "no estimate, as launch/cost.py ends with: error: why"),
    ):
        stand_in(tmp_path, "python3", body)
        lines = said("bash", "-c", '"$@" 2>&1', "-", *words, **settings).splitlines()
        assert lines[1] == answer


def test_tpu_pod_without_a_deed_explains_itself():
    assert "create | setup | run ARGS... | delete" in said(LAUNCH / "tpu_pod.sh", status=2)


# What the cloud's command does: notes its words, and fails at the stage that FAILS names. A run has
# STATUSES, one for each look.
GCLOUD = """
echo "$@" >> "$LOG"
case "$*" in
  *describe*) if [ -e "$LOG.lost" ]; then echo SUSPENDED; else echo ACTIVE; fi ;;
  *delete*) rm -f "$LOG.lost" ;;
  *create*) if [ "$FAILS" = create ]; then exit 1; fi ;;
  *scp*) if [ "$FAILS" = copy ]; then exit 1; fi ;;
  *machine.sh*) if [ "$FAILS" = machine ]; then exit 1; fi ;;
  *status*)
    if [ "$FAILS" = slice ] && [ ! -e "$LOG.once" ]; then
      touch "$LOG.lost" "$LOG.once"
      exit 255
    fi
    echo x >> "$LOG.looks"
    echo $STATUSES | cut -d, -f"$(wc -l < "$LOG.looks")" ;;
esac
"""


def pod(folder, *arguments, deed="all", fails="", statuses="running,exit status 0", status=0):
    """The words of all calls of the cloud's command by ``tpu_pod.sh`` and a deed."""
    stand_in(folder, "gcloud", GCLOUD)
    log = folder / "log"
    log.touch()
    settings = {"PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(log), "EVERY": "0.01"}
    settings |= {"FAILS": fails, "STATUSES": statuses, "DATA": "gs://bucket/tfds"}
    said(LAUNCH / "tpu_pod.sh", deed, *(arguments or RUN), status=status, **settings)
    return log.read_text()


def test_a_tpu_run_is_started_detached_watched_and_deleted(tmp_path):
    calls = pod(tmp_path)
    order = ["queued-resources create", "scp", "DATA=gs://bucket/tfds", "on_worker.sh start"]
    order += ["on_worker.sh status", "queued-resources delete"]
    places = [calls.index(deed) for deed in order]
    assert places == sorted(places)
    assert calls.count("on_worker.sh start") == 1
    assert calls.count("on_worker.sh status") == 2
    assert "start gs://bucket/run/logs --config=configs/imagenet_vit_b.py" in calls


def test_a_run_whose_workers_have_said_nothing_yet_is_waited_for(tmp_path):
    calls = pod(tmp_path, deed="run", statuses="running,running,exit status 0")
    assert calls.count("on_worker.sh status") == 3


@pytest.mark.parametrize(
    ("statuses", "status"), [("exit status 2", 2), ("exit status 3", 3), ("exit status 1", 1)]
)
def test_a_tpu_run_that_a_restart_would_only_repeat_ends(statuses, status, tmp_path):
    calls = pod(tmp_path, statuses=statuses, status=status)
    assert calls.count("queued-resources create") == 1
    assert calls.count("queued-resources delete") == 1


@pytest.mark.parametrize(
    ("fails", "statuses"), [("slice", "exit status 0"), ("", "exit status 143,exit status 0")]
)
def test_a_preempted_tpu_run_goes_on_on_a_new_slice(fails, statuses, tmp_path):
    calls = pod(tmp_path, fails=fails, statuses=statuses)
    for deed in ("queued-resources create", "on_worker.sh start", "queued-resources delete"):
        assert calls.count(deed) == 2
    assert calls.rindex("create") > calls.index("delete")


@pytest.mark.parametrize("stage", ["create", "copy", "machine"])
def test_a_slice_that_can_not_be_set_up_is_given_up_after_two_tries(stage, tmp_path):
    calls = pod(tmp_path, fails=stage, status=1)
    assert calls.count("queued-resources create") == 2
    assert calls.count("queued-resources delete") == 2
    assert "on_worker.sh start" not in calls


def test_nothing_is_rented_for_a_work_directory_on_a_disk(tmp_path):
    assert pod(tmp_path, RUN[0], "--workdir=runs/x", status=2) == ""


def test_a_run_on_a_worker_outlives_its_connection(tmp_path):
    stand_in(tmp_path, "gcloud", 'cp "$4" "$5"')
    stand_in(tmp_path, "python", 'echo "$@"; sleep 1; exit 3')
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STATE": str(tmp_path / "state")}
    settings |= {"PYTHON": str(tmp_path / "python"), "EVERY": "0.1"}
    worker = LAUNCH / "on_worker.sh"
    for _ in range(2):  # the second finds it running
        said(worker, "start", tmp_path, "--workdir=gs://b/r", **settings)
    assert said(worker, "status", **settings).splitlines()[-1] == "running"
    deadline = time.monotonic() + 30
    while (answer := said(worker, "status", **settings).splitlines())[-1] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert answer == ["-m vit_at.main --workdir=gs://b/r", "exit status 3"]
    (log,) = tmp_path.glob("*.log")
    assert log.read_text() == "-m vit_at.main --workdir=gs://b/r\n"


# What an empty machine has: commands that note their words, and fail if they are FAILS.
COMMAND = """
echo "$(basename "$0") $*" >> "$LOG"
if [ "$(basename "$0")${1:+ $1}" = "$FAILS" ]; then exit 1; fi
if [ "$1" = venv ]; then mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/vit-at"; fi
"""


def machine(folder, data, fails="", status=0, tools=("uv", "gcloud", "rsync")):
    """The calls of machine.sh with such commands in ``folder``, which is also the home."""
    for name in tools:
        stand_in(folder, name, COMMAND)
    log = folder / "log"
    log.write_text("")
    settings = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder), "LOG": str(log)}
    settings |= {"FAILS": fails, "EXTRAS": "cuda12,hub", "DATA": data, "DATA_TO": ""}
    said(LAUNCH / "machine.sh", folder / "venv", status=status, **settings)
    return log.read_text().splitlines()


@pytest.mark.parametrize(
    ("data", "extras", "last"),
    [
        ("", "cuda12,hub", "uv pip"),
        ("gs://b/tfds", "cuda12,hub", "gcloud storage rsync -q -r gs://b/tfds {}"),
        ("/mnt/tfds", "cuda12,hub", "rsync -a --partial /mnt/tfds/ {}"),
        ("~/tfds", "cuda12,hub", "rsync -a --partial {home}/tfds/ {}"),
        ("./tfds", "cuda12,hub", "rsync -a --partial {here}/tfds/ {}"),
        ("cifar10", "cuda12,hub,prepare", "vit-at prepare cifar10 --data_dir={}"),
        ("set/config", "cuda12,hub,prepare", "vit-at prepare set/config --data_dir={}"),
    ],
)
def test_an_empty_machine_gets_the_project_once_and_the_data(data, extras, last, tmp_path):
    calls = machine(tmp_path, data)
    python = tmp_path / "venv" / "bin" / "python"
    assert calls[0] == f"uv venv -q --clear --python 3.12 {tmp_path / 'venv'}"
    assert calls[1] == f"uv pip install -q --python {python} -c launch/lock.txt -e .[{extras}]"
    places = {"home": tmp_path, "here": pathlib.Path.cwd()}
    assert calls[-1].startswith(last.format(tmp_path / "tensorflow_datasets", **places))
    again = machine(tmp_path, data)
    assert again == calls[2:]  # the data is compared each time


@pytest.mark.parametrize(
    ("fails", "made"), [("uv venv", 1), ("uv pip", 2), ("gcloud storage", 3), ("curl -LsSf", 1)]
)
def test_a_machine_that_is_not_ready_says_so_and_goes_on_where_it_failed(fails, made, tmp_path):
    tools = ("curl", "gcloud") if fails.startswith("curl") else ("uv", "gcloud")
    assert len(machine(tmp_path, "gs://b/tfds", fails, 1, tools)) == made
    calls = machine(tmp_path, "gs://b/tfds", tools=("uv", "gcloud"))
    assert [call.split()[1] for call in calls] == ["venv", "pip", "storage"][-len(calls) :]
    assert len(calls) == (1 if fails == "gcloud storage" else 3)


def test_machine_without_an_environment_explains_itself():
    assert "EXTRAS=tpu,hub,gcs" in said(LAUNCH / "machine.sh", status=2)


@pytest.mark.parametrize("fails", ["", "srun"])
def test_a_slurm_job_on_empty_nodes_makes_them_ready_first(fails, tmp_path):
    stand_in(tmp_path, "srun", 'echo "srun $@"\n[ -z "$FAILS" ]')
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "FAILS": fails}
    settings |= {"SLURM_SUBMIT_DIR": str(LAUNCH.parent), "SLURM_JOB_NUM_NODES": "4"}
    settings |= {"EXTRAS": "cuda12", "VENV": "/shared/venv"}
    calls = said(LAUNCH / "slurm.sh", *RUN, status=bool(fails), **settings).splitlines()
    assert calls[0].endswith("--ntasks=4 --ntasks-per-node=1 launch/machine.sh /shared/venv")
    assert [call.split()[2:5] for call in calls[1:]] == [
        ["/shared/venv/bin/python", "-m", "vit_at.main"]
    ] * (not fails)


def test_extras_that_launchers_install_exist():
    config = configparser.ConfigParser()
    config.read(LAUNCH.parent / "setup.cfg")
    for file in LAUNCH.iterdir():
        for words in re.findall(r"EXTRAS=([\w,]+)", file.read_text()):
            assert set(words.split(",")) <= set(config["options.extras_require"]), file


def test_what_is_locked_is_what_setup_cfg_allows():
    config = configparser.ConfigParser()
    config.read(LAUNCH.parent / "setup.cfg")
    lines = (LAUNCH / "lock.txt").read_text().splitlines()
    locked = dict(line.partition(" ")[0].split("==") for line in lines if not line.startswith("#"))
    extras = config["options.extras_require"]
    wanted = [config["options"]["install_requires"], *(extras[e] for e in INSTALLED)]
    for line in "\n".join(wanted).splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert locked[canonicalize_name(requirement.name)] in requirement.specifier, line


def test_a_run_is_told_that_its_machine_is_about_to_stop(tmp_path):
    """It has the time to save: the stand-in ends as a run does that has saved."""
    run = "trap 'echo saved; exit 143' TERM; echo started; while :; do sleep 0.1; done"
    stand_in(tmp_path, "curl", "echo TERMINATE_ON_HOST_MAINTENANCE")
    stand_in(tmp_path, "python", run)
    (tmp_path / "gcloud").symlink_to("/bin/true")
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STATE": str(tmp_path / "state")}
    settings |= {"PYTHON": str(tmp_path / "python"), "EVERY": "0.5"}
    said(LAUNCH / "on_worker.sh", "start", tmp_path, "--workdir=gs://b/r", **settings)
    deadline = time.monotonic() + 30
    while "exit" not in (answer := said(LAUNCH / "on_worker.sh", "status", **settings)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert answer.splitlines() == ["saved", "exit status 143"]


def test_a_slurm_job_submits_itself():
    line = said(LAUNCH / "slurm.sh", "--dry_run", *RUN, SBATCH="--nodes=2", SLURM_JOB_ID="")
    assert line.split() == ["sbatch", "--nodes=2", "launch/slurm.sh", *RUN]


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (2, False), (3, False), (143, True)])
def test_a_slurm_job_is_requeued_only_where_it_was_interrupted(tmp_path, status, requeued):
    stand_in(tmp_path, "srun", f"exit {status}")
    stand_in(tmp_path, "scontrol", 'echo "scontrol $@"')
    out = said(
        *(LAUNCH / "slurm.sh", *RUN),
        status=0 if requeued else status,
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_JOB_ID="7",
        SLURM_SUBMIT_DIR=str(LAUNCH.parent),
    )
    assert ("scontrol requeue 7" in out) == requeued


def test_the_processes_of_a_slurm_job_get_its_cores(tmp_path):
    stand_in(tmp_path, "srun", 'echo "cores $SRUN_CPUS_PER_TASK"')
    settings = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    settings |= {"SLURM_SUBMIT_DIR": str(LAUNCH.parent), "SLURM_CPUS_PER_TASK": "12"}
    assert said(LAUNCH / "slurm.sh", *RUN, **settings).strip() == "cores 12"


@pytest.mark.parametrize("data", ["", "images"])
def test_a_jobset_has_shared_memory_and_the_bucket(data):
    words = ["gpu", "--image=image", "--hosts=2", f"--data={data}", "--dry_run", "--", *RUN]
    manifest = yaml.safe_load(said(sys.executable, LAUNCH / "gke.py", *words))
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    (container,) = job["spec"]["containers"]
    volumes = {volume.pop("name"): volume for volume in job["spec"]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert volumes["shm"] == {"emptyDir": {"medium": "Memory"}}
    assert mounts == {"shm": "/dev/shm"} | ({"data": "/data"} if data else {})
    assert bool(job["metadata"]["annotations"]) == bool(data)
    if data:
        assert volumes["data"]["csi"]["volumeAttributes"]["bucketName"] == data


@pytest.mark.parametrize(("kubectl", "status"), [("", 2), ("exit 1", 1), ("cat > $LOG", 0)])
def test_a_jobset_is_handed_to_kubectl_whose_status_is_returned(kubectl, status, tmp_path):
    if kubectl:
        stand_in(tmp_path, "kubectl", kubectl, shell="/bin/bash")  # PATH has nothing else
    (tmp_path / "cat").symlink_to("/bin/cat")
    words = ["gpu", "--image=image", "--hosts=2", "--", *RUN]
    settings = {"PATH": str(tmp_path), "LOG": str(tmp_path / "log")}
    said(sys.executable, LAUNCH / "gke.py", *words, status=status, **settings)
    assert (tmp_path / "log").exists() == (status == 0)


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_a_jobset_has_one_process_a_host_and_is_not_restarted_for_mistakes(kind):
    words = [kind, "--image=image", "--hosts=16", "--dry_run", "--", *RUN]
    manifest = yaml.safe_load(said(sys.executable, LAUNCH / "gke.py", *words))
    assert manifest["kind"] == "JobSet"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "workers"}, "spec": job}
    kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)
    assert job["completions"] == job["parallelism"] == 16
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2, 3]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert all(word in container["command"] for word in RUN)
    if kind == "tpu":
        assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "8x8"
        assert container["resources"]["limits"] == {"google.com/tpu": 4}
    else:
        assert "--num_processes=16" in container["command"]
        assert "--coordinator=vit-at-workers-0-0.vit-at:1234" in container["command"]


def test_skypilot_recovers_spot_machines():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert task["resources"]["use_spot"]
    assert "vit_at.main $ARGS --workdir=/runs/" in task["run"]
    assert {"ARGS", "BUCKET", "DATA"} == task["envs"].keys()
    assert task["setup"] == "EXTRAS=cuda12,hub DATA=$DATA launch/machine.sh ~/venv\n"


def test_local_processes_differ_in_their_number_only():
    words = ["-n", "2", "--dry_run", "--port=1234", "--", *RUN]
    lines = said(sys.executable, LAUNCH / "local.py", *words).splitlines()
    assert len(lines) == 2
    for process, line in enumerate(lines):
        assert line.endswith(f"--num_processes=2 --process_id={process}")
        assert "--coordinator=127.0.0.1:1234" in line
