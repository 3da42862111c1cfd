"""Starts the runs of a recipe's sweep that are not finished, and collects one table.

    vit-at sweep configs/digits_sgd.py                        # here, one after the other
    vit-at sweep configs/digits_sgd.py --parallel=2           # here, two at a time
    vit-at sweep configs/digits_sgd.py --dry_run              # only print the commands
    vit-at sweep configs/digits_sgd.py --collect              # only the table
    vit-at sweep configs/digits_sgd.py --index=3              # one run, as in a job array
    vit-at sweep configs/cifar10_sgd.py --launcher=launch/slurm.sh -- --config.data.dir=DIR

Flags after ``--`` go to every run. A launcher replaces ``python -m vit_at.main``, for example by a
script that submits a job. The table is ``table.md`` in the root of the runs.
"""

import argparse
import contextlib
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from vit_at.errors import Parser, UserError, one_sentence_errors
from vit_at.reporting import study
from vit_at.reporting.jobs import Job, jobs_of
from vit_at.reporting.run import Run
from vit_at.workdir.files import write_atomically

TABLE_FILE = "table.md"  # in the root of the runs


def main(arguments: list[str] | None = None) -> int:
    """Runs the sweep and prints its table.

    Returns:
      The exit status: 0; 128 + the number of a signal; that of a single run; 1 if any of several
      failed.
    """
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    with one_sentence_errors():
        if options.parallel < 1:
            raise UserError(f"--parallel is {options.parallel}; it must be 1 or more")
        root = epath.Path(options.root).expanduser() if options.root else None
        jobs = jobs_of(options.recipe, root, options.flags)
        if not jobs:
            raise UserError(f"the sweep of {options.recipe} adds no run")
        root = jobs[0].workdir.parent
        chosen = _chosen(jobs, options.index)
        waiting = [job for job in chosen if not job.finished]
        print(f"{len(jobs)} runs, {len(chosen) - len(waiting)} of {len(chosen)} finished: {root}")
        if options.dry_run:
            print("\n".join(shlex.join([*options.launcher, *job.arguments]) for job in waiting))
            return 0
        status = 0
        if not options.collect:
            status = Pool(options.launcher, options.parallel).run(waiting)
        if options.index is None:
            print(collect(jobs, root))
    return status


def _chosen(jobs: list[Job], index: int | None) -> list[Job]:
    if index is None:
        return jobs
    if not 0 <= index < len(jobs):
        raise UserError(f"--index is {index}; the sweep has the runs 0 to {len(jobs) - 1}")
    return [jobs[index]]


def collect(jobs: Sequence[Job], root: epath.Path) -> str:
    """Writes the table of the finished jobs as ``table.md`` into root; returns its text."""
    done = [Run.read(job.workdir) for job in jobs if job.finished]
    text = study.compare(study.groups(done)).markdown() if done else "no run has finished\n"
    root.mkdir(parents=True, exist_ok=True)
    write_atomically(root / TABLE_FILE, text)
    return text


class Pool:
    """Runs jobs as processes, ``parallel`` at a time; SIGTERM and SIGINT end them and the rest."""

    def __init__(self, launcher: Sequence[str], parallel: int):
        self._launcher, self._parallel = launcher, parallel
        self._received = 0  # number of a signal
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.RLock()  # no process starts while a signal is handled

    def run(self, jobs: Sequence[Job]) -> int:
        """Runs all jobs, also after one has failed; returns the exit status, see ``main``."""
        before = {n: signal.signal(n, self._end) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            with ThreadPoolExecutor(self._parallel) as threads:
                statuses = list(threads.map(self._run, jobs))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        for job, status in zip(jobs, statuses, strict=True):
            if status:
                print(f"run {job.name} ended with status {status}", file=sys.stderr)
        if self._received:
            return 128 + self._received
        return statuses[0] if len(jobs) == 1 else int(any(statuses))

    def _run(self, job: Job) -> int:
        """Starts one job and waits for it; returns its status, 0 if it was not started."""
        with contextlib.ExitStack() as stack:
            output = None
            if self._parallel > 1:
                job.workdir.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(open(f"{job.workdir}.log", "w"))
            with self._lock:
                if self._received:
                    return 0
                print(f"-- {job.name}", flush=True)
                command = [*self._launcher, *job.arguments]
                # In a session of its own, so that Ctrl-C reaches it only once, through _end.
                process = subprocess.Popen(
                    command, stdout=output, stderr=output, start_new_session=True
                )
                self._running.add(process)
            status = process.wait()
            self._running.discard(process)
        return status

    def _end(self, number: int, frame: object) -> None:
        with self._lock:
            self._received = number
            for process in list(self._running):
                process.terminate()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command; what follows ``--`` is not among them."""
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="such as configs/digits_sgd.py; ...py:smoke for variants")
    add("--root", default="", help="of the work directories; default runs/<config name>-sweep")
    add("--parallel", type=int, default=1, help="runs at a time on this machine")
    add(
        "--launcher",
        type=shlex.split,
        default=[sys.executable, "-m", "vit_at.main"],
        help="the command that starts a run; default python -m vit_at.main",
    )
    add("--index", type=int, help="only the run of this number, from 0")
    add("--dry_run", action="store_true", help="print the commands and run nothing")
    add("--collect", action="store_true", help="run nothing, only make the table")


def _parse(arguments: list[str]) -> argparse.Namespace:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = Parser(prog="vit-at sweep", description=__doc__)
    add_arguments(parser)
    options = parser.parse_args(arguments[:cut])
    options.flags = arguments[cut + 1 :]
    return options


if __name__ == "__main__":
    sys.exit(main())
