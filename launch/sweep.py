#!/usr/bin/env python3
"""Starts the runs of a recipe's sweep that are not finished, and collects one table.

    launch/sweep.py configs/digits_sgd.py                        # here, one after the other
    launch/sweep.py configs/digits_sgd.py --parallel=2           # here, two at a time
    launch/sweep.py configs/digits_sgd.py --dry_run              # only print the commands
    launch/sweep.py configs/digits_sgd.py --collect              # only the table
    launch/sweep.py configs/digits_sgd.py --index=3              # one run, as in a job array
    launch/sweep.py configs/cifar10_sgd.py --launcher="launch/slurm.sh" -- --config.data.dir=DIR

Flags after ``--`` go to every run. A launcher is the command that takes the place of
``python -m vit_at.main``: another script of this directory, which submits a job instead of running
it. The table lies in the root of the runs, as table.md.
"""

import argparse
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from etils import epath  # noqa: E402

from vit_at.errors import UserError, one_sentence_errors  # noqa: E402
from vit_at.reporting.sweep import Run, collect, runs_of  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0, 128 + the number of a signal, 1 where runs failed, or a single run's."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    with one_sentence_errors():
        root = epath.Path(options.root) if options.root else None
        runs = runs_of(options.recipe, root, options.flags)
        if not runs:
            raise UserError(f"the sweep of {options.recipe} adds no run")
        root = runs[0].workdir.parent
        chosen = _chosen(runs, options.index)
        waiting = [run for run in chosen if not run.finished]
        print(f"{len(runs)} runs, {len(chosen) - len(waiting)} of {len(chosen)} finished: {root}")
        status = 0
        if options.dry_run:
            print("\n".join(shlex.join(_command(run, options)) for run in waiting))
            return 0
        if not options.collect:
            status = Pool(options).run(waiting)
        if options.index is None:
            print(collect(runs, root))
    return status


def _chosen(runs: list[Run], index: int | None) -> list[Run]:
    if index is None:
        return runs
    if not 0 <= index < len(runs):
        raise UserError(f"--index is {index}; the sweep has the runs 0 to {len(runs) - 1}")
    return [runs[index]]


def _command(run: Run, options: argparse.Namespace) -> list[str]:
    return [*options.launcher, *run.arguments]


class Pool:
    """Runs commands, a few at a time; ends them where a signal ends itself."""

    def __init__(self, options: argparse.Namespace):
        self._options, self._received = options, 0
        self._running: dict[str, subprocess.Popen] = {}
        self._failed: dict[str, int] = {}

    def run(self, runs: list[Run]) -> int:
        """Runs all; what fails does not keep the others from running."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._end) for number in numbers}
        for run in runs:
            self._wait(self._options.parallel - 1)
            if self._received:
                break
            print(f"-- {run.name}", flush=True)
            self._running[run.name] = self._start(run)
        self._wait(0)
        for number, handler in before.items():
            signal.signal(number, handler)
        for name, status in self._failed.items():
            print(f"run {name} ended with status {status}", file=sys.stderr)
        if self._received:
            return 128 + self._received
        if len(runs) == 1:  # a job array's launcher judges by it
            return sum(self._failed.values())
        return int(bool(self._failed))

    def _start(self, run: Run) -> subprocess.Popen:
        said = None
        if self._options.parallel > 1:
            run.workdir.parent.mkdir(parents=True, exist_ok=True)
            said = open(f"{run.workdir}.log", "w")  # noqa: SIM115 - the process keeps it
        command = _command(run, self._options)
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path}
        # A session of its own: ctrl-C then reaches it once, through _end.
        return subprocess.Popen(
            command, env=environment, stdout=said, stderr=said, start_new_session=True
        )

    def _wait(self, most: int) -> None:
        """Returns once at most so many are running."""
        while len(self._running) > most:
            for name, process in list(self._running.items()):
                if process.poll() is not None:
                    del self._running[name]
                    if process.returncode:
                        self._failed[name] = process.returncode
            time.sleep(0.1)

    def _end(self, number: int, frame: object) -> None:
        self._received = number
        for process in self._running.values():
            process.send_signal(signal.SIGTERM)


def _parse(arguments: list[str]) -> argparse.Namespace:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="launch/sweep.py", description="Runs a recipe's sweep and collects one table."
    )
    add = parser.add_argument
    add("recipe", help="such as configs/digits_sgd.py, or with variants for all: ...py:smoke")
    add("--root", default="", help="of the work directories; default runs/<config name>-sweep")
    add("--parallel", type=int, default=1, help="runs at a time on this machine")
    add("--launcher", type=shlex.split, default=[sys.executable, "-m", "vit_at.main"])
    add("--index", type=int, help="only the run of this number, from 0")
    add("--dry_run", action="store_true", help="print the commands and run nothing")
    add("--collect", action="store_true", help="run nothing, only make the table")
    options = parser.parse_args(arguments[:cut])
    options.flags = arguments[cut + 1 :]
    return options


if __name__ == "__main__":
    sys.exit(main())
